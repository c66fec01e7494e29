"""Validation data laid out for many candidates, and a first look at one of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.errors import ConfigError, TaskError
from autocompress.tasks.array_file import ArrayFile, reorder_rows
from autocompress.tasks.base import Batch, Task
from autocompress.tasks.label_free import LabelFreeTask
from autocompress.tasks.reading import read_batches
from autocompress.tasks.samples import seeded
from autocompress.tasks.sampling import class_numbers, samples_for, standard_error, stratified_order
from autocompress.tasks.split import SplitTask

REFERENCE_SAMPLES = 32
_BATCH, _LEAST_BATCH, _READ_BYTES = 256, 8, 2**24
# How long a task that cannot be asked for a random part of its data is read for.
_READ_SECONDS = 60.0
# Inputs lie on disk, for the worker to map, and outputs in memory; beyond this fewer samples are used.
_MOST_BYTES = 2**30
# A first look takes this many samples, in parts; Student's 99.5 % quantile of as many parts.
_GLANCE, _GLANCE_BYTES, _PARTS = 1024, 2**26, 8
_STUDENT, _LEAST_SPREAD = 3.5, 0.2


@dataclass(frozen=True)
class ProxyEstimate:
    """What a candidate is like at first sight: its metric on some validation samples, in torch.

    Attributes:
        accuracy: Mean over parts of the samples.
        high: Upper end of its 99 % interval, by how the parts differ.
    """

    accuracy: float
    high: float


@dataclass(frozen=True)
class ValidationData:
    """Validation inputs on disk and targets in memory, in a stratified random order: any first part stands for all.

    Attributes:
        inputs: ``.npy`` file of float32 inputs ``(n, ...)``.
        targets: ``(n, ...)``.
        reference: The first `REFERENCE_SAMPLES` inputs without NaN or infinity.
        total: Samples that the task has, or None where they were not all counted.
        standard_error: Of the difference of two networks' accuracies on these samples, a fraction; None where the
            metric is no share of samples.
        seen: Samples these were chosen from: `total`, or as many as there was time to read.
        max_drop: The loss they are to tell, a fraction, or None.
        bad, bad_name: How many hold NaN or infinity, and what the first of these is called.
    """

    inputs: Path
    targets: Tensor
    reference: Tensor
    total: int | None = None
    standard_error: float | None = None
    seen: int = 0
    max_drop: float | None = None
    bad: int = 0
    bad_name: str = ""

    @property
    def only_class(self) -> int | None:
        """The class that all of them are of, or None."""
        classes = class_numbers(self.targets)
        alone = classes is not None and len(classes) > 1 and bool((classes == classes[0]).all())
        return int(classes[0]) if classes is not None and alone else None

    def describe(self) -> str:
        """Return one line for the start of a run: ``"validated on 4,000 of 50,000 samples: ±0.5 pp"``."""
        count = len(self.targets)
        if self.total is None:
            of = f"{count:,} of the first {max(self.seen, count):,} samples (there was no time to read the rest)"
        else:
            of = f"all {count:,} samples" if count == self.total else f"{count:,} of {self.total:,} samples"
        text = f"validated on {of}"
        if self.standard_error is not None:
            text += f": ±{100 * self.standard_error:.2g} pp"
            if self.max_drop is not None and self.standard_error > self.max_drop:
                text += f", more than the {100 * self.max_drop:.2g} pp that may be lost"
        if self.only_class is not None:
            text += f"; all are of class {self.only_class}, so accuracy tells little"
        if self.bad:
            text += f"; {self.bad:,} of them hold NaN or infinity, such as {self.bad_name}"
        return text


def write_validation(
    task: Task,
    path: Path,
    limit: int,
    output_bytes: int,
    max_drop: float | None = None,
    *,
    seconds: float = _READ_SECONDS,
) -> ValidationData:
    """Write a stratified random sample of a task's validation inputs to a ``.npy`` file.

    A `SplitTask` yields its data in such an order. Any other task is read once, from end to end, and a random part of
    it is kept; so one that yields class after class is seen whole.

    Args:
        task: Gives the data.
        path: The file.
        limit: Samples at most.
        output_bytes: What a network gives for one sample: this may be more than what it takes.
        max_drop: The loss of accuracy to tell, a fraction: no more samples than that takes are used. None uses as
            many as `limit` allows.
        seconds: Reading of a task that is not a `SplitTask` ends after this long, once there are enough samples.

    Raises:
        ConfigError: There are none, a batch is not inputs with targets, or they cannot be written.
    """
    source = task._task if isinstance(task, LabelFreeTask) else task
    kept = _read(source, path, min(limit, samples_for(max_drop) or limit), output_bytes, seconds)
    targets, numbers = torch.stack(kept.targets), np.array(kept.numbers)
    if not _is_shuffled(source.source):
        order = stratified_order(len(targets), class_numbers(targets), seeded(0))
        reorder_rows(path, order.numpy())
        targets, numbers = targets[order], numbers[order.numpy()]
    stored = np.load(path, mmap_mode="r", allow_pickle=False)
    parts = [slice(start, start + _BATCH) for start in range(0, len(stored), _BATCH)]
    if isinstance(task, LabelFreeTask):
        batches = ((torch.from_numpy(stored[part].copy()), targets[part]) for part in parts)
        targets = torch.cat([answers for _, answers in task._answered(batches)])
    finite = np.concatenate([np.isfinite(stored[part]).reshape(len(stored[part]), -1).all(1) for part in parts])
    bad_name = ""
    if not finite.all():
        at = int(np.flatnonzero(~finite)[0])
        bad_name = f"validation sample {numbers[at]}"
        own = source.source
        if isinstance(own, SplitTask) and _is_shuffled(own):
            bad_name = own.sample_name("validation", at)
    # Forms of a model are compared on these, and NaN is unlike itself.
    first = np.flatnonzero(finite)[:REFERENCE_SAMPLES] if finite.any() else np.arange(len(stored))[:REFERENCE_SAMPLES]
    return ValidationData(
        path, targets, torch.from_numpy(stored[first]), kept.total,
        None if class_numbers(targets) is None else standard_error(len(targets), max_drop),
        kept.seen, max_drop, int((~finite).sum()), bad_name,
    )  # fmt: skip


@dataclass
class _Kept:
    """What was read of a task's validation data: targets and numbers of the rows in the file."""

    targets: list[Tensor]
    numbers: list[int]
    seen: int = 0
    total: int | None = None


