"""Batches of a task, read so that whatever goes wrong on the way names the data set and the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from autocompress.errors import AutoCompressError, ConfigError, TaskError
from autocompress.tasks.base import Batch, Task

# Samples, and bytes of them, that layers are fitted to: images of high resolution have many positions each.
_SAMPLES, _BYTES = 512, 2**26


def read_batches(task: Task, split: str, batch_size: int) -> Iterator[Batch]:
    """Yield the batches of a labelled data set of a task.

    Args:
        task: Gives the data.
        split: ``"validation"``, ``"test"`` or ``"train"`` (of the first epoch).
        batch_size: Samples of a batch.

    Raises:
        ConfigError: Reading raised, or a batch is not inputs ``(N, ...)`` with targets ``(N, ...)``.
    """
    where = f"Task {task.name!r}: {split} data"
    count = 0
    for batch in _named(where, lambda: _opened(task, split, batch_size)):
        inputs, targets = checked_batch(where, batch, count)
        if len(inputs):
            yield inputs, targets
        count += len(inputs)


def checked_batch(where: str, batch: object, count: int) -> Batch:
    """Return a batch as inputs and targets.

    Args:
        where: Whose it is, for messages.
        batch: As the user's iterator gave it.
        count: Samples that came before.

    Raises:
        TaskError: It is not inputs ``(N, ...)`` with targets ``(N, ...)``.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and batch[1] is None:
        batch = batch[0]
    if isinstance(batch, Tensor):
        raise TaskError(
            f"{where} have no labels: yield (inputs, targets). Without labels measure by the uncompressed model's "
            "own outputs: yield (inputs, torch.zeros(len(inputs))) and give --metric agreement (task.metric)."
        )
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(b, Tensor) for b in batch)):
        raise TaskError(
            f"{where}: a batch must be two tensors, inputs (N, ...) and targets (N, ...), found {kind_of(batch)}."
        )
    inputs, targets = batch
    if not inputs.ndim or len(inputs) != (len(targets) if targets.ndim else -1):
        raise TaskError(
            f"{where}: samples from {count} on have inputs {tuple(inputs.shape)} but targets "
            f"{tuple(targets.shape)}; both must have N rows."
        )
    return inputs, targets


def checked_inputs(where: str, inputs: object) -> Tensor:
    """Return a batch of inputs alone.

    Raises:
        TaskError: It is no tensor ``(N, ...)``.
    """
    if not isinstance(inputs, Tensor) or not inputs.ndim:
        raise TaskError(f"{where}: a batch must be one tensor (N, ...), found {kind_of(inputs)}.")
    return inputs


def read_calibration(task: Task, batch_size: int) -> Iterator[Tensor]:
    """Yield the calibration batches of a task.

    Raises:
        ConfigError: Reading raised, or a batch is no tensor ``(N, ...)``.
    """
    where = f"Task {task.name!r}: calibration data"
    for inputs in _named(where, lambda: task.calibration(batch_size)):
        if len(checked_inputs(where, inputs)):
            yield inputs


def _opened(task: Task, split: str, batch_size: int) -> Iterator[Batch]:
    if split == "train":
        return task.train_batches(batch_size, 0)
    return task.validation(batch_size) if split == "validation" else task.test(batch_size)


def _named(where: str, start: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """Yield what an iterator of the user's gives, and name the samples where it raises."""
    count = 0
    try:
        for batch in start():
            yield batch
            first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            count += len(first) if isinstance(first, Tensor) and first.ndim else 1
    except (AutoCompressError, GeneratorExit):
        raise
    except Exception as error:  # the user's code, or a damaged file
        raise ConfigError(
            f"{where}: reading on after {count} samples raised {type(error).__name__}: {error}. Repair what comes "
            "there, or leave it out."
        ) from error


def as_number(value: object) -> float | None:
    """Return what a user's method gives as a float, or None where it is none."""
    if value is None or isinstance(value, (str, bytes, complex)):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None


def kind_of(value: object) -> str:
    """Return what a value is, in a few words."""
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {', '.join(type(part).__name__ for part in value)}"
    if isinstance(value, dict):
        return f"{type(value).__name__} with keys {', '.join(map(repr, value))}"
    return type(value).__name__


def first_samples(batches: Iterable[Tensor]) -> Tensor:
    """Return the first samples of `batches`, as many as a fit takes.

    Raises:
        ConfigError: There are none, or all their values are the same.
    """
    taken: list[Tensor] = []
    count = 0
    for batch in batches:
        most = min(_SAMPLES, max(2, _BYTES // max(1, batch[0].nbytes)))
        taken.append(batch[: most - count])
        count += len(taken[-1])
        if count >= most:
            break
    if count == 0:
        raise ConfigError("The task gives no calibration data, which every candidate is made with.")
    samples = torch.cat(taken)
    if bool((samples == samples.flatten()[0]).all()):
        raise ConfigError(
            f"Every value of the task's calibration data is {samples.flatten()[0].item():g}, which says nothing of "
            "what the model will see; check how the data are read."
        )
    return samples
