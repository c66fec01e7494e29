"""The Python face of single methods, without a search: `prune`, `quantize`, `distill`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.api import settings
from autocompress.config import RunConfig
from autocompress.errors import ConfigError
from autocompress.files import check_new
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.limits import RequestLimits
from autocompress.measurement.protocol import Protocol
from autocompress.runs.deadline import Deadline

# What measuring teacher and student may take beyond --timeout before it is given up.
_OVERTIME_S = 60.0

if TYPE_CHECKING:
    from torch import nn

    from autocompress.recipes.distill import DistillationResult
    from autocompress.recipes.prune import PruningResult
    from autocompress.recipes.quantize import QuantizationResult
    from autocompress.runs.observer import Observer
    from autocompress.tasks import Task


def prune(
    task: Task | str | None = None,
    *,
    config: RunConfig | Path | str | None = None,
    to: Path | str | None = None,
    observer: Observer | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> PruningResult:
    """Prune a model by one importance, without a search, in one step or in several with fine-tuning between them.

    Args:
        task: A `Task`, or the name of one.
        config: A run file, or its contents: the task, `importance`, and `recovery` for the fine-tuning.
        to: New directory for policy, weights, ONNX file and figures; None writes nothing.
        observer: Receives progress.
        sets: ``"dotted.key=value"`` overrides of the run file.
        **options: Of `autocompress.recipes.prune.PruningOptions`: ``ratio=0.5, scope="global", schedule="gradual"``.

    Raises:
        ConfigError: An option cannot be used, so much cannot go, or `to` holds something.
        CompressionError: The importance lacks what it needs, or fine-tuning diverged.
    """
    from autocompress.recipes import prune as pruning
    from autocompress.runs.observer import Observer

    resolved, _ = settings.resolve(task, config, Path("unused"), resume=False, sets=sets, options={})
    try:
        named = {} if resolved.importance is None else {"importance": resolved.importance}
        wanted = pruning.PruningOptions(**{**named, **options})
    except TypeError as error:
        raise ConfigError(f"autocompress.prune: {error}.") from error
    if to is not None:
        check_new(Path(to))
    loaded, resolved = settings.subject(task, config, observer, sets, {})
    observer = observer or Observer()
    found = pruning.prune(loaded, wanted, resolved.recovery, stage=observer.stage, progress=observer.progress)
    if to is not None:
        pruning.write_pruned(found, loaded, Path(to))
    return found


def quantize(
    task: Task | str | None = None,
    *,
    config: RunConfig | Path | str | None = None,
    to: Path | str | None = None,
    skip: Sequence[str] = (),
    observer: Observer | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> QuantizationResult:
    """Set a model to int8 without training and without a search: corrected until it loses no more than it may.

    Args:
        task: A `Task`, or the name of one.
        config: A run file, or its contents: the task, `max_drop` (1pp unless it says so), `engine`, whose rules the
            ONNX file follows, and `quantization`.
        to: New directory for policy, weights, ONNX file and figures; None writes nothing.
        skip: Layers that stay as they are.
        observer: Receives progress.
        sets: ``"dotted.key=value"`` overrides of the run file.
        **options: Any key of `RunConfig`: ``max_drop="0.5pp", engine="onnxruntime"``.

    Returns:
        The first rung within the limit, else the best; `feasible` tells which.

    Raises:
        ConfigError: An option cannot be used, no layer can be int8, or `to` holds something.
        CompressionError: The calibration data say nothing.
    """
    from autocompress.graph.qdq_rules import RULES
    from autocompress.recipes import quantize as quantize_recipe
    from autocompress.runs.observer import Observer

    if to is not None:
        check_new(Path(to))
    loaded, resolved = settings.subject(task, config, observer, sets, options)
    wanted = quantize_recipe.QuantizationOptions(skip=tuple(skip), int8_lstm=RULES[resolved.engine].int8_lstm)
    if resolved.drop_limit is not None:
        wanted = replace(wanted, max_drop=resolved.drop_limit)
    observer = observer or Observer()
    found = quantize_recipe.quantize(
        loaded, wanted, resolved.quantization, stage=observer.stage, progress=observer.progress
    )
    if to is not None:
        quantize_recipe.write_quantized(found, loaded, resolved.engine, Path(to))
    return found


def distill(
    task: Task | str | None = None,
    student: nn.Module | str | None = None,
    *,
    config: RunConfig | Path | str | None = None,
    epochs: float | None = None,
    weights: Path | str | None = None,
    to: Path | str | None = None,
    resume: bool = False,
    protocol: Protocol | None = None,
    observer: Observer | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> DistillationResult:
    """Teach a smaller model of yours to be like a task's own, and measure both on the engine.

    Args:
        task: A `Task`, or the name of one; its model is the teacher.
        student: A model that takes and gives what the teacher does, which is not changed; or the name of one:
            ``"module:factory"``, ``"torchvision:resnet18"``, ``"timm:resnet10t"``, ``"resnet20"``.
        config: A run file, or its contents: engine, threads, batch size, dense dtype, and `recovery` for the training.
        epochs: Passes over the training data; by default those of `recovery`.
        weights: Safetensors file that a student known by name begins with.
        to: New directory for weights, ONNX file, engine and figures; None writes nothing.
        resume: Go on with an interrupted training in `to`.
        protocol: How long to measure.
        observer: Receives progress.
        sets: ``"dotted.key=value"`` overrides of the run file.
        **options: Any key of `RunConfig`: ``engine="onnxruntime"``.

    Raises:
        ConfigError: An option cannot be used, teacher and student do not fit each other, or `to` holds something.
        UnavailableError: The engine or its device is not here.
        EngineError: The student cannot be exported or built, or its training diverged.
    """
    from autocompress.recipes import distill as distill_recipe
    from autocompress.runs.observer import Observer
    from autocompress.tasks.students import load_student

    if student is None:
        raise ConfigError("Name the model to teach: --student module:factory, torchvision:MODEL, timm:MODEL, resnet20.")
    if resume and to is None:
        raise ConfigError("--resume needs --to, the directory of the training to go on with.")
    folder = None if to is None else Path(to)
    if folder is not None and not (resume and distill_recipe.begun(folder)):
        check_new(folder)
    observer = observer or Observer()
    loaded, resolved = settings.subject(task, config, observer, sets, options)
    if isinstance(student, str):
        classes = distill_recipe.width_of_outputs(loaded)
        student = load_student(student, resolved.task, classes, None if weights is None else str(weights))
    elif weights is not None:
        raise ConfigError("weights are for a student known by name; load them into the model that you pass.")
    by = Deadline.after(resolved.timeout_seconds).keeping(-_OVERTIME_S)
    with EngineWorker(limits=RequestLimits(by, share=1.0, build_s=resolved.build_seconds)) as worker:
        return distill_recipe.distill(
            loaded, student, resolved, worker, epochs=resolved.recovery.whole_epochs if epochs is None else epochs,
            to=folder, protocol=protocol, stage=observer.stage, progress=observer.progress,
        )  # fmt: skip