def _is_shuffled(task: Task) -> bool:
    return isinstance(task, SplitTask) and type(task).validation is SplitTask.validation


def _read(task: Task, path: Path, wanted: int, output_bytes: int, seconds: float) -> _Kept:
    """Write `wanted` random samples to a file, or all there are, and return the rest of them."""
    shuffled, generator = _is_shuffled(task.source), np.random.default_rng(0)
    end = time.monotonic() + seconds
    kept = _Kept([], [])
    batch = max(_LEAST_BATCH, min(_BATCH, _READ_BYTES // max(1, task.example_inputs(1).nbytes)))
    with ArrayFile(path) as file:
        for inputs, targets in read_batches(task, "validation", batch):
            if not kept.seen:
                most = _MOST_BYTES // max(1, inputs[0].nbytes, targets[0].nbytes, output_bytes)
                wanted = max(1, min(wanted, most))
            rows = inputs.detach().float().numpy()
            new = min(len(rows), wanted - len(kept.targets))
            if new > 0:
                file.write(len(kept.targets), rows[:new])
                kept.targets += [target.clone() for target in targets[:new]]
                kept.numbers += range(kept.seen, kept.seen + new)
            # Algorithm R (Vitter, 1985): of a stream of unknown length every sample is kept with equal chance.
            for at in range(new, 0 if shuffled else len(rows)):
                place = int(generator.integers(kept.seen + at + 1))
                if place < wanted:
                    file.write(place, rows[at : at + 1])
                    kept.targets[place], kept.numbers[place] = targets[at].clone(), kept.seen + at
            kept.seen += len(rows)
            if len(kept.targets) >= wanted and (shuffled or time.monotonic() > end):
                break
        else:
            kept.total = kept.seen
        if not kept.targets:
            raise ConfigError(f"Task {task.name!r} has no validation data.")
    if shuffled and isinstance(task.source, SplitTask):
        kept.total = task.source.validation_size()
    return kept


def estimate_accuracy(
    model: nn.Module, data: ValidationData, metric: Callable[[Tensor, Tensor], float], dtype: torch.dtype
) -> ProxyEstimate:
    """Return what a compressed model gets right of the first validation samples, which stand for all of them.

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
        try:
            found.append(metric(outputs, data.targets[part]))
        except TaskError:
            # What ranks classes may not be defined on a part of the samples: all of them decide.
            return ProxyEstimate(math.nan, math.inf)
    middle = fmean(found)
    if len(found) < 2 or not math.isfinite(middle):
        return ProxyEstimate(middle, math.inf)
    # Where all parts agree they may yet be wrong, as a dozen correct answers in a row are.
    spread = max(stdev(found), (0.25 / size) ** 0.5 * _LEAST_SPREAD) / len(found) ** 0.5
    return ProxyEstimate(middle, middle + _STUDENT * spread)


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
