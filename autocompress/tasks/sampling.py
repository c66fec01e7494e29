"""Which samples stand for all: stratified random orders and samples, and how many tell a difference of accuracy.

Owns indices and statistics only; reads no data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

# Share of samples on which a compressed network and its original are not both right or both wrong, beyond those that
# it lost. Quantized and pruned networks within a few points of the original disagree with it on 3 to 10 % of samples.
_DISAGREEMENT = 0.1
# Fewer than this many do not rank candidates, however large a loss is allowed; a first look takes as many.
_LEAST_SAMPLES = 1024
# Where a dataset keeps its class numbers: torchvision's, and what is named after them.
_LABEL_ATTRIBUTES = ("targets", "labels", "_labels")
_FILE_ATTRIBUTES = ("samples", "imgs", "_samples")


def stratified_order(count: int, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return a random permutation of ``range(count)`` every prefix of which holds the classes in their proportions.

    Args:
        count: Number of samples.
        labels: Class numbers ``(count,)``, or None for a plain random permutation.
        generator: What the order depends on.
    """
    order = torch.randperm(count, generator=generator)
    if labels is None or count == 0:
        return order
    places = torch.rand(count, generator=generator, dtype=torch.float64)
    _, classes, sizes = torch.unique(labels[order], return_inverse=True, return_counts=True)
    grouped = torch.argsort(classes, stable=True)
    rank = torch.arange(count) - (sizes.cumsum(0) - sizes)[classes[grouped]]
    # The k-th of a class of n comes somewhere in the k-th n-th of the whole.
    place = (rank + places) / sizes[classes[grouped]]
    return order[grouped[torch.argsort(place, stable=True)]]


def covering_prefix(order: Tensor, labels: Tensor | None, size: int) -> Tensor:
    """Return `size` samples of an order, its first ones except that every class is there if `size` allows.

    Args:
        order: Indices into the data ``(n,)``, from `stratified_order` or a part of it.
        labels: Class numbers of all data, or None.
        size: How many; all of them when there are fewer.
    """
    if labels is None or size >= len(order):
        return order[:size]
    seen = labels[order].numpy()
    _, first = np.unique(seen, return_index=True)
    if len(first) > size:
        return order[:size]
    chosen = np.zeros(len(seen), dtype=bool)
    chosen[first] = True
    chosen[np.flatnonzero(~chosen)[: size - len(first)]] = True
    return order[torch.from_numpy(chosen)]


def listed_labels(dataset: object) -> Tensor | None:
    """Return the class numbers ``(len(dataset),)`` that a dataset lists without reading its samples, or None.

    Knows `targets`, `labels` and `samples` as torchvision's datasets have them, tensors, subsets, concatenations and
    plain lists of pairs.
    """
    if isinstance(dataset, Subset):
        inner = listed_labels(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(list(dataset.indices), dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        known = [part for part in map(listed_labels, dataset.datasets) if part is not None]
        return torch.cat(known) if len(known) == len(dataset.datasets) else None
    if isinstance(dataset, TensorDataset):
        return _class_numbers(dataset.tensors[1], dataset) if len(dataset.tensors) > 1 else None
    if isinstance(dataset, (list, tuple)):
        return _class_numbers(_second(dataset), dataset)
    values = [_read(dataset, attribute) for attribute in _LABEL_ATTRIBUTES]
    values += [_second(_read(dataset, attribute)) for attribute in _FILE_ATTRIBUTES]
    known = [labels for labels in (_class_numbers(value, dataset) for value in values) if labels is not None]
    return known[0] if known else None


def changes_labels(dataset: object) -> bool:
    """Return whether a dataset gives other labels than it lists, by a transform of its own."""
    if isinstance(dataset, Subset):
        return changes_labels(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return any(changes_labels(part) for part in dataset.datasets)
    return _read(dataset, "target_transform") is not None


def _read(dataset: object, attribute: str) -> object:
    try:
        return getattr(dataset, attribute, None)
    except Exception:  # noqa: BLE001 - a property of the user's that cannot be read lists nothing
        return None


def _second(pairs: object) -> object:
    if not isinstance(pairs, Sequence) or isinstance(pairs, str) or not pairs:
        return None
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        return None
    return [pair[1] for pair in pairs]


def _class_numbers(values: object, dataset: object) -> Tensor | None:
    if not isinstance(values, (Tensor, np.ndarray, list, tuple)):
        return None
    try:
        listed = isinstance(values, (list, tuple))
        array = np.asarray([v.item() if isinstance(v, Tensor) else v for v in values] if listed else values)
        if array.shape != (len(cast(Sequence[Any], dataset)),) or array.dtype.kind not in "iu":
            return None
        return torch.from_numpy(array.astype(np.int64))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None  # words, or lists of unequal length: nothing to stratify by


def class_numbers(targets: Tensor) -> Tensor | None:
    """Return targets that are one class per sample ``(N,)``, else None."""
    whole = targets.ndim == 1 and not targets.is_floating_point() and targets.dtype != torch.bool
    return targets.long() if whole else None


def samples_for(max_drop: float | None) -> int | None:
    """Return how many samples tell whether a network lost more than `max_drop`, or None where no loss is limited.

    Both networks are scored on the same samples, so only those on which one is right and the other wrong make noise:
    with a share q of these, the standard error of the difference over n samples is at most sqrt(q / n). It is to be
    half of `max_drop`. The baseline's accuracy is not needed.

    Args:
        max_drop: Largest loss allowed, a fraction.
    """
    if max_drop is None:
        return None
    error = max(max_drop, 1e-6) / 2
    return max(_LEAST_SAMPLES, math.ceil(_disagreement(max_drop) / error**2 - 1e-6))


def standard_error(count: int, max_drop: float | None = None) -> float:
    """Return the standard error of a difference of two networks' accuracies on the same `count` samples, a fraction."""
    return math.sqrt(_disagreement(max_drop or 0.0) / max(1, count))


def _disagreement(max_drop: float) -> float:
    return min(1.0, max(_DISAGREEMENT, 2 * max_drop))
