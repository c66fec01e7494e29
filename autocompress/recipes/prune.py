"""Pruning without a search: one importance, one share of the model to go, in one step or in several.

For those who know how much they want gone, and for comparing methods. Nothing is measured on an engine; how fast the
result is, `autocompress benchmark` says of its ONNX file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autocompress.compress import check_importance, rewrite
from autocompress.compress.importance import DEFAULT_IMPORTANCE
from autocompress.compress.layout import in_fast_layout
from autocompress.compress.task_evidence import channel_scores
from autocompress.compress.thresholds import least_kept, policy_at_macs, threshold_policy
from autocompress.config import RecoveryConfig
from autocompress.errors import ConfigError
from autocompress.files import write_json
from autocompress.graph.builder import Ranges, write_model
from autocompress.model.inventory import Inventory, take_inventory
from autocompress.policy import CompressionPolicy
from autocompress.recovery import TrainingFreeCompressor, fast_dtype
from autocompress.recovery.budget import Budget
from autocompress.recovery.distillation import Teacher, taught_by
from autocompress.recovery.finetune import finetune
from autocompress.recovery.schedule import cumulative_ratios
from autocompress.tasks.base import Task
from autocompress.tasks.validation import metric_of

_BATCH = 256


@dataclass(frozen=True)
class PruningOptions:
    """What goes, and how.

    Attributes:
        importance: A key of `compress.IMPORTANCES`.
        ratio: Fraction of all channels REMOVED, in (0, 1); or
        macs: fraction of the multiply-accumulates LEFT, in (0, 1). One of the two.
        scope: ``"global"``, one threshold for all groups, or ``"layer"``, the same ratio for each.
        multiple: Kept channels are rounded to multiples of it.
        schedule: One of `recovery.schedule.SCHEDULES`.
        steps: Of the schedule; the importance is computed anew for each.
        epochs: Of distillation from the uncompressed model, shared out evenly over the steps; 0: weights are
            reconstructed and batch-norm is recalibrated, nothing is trained.
    """

    importance: str = DEFAULT_IMPORTANCE
    ratio: float | None = None
    macs: float | None = None
    scope: str = "global"
    multiple: int = 1
    schedule: str = "one_shot"
    steps: int = 5
    epochs: float = 0.0

    def __post_init__(self) -> None:
        check_importance(self.importance)
        if (self.ratio is None) == (self.macs is None):
            raise ConfigError("Say how much goes: either a ratio of the channels, or the multiply-accumulates left.")
        if self.epochs < 0:
            raise ConfigError(f"epochs is {self.epochs}; give 0 or more.")
        self.targets()

    def targets(self) -> tuple[float, ...]:
        """Return the fraction of channels, or of multiply-accumulates, that has gone after each step.

        Raises:
            ConfigError: A value is out of range.
        """
        removed = self.ratio if self.macs is None else 1 - self.macs
        assert removed is not None
        return cumulative_ratios(self.schedule, removed, self.steps)


@dataclass(frozen=True)
class PruningStep:
    """One step of a schedule.

    Attributes:
        channels, macs: Share of the uncompressed model's that is left.
        pruned: Metric on validation data once pruned and reconstructed.
        finetuned: The same after fine-tuning; None where there was none.
    """

    channels: float
    macs: float
    pruned: float
    finetuned: float | None


@dataclass(frozen=True)
class PruningResult:
    """A pruned model.

    Attributes:
        model: In eval mode.
        policy: What was pruned of the uncompressed model, all steps together.
        groups: Group name to its channels before and after.
        steps: In their order.
        baseline: Metric of the uncompressed model on validation data.
        test, baseline_test: The metric of both on test data.
        notes: Group name to what was done instead, where the importance says nothing of it.
        distilled: Where inner outputs were compared in fine-tuning, when they were.
    """

    model: nn.Module
    policy: CompressionPolicy
    groups: dict[str, tuple[int, int]]
    steps: tuple[PruningStep, ...]
    baseline: float
    test: float
    baseline_test: float
    notes: dict[str, str] = field(default_factory=dict)
    distilled: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without the model."""
        return {
            "policy": self.policy.to_dict(),
            "groups": {name: list(widths) for name, widths in self.groups.items()},
            "steps": [asdict(step) for step in self.steps],
            "baseline": self.baseline,
            "test": self.test,
            "baseline_test": self.baseline_test,
            "notes": self.notes,
            "distilled": list(self.distilled),
        }


