"""The Python face of single methods, without a search: `prune`, `quantize`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.api import settings
from autocompress.config import RunConfig
from autocompress.errors import ConfigError
from autocompress.files import check_new

if TYPE_CHECKING:
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
