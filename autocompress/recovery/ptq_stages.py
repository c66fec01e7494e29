"""Post-training quantization as a ladder: what costs least first, and no further than the metric needs.

Rungs: nearest rounding with bias correction; the same after cross-layer equalization; AdaRound on top of the better of
the two. Nothing is trained on labels.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from autocompress.compress.quantization import calibrate, quantized_layers
from autocompress.errors import CompressionError
from autocompress.recovery.adaround import STEPS
from autocompress.recovery.bias_correction import FloatOutputs, correct
from autocompress.recovery.equalization import equalize

RUNGS = ("bias_correction", "equalization", "adaround")
_BATCH = 256


@dataclass(frozen=True)
class PtqStage:
    """One rung that was tried.

    Attributes:
        name: One of `RUNGS`.
        model: In eval mode, calibrated.
        metric: What it scored; higher is better.
        seconds: Wall time of making and scoring it.
        notes: Layer to why it was left out.
    """

    name: str
    model: nn.Module
    metric: float
    seconds: float
    notes: dict[str, str] = field(default_factory=dict)


def run_stages(
    model: nn.Module,
    inputs: Tensor,
    score: Callable[[nn.Module], float],
    floor: float = math.inf,
    *,
    steps: int = STEPS,
    deadline: float = math.inf,
    stage: Callable[[str], None] = lambda text: None,
    progress: Callable[[float, str], None] = lambda fraction, text: None,
) -> list[PtqStage]:
    """Climb until a rung scores `floor`; return the rungs tried, in order. `best_stage` chooses among them.

    Args:
        model: With int8 layers, weights not rounded, in eval mode; not changed.
        inputs: Calibration inputs ``(N, ...)``.
        score: The metric of a model on validation data.
        floor: The metric that is good enough.
        steps: Of AdaRound, for each layer.
        deadline: `time.monotonic()` after which no rung is begun but the first, and no layer's rounding is learned.
        stage: Called with what begins.
        progress: Called with the fraction of a rung done and a layer's name.

    Raises:
        CompressionError: The model has no int8 layer, a weight is not finite, or calibration saw nothing but zeros or
            values that are not finite.
    """
    if not any(True for _ in quantized_layers(model)):
        raise CompressionError("The model has no int8 layer, so there is nothing to quantize.")
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise CompressionError(
                f"{name!r} holds NaN or infinite values, so the model cannot be quantized; check the weights that the "
                "task loads."
            )
    rungs: list[PtqStage] = []
    # Before any correction, and what comes out of each rung's preparation.
    plain = _calibrated(copy.deepcopy(model), inputs)
    equalized: nn.Module | None = None
    for name in RUNGS:
        if rungs and time.monotonic() >= deadline:
            break
        stage(f"Quantizing: {name.replace('_', ' ')}")
        started = time.monotonic()
        notes: dict[str, str] = {}
        made = copy.deepcopy(plain)
        if name == "equalization":
            done, notes = equalize(made, inputs)
            if not done:
                rungs.append(replace(rungs[0], name=name, seconds=time.monotonic() - started, notes=notes))
                continue
            equalized = copy.deepcopy(_calibrated(made, inputs))
        elif name == "adaround" and equalized is not None and rungs[1].metric > rungs[0].metric:
            made = copy.deepcopy(equalized)
        wanted = FloatOutputs.of(made, inputs)
        learned = steps if name == "adaround" else 0
        notes |= correct(made, inputs, wanted, steps=learned, deadline=deadline, progress=progress)
        metric = score(made)
        rungs.append(PtqStage(name, made, metric, time.monotonic() - started, notes))
        if metric >= floor:
            break
    return rungs


def best_stage(rungs: list[PtqStage], floor: float) -> PtqStage:
    """Return the first rung that scored `floor`, else the best; of equals, the first."""
    enough = [rung for rung in rungs if rung.metric >= floor]
    return enough[0] if enough else max(rungs, key=lambda rung: rung.metric)


def _calibrated(model: nn.Module, inputs: Tensor) -> nn.Module:
    calibrate(model, torch.split(inputs, _BATCH))
    return model
