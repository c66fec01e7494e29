"""Validation data laid out for many candidates, and a first look at one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.errors import ConfigError
from autocompress.tasks.base import Batch, Task
from autocompress.units import format_bytes

REFERENCE_SAMPLES = 32
_BATCH = 256
# Inputs lie on disk, for the worker to map, and outputs in memory; beyond this fewer samples are used.
_MOST_BYTES = 2**30
# A first look takes this many samples, in parts; Student's 99.5 % quantile of as many parts.
_GLANCE, _GLANCE_BYTES, _PARTS = 1024, 2**26, 8
_STUDENT, _LEAST_SPREAD = 3.5, 0.2


@dataclass(frozen=True)
class Glance:
    """What a candidate is like at first sight: its metric on some validation samples, in torch.

    Attributes:
        accuracy: Mean over parts of the samples.
        high: Upper end of its 99 % interval, by how the parts differ.
    """

    accuracy: float
    high: float


@dataclass(frozen=True)
class ValidationData:
    """Validation inputs on disk and targets in memory.

    Attributes:
        inputs: ``.npy`` file of float32 inputs ``(n, ...)``.
        targets: ``(n, ...)``.
        reference: The first `REFERENCE_SAMPLES` inputs.
    """

    inputs: Path
    targets: Tensor
    reference: Tensor


def write_validation(task: Task, path: Path, limit: int, output_bytes: int) -> ValidationData:
    """Write a task's validation inputs to a ``.npy`` file.

    Args:
        task: Gives the data.
        path: The file.
        limit: Samples at most.
        output_bytes: What a network gives for one sample: this may be more than what it takes.

    Raises:
        ConfigError: There are none, or they cannot be written.
    """
    inputs, targets, count = [], [], 0
    for x, y in task.validation(_BATCH):
        limit = min(limit, _MOST_BYTES // max(1, x[0].nbytes, output_bytes))
        inputs.append(x[: limit - count].float().numpy())
        targets.append(y[: limit - count])
        count += len(inputs[-1])
        if count >= limit:
            break
    if count == 0:
        raise ConfigError(f"Task {task.name!r} has no validation data.")
    array = np.concatenate(inputs)
    try:
        with path.open("wb") as file:
            np.save(file, array, allow_pickle=False)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ConfigError(
            f"Cannot write {path} ({format_bytes(array.nbytes)}): {error.strerror or error}. Free some space, "
            "choose another --out, or lower validation_limit."
        ) from error
    return ValidationData(path, torch.cat(targets), torch.from_numpy(array[:REFERENCE_SAMPLES].copy()))


def glance(
    model: nn.Module, data: ValidationData, metric: Callable[[Tensor, Tensor], float], dtype: torch.dtype
) -> Glance:
    """Return what a compressed model gets right of the first validation samples.

    Args:
        model: In eval mode.
        data: Of the task.
        metric: Of outputs and targets; higher is better.
        dtype: What the forward passes run in.
    """
    stored = np.load(data.inputs, mmap_mode="r", allow_pickle=False)
    most = max(_PARTS, _GLANCE_BYTES // max(1, stored[0].nbytes))
    count = min(len(stored), len(data.targets), _GLANCE, most)
    size = max(1, count // _PARTS)
    found = []
    for start in range(0, count - size + 1, size):
        part = slice(start, start + size)
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            outputs = model(torch.from_numpy(stored[part].copy())).float()
        found.append(metric(outputs, data.targets[part]))
    middle = fmean(found)
    if len(found) < 2 or not math.isfinite(middle):
        return Glance(middle, math.inf)
    # Where all parts agree they may yet be wrong, as a dozen correct answers in a row are.
    spread = max(stdev(found), (0.25 / size) ** 0.5 * _LEAST_SPREAD) / len(found) ** 0.5
    return Glance(middle, middle + _STUDENT * spread)


def metric_of(model: nn.Module, task: Task, batches: Iterable[Batch], dtype: torch.dtype) -> float:
    """Return a task's metric of a model on some of its data, in torch.

    Args:
        model: In eval mode.
        task: Whose metric it is.
        batches: Inputs and targets ``(N, ...)``.
        dtype: What the forward passes run in.

    Raises:
        ConfigError: There are no data.
    """
    outputs, targets = [], []
    for inputs, target in batches:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            outputs.append(model(inputs).float())
        targets.append(target)
    if not outputs:
        raise ConfigError(f"Task {task.name!r} has no data to score a model on.")
    return task.metric(torch.cat(outputs), torch.cat(targets))