def prune(
    task: Task,
    options: PruningOptions,
    recovery: RecoveryConfig | None = None,
    *,
    stage: Callable[[str], None] = lambda text: None,
    progress: Callable[[float, str], None] = lambda fraction, text: None,
) -> PruningResult:
    """Prune a task's model.

    Args:
        task: Model, data and metric.
        options: What goes, and how.
        recovery: Rates, temperature and alpha of the fine-tuning.
        stage: Called with what begins.
        progress: Called with the fraction of a fine-tuning done and a short text.

    Raises:
        ConfigError: So much cannot go, or nothing can be pruned.
        CompressionError: The importance lacks what it needs, or fine-tuning diverged.
    """
    inputs = task.example_inputs(2)
    model = in_fast_layout(rewrite(task.network()), inputs)
    dtype = fast_dtype(model, inputs)
    whole = inventory = take_inventory(model, inputs)
    uncompressed, baseline = model, metric_of(model, task, task.validation(_BATCH), dtype)
    recovery = recovery or RecoveryConfig()
    if options.epochs:
        taught_by(task.network(), model, task, recovery)
    teacher = Teacher(task.network(), dtype) if options.epochs else None
    targets = options.targets()
    notes: dict[str, str] = {}
    distilled: list[str] = []
    steps = []
    for number, target in enumerate(targets):
        stage(f"Step {number + 1} of {len(targets)}: {target:.0%} gone")
        scores = channel_scores(task, model, inventory, options.importance)
        notes |= scores.notes
        policy = _step_policy(options, scores, inventory, whole, target)
        model = TrainingFreeCompressor(model, inventory, scores, inputs, task.calibration(_BATCH)).model(policy)
        pruned = metric_of(model, task, task.validation(_BATCH), dtype)
        finetuned = None
        if teacher is not None:
            budget = Budget(options.epochs / len(targets), float("inf"))
            finetune(
                model, teacher, task, recovery, budget,
                progress=progress, first_epoch=number, on_message=distilled.append,
            )  # fmt: skip
            finetuned = metric_of(model, task, task.validation(_BATCH), dtype)
        inventory = take_inventory(model, inputs)
        left = sum(_widths(inventory, whole).values()) / sum(_widths(whole, whole).values())
        steps.append(PruningStep(left, inventory.macs / whole.macs, pruned, finetuned))
    after = _widths(inventory, whole)
    groups = {name: (group.channels, after[name]) for name, group in whole.groups.items()}
    return PruningResult(
        model=model,
        policy=CompressionPolicy(pruning={name: 1 - left / before for name, (before, left) in groups.items()}),
        groups=groups,
        steps=tuple(steps),
        baseline=baseline,
        test=metric_of(model, task, task.test(_BATCH), dtype),
        baseline_test=metric_of(uncompressed, task, task.test(_BATCH), dtype),
        notes=notes,
        distilled=tuple(dict.fromkeys(distilled)),
    )


def write_pruned(result: PruningResult, task: Task, to: Path) -> None:
    """Write ``policy.json``, ``weights.safetensors``, ``model.onnx`` and ``prune.json`` into a new directory.

    Raises:
        ConfigError: `to` cannot be written.
        ExportError: The model cannot be exported.
    """
    write_model(result.model, result.policy, task.example_inputs(1), "onnxruntime", to, ranges=Ranges())
    write_json(to / "prune.json", result.to_dict())


def _step_policy(
    options: PruningOptions, scores: dict[str, torch.Tensor], now: Inventory, whole: Inventory, target: float
) -> CompressionPolicy:
    """Return the policy that takes the model as it is now to `target` gone of the whole one."""
    # However small the steps, a group keeps what it keeps of the uncompressed model.
    least = {name: least_kept(group.channels) for name, group in whole.groups.items()}
    at = partial(threshold_policy, scores, now, scope=options.scope, least=least, multiple=options.multiple)
    if options.macs is not None:
        return policy_at_macs(now, min(1.0, (1 - target) * whole.macs / now.macs), at)
    widths = _widths(now, whole)
    movable = sum(widths[name] for name in now.groups)
    wanted = (1 - target) * sum(_widths(whole, whole).values()) - (sum(widths.values()) - movable)
    return at(max(0.0, 1 - wanted / max(1, movable)))


def _widths(now: Inventory, whole: Inventory) -> dict[str, int]:
    """Return what every group of the uncompressed model has left; one of a single channel is no group any more."""
    return {name: now.layers[name].out_channels // group.outputs_each(name) for name, group in whole.groups.items()}
