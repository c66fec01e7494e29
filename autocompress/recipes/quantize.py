"""Post-training quantization without a search: every layer that can be int8, corrected until the drop is small enough.

Nothing is trained on labels, and nothing is measured on an engine; how fast the result is, `autocompress benchmark`
says of its ONNX file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autocompress.compress import CompressionContext, apply_policy, rewrite
from autocompress.compress.layout import in_fast_layout
from autocompress.config import QuantizationConfig
from autocompress.errors import ConfigError, nearest
from autocompress.files import write_json
from autocompress.graph.builder import ranges_for, write_model
from autocompress.model.inventory import Inventory, take_inventory
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.recovery.adaround import STEPS
from autocompress.recovery.ptq_stages import PtqStage, best_stage, run_stages
from autocompress.tasks.base import Task
from autocompress.tasks.reading import first_samples
from autocompress.tasks.validation import metric_of

_BATCH = 256


@dataclass(frozen=True)
class QuantizationOptions:
    """What is quantized, and how far it may go.

    Attributes:
        max_drop: Largest loss of the metric on validation data, a fraction.
        skip: Layers that stay as they are.
        steps: Of AdaRound, for each layer.
        int8_lstm: Whether the engine has int8 LSTMs.
    """

    max_drop: float = 0.01
    skip: tuple[str, ...] = ()
    steps: int = STEPS
    int8_lstm: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"{self.steps} steps of AdaRound are not possible: give 1 or more.")


@dataclass(frozen=True)
class QuantizationResult:
    """A quantized model.

    Attributes:
        rung: What was taken: the first rung within the limit, else the best.
        rungs: All that were tried, in order.
        policy: Which layers are int8.
        baseline: Metric of the uncompressed model on validation data.
        floor: What the metric may fall to.
        test, baseline_test: The metric of both on test data.
        quantization: How ranges of activations were set.
        skipped: Layer to why it is not int8.
    """

    rung: PtqStage
    rungs: tuple[PtqStage, ...]
    policy: CompressionPolicy
    baseline: float
    floor: float
    test: float
    baseline_test: float
    quantization: QuantizationConfig
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The quantized model, in eval mode."""
        return self.rung.model

    @property
    def feasible(self) -> bool:
        """Whether the drop is within the limit."""
        return self.rung.metric >= self.floor

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without the models."""
        return {
            "policy": self.policy.to_dict(),
            "calibration": self.quantization.calibration,
            "taken": self.rung.name,
            "feasible": self.feasible,
            "rungs": [
                {"name": rung.name, "metric": rung.metric, "seconds": round(rung.seconds, 3), "notes": rung.notes}
                for rung in self.rungs
            ],
            "baseline": self.baseline,
            "floor": self.floor,
            "test": self.test,
            "baseline_test": self.baseline_test,
            "skipped": self.skipped,
        }


def quantize(
    task: Task,
    options: QuantizationOptions | None = None,
    quantization: QuantizationConfig | None = None,
    *,
    stage: Callable[[str], None] = lambda text: None,
    progress: Callable[[float, str], None] = lambda fraction, text: None,
) -> QuantizationResult:
    """Quantize a task's model.

    Args:
        task: Model, data and metric.
        options: What is quantized, and how far it may go.
        quantization: How ranges of activations are set.
        stage: Called with what begins.
        progress: Called with the fraction of a rung done and a layer's name.

    Raises:
        ConfigError: No layer can be int8, a layer to skip is unknown, or there are no data.
        CompressionError: Calibration saw nothing but zeros, or values that are not finite.
    """
    options, quantization = options or QuantizationOptions(), quantization or QuantizationConfig()
    # In bfloat16 as much would be lost as int8 loses.
    dtype = torch.float32
    example = task.example_inputs(2)
    model = in_fast_layout(rewrite(task.network()), example)
    inventory = take_inventory(model, example, int8_lstm=options.int8_lstm)
    policy, skipped = _policy(inventory, options.skip)
    inputs = first_samples(task.calibration(_BATCH))
    baseline = metric_of(model, task, task.validation(_BATCH), dtype)
    # Sums of rounded figures may be off by less than any sample counts.
    floor = baseline - options.max_drop - 1e-9
    rungs = run_stages(
        apply_policy(model, policy, CompressionContext(example, quantization=quantization)),
        inputs,
        lambda made: metric_of(made, task, task.validation(_BATCH), dtype),
        floor,
        steps=options.steps,
        stage=stage,
        progress=progress,
    )
    rung = best_stage(rungs, floor)
    return QuantizationResult(
        rung=rung,
        rungs=tuple(rungs),
        policy=policy,
        baseline=baseline,
        floor=floor,
        test=metric_of(rung.model, task, task.test(_BATCH), dtype),
        baseline_test=metric_of(model, task, task.test(_BATCH), dtype),
        quantization=quantization,
        skipped=skipped,
    )


def write_quantized(result: QuantizationResult, task: Task, engine: str, to: Path) -> None:
    """Write ``policy.json``, ``weights.safetensors``, ``model.onnx`` and ``quantize.json`` into a new directory.

    Args:
        result: What is written.
        task: Gives example inputs and calibration data.
        engine: Whose rules Q/DQ in the ONNX file follows.
        to: The directory.

    Raises:
        ConfigError: `to` cannot be written.
        ExportError: The model cannot be exported.
    """
    ranges = ranges_for(engine, result.model, task.calibration(_BATCH), result.quantization)
    dense = write_model(result.model, result.policy, task.example_inputs(1), engine, to, ranges=ranges)
    write_json(to / "quantize.json", {**result.to_dict(), "engine": engine, "dense_in_engine": dense})


def _policy(inventory: Inventory, skip: tuple[str, ...]) -> tuple[CompressionPolicy, dict[str, str]]:
    """Return the policy, and why other layers are not int8."""
    skipped = {
        name: inventory.skipped.get(f"{name} (int8, low rank)", "it is no plain convolution or linear layer")
        for name, layer in inventory.layers.items()
        if not layer.quantizable
    }
    for name in skip:
        if name not in inventory.layers:
            raise ConfigError(f"There is no layer {name!r} to skip.{nearest(name, inventory.layers)}")
        skipped[name] = "it was to be left out"
    wanted = [name for name, layer in inventory.layers.items() if layer.quantizable and name not in skip]
    if not wanted:
        raise ConfigError(
            "No layer can be int8: the model has no plain convolution or linear layer that is not skipped."
        )
    return CompressionPolicy(layers=dict.fromkeys(wanted, LayerPolicy("int8"))), skipped
