"""From what a user gives as model and data to a model and `Samples` that go together, with what was done said.

Owns the order of the steps; `sources` owns containers, `named_layout` dict samples, `samples` batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from autocompress.errors import ConfigError
from autocompress.tasks.named_layout import find_layout
from autocompress.tasks.named_samples import Layout, NamedDataset
from autocompress.tasks.sample_forms import SampleError
from autocompress.tasks.samples import DatasetSamples, Normalization, Samples, TensorSamples, read_raw
from autocompress.tasks.sources import Sources, ToInput, dataset_name, length_of


@dataclass(frozen=True)
class Opened:
    """A model with its data.

    Attributes:
        model: As given, or in an `Adapter` that takes what dict samples become.
        train: Training samples.
        test: Test samples.
        validation: Validation samples; None where they are to be split off the training samples.
        notes: Sentences about what was wrapped, left out, padded or chosen.
    """

    model: nn.Module
    train: Samples
    test: Samples
    validation: Samples | None
    notes: tuple[str, ...]


class Unlabelled(Dataset[Any]):
    """Inputs without labels as a dataset of ``(input, 0)``; samples of other kinds are passed on."""

    def __init__(self, inputs: Any) -> None:
        self._inputs, self.given_name = inputs, dataset_name(inputs)
        self.targets = None if isinstance(read_raw(inputs, 0), (tuple, list)) else [0] * len(inputs)

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> Any:
        sample = self._inputs[index]
        return sample if isinstance(sample, (tuple, list, Mapping)) else (sample, 0)


def open_data(
    model: nn.Module,
    train: Any,
    test: Any,
    validation: Any,
    *,
    normalization: Normalization | None,
    workers: int,
    to_input: ToInput | None,
    length: int | None,
    labelled: bool,
) -> Opened:
    """Open the data sets of a task; arguments are those of `SplitTask`.

    Raises:
        ConfigError: Data cannot be used, or the model does not take them; names the data set.
    """
    if length is not None and length < 1:
        raise ConfigError(f"length {length} must be at least 1.")
    notes: list[str] = []
    sources = Sources(to_input, labelled, notes)
    opened: dict[str, Any] = {}
    firsts: dict[str, Any] = {}
    layout: Layout | None = None
    for split, data in (("train", train), ("validation", validation), ("test", test)):
        with _naming(split):
            if split == "validation" and data is None:
                data = sources.validation_of(train, test)  # noqa: PLW2901
                if data is None:
                    continue
            opened[split] = data if isinstance(data, Samples) else sources.open(data, split)
            firsts[split] = first = _first(opened[split])
            if layout is None and _is_named(first):
                layout, model = _laid_out(model, opened[split], first, length=length, labelled=labelled, notes=notes)
    if length is not None and layout is None:
        raise ConfigError(f"length={length} is for token numbers of dict samples; these data are no dict samples.")
    samples: dict[str, Samples] = {}
    for split, data in opened.items():
        with _naming(split):
            if layout is not None and _is_named(firsts[split]):
                samples[split] = _samples(NamedDataset(data, layout), split, normalization, workers)
            elif not labelled and firsts[split] is not None:
                samples[split] = _samples(Unlabelled(data), split, normalization, workers)
            else:
                samples[split] = _samples(data, split, normalization, workers)
    return Opened(model, samples["train"], samples["test"], samples.get("validation"), tuple(dict.fromkeys(notes)))


@contextmanager
def _naming(split: str) -> Iterator[None]:
    """Say which data set an error is of."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{split} data: {error}") from error


def _first(data: Any) -> Any:
    """Return the first sample, or None where data are no samples one by one."""
    if isinstance(data, Samples) or _is_arrays(data) or not length_of(data):
        return None
    return read_raw(data, 0)


def _is_arrays(data: Any) -> bool:
    return isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], (Tensor, np.ndarray))


def _is_named(sample: Any) -> bool:
    """Return whether a sample is a dict, or a dict and a class."""
    return isinstance(sample, Mapping) or (
        isinstance(sample, (tuple, list)) and len(sample) == 2 and isinstance(sample[0], Mapping)
    )


def _laid_out(
    model: nn.Module, data: Any, first: Any, *, length: int | None, labelled: bool, notes: list[str]
) -> tuple[Layout, nn.Module]:
    try:
        return find_layout(model, data, first, length=length, labelled=labelled, notes=notes)
    except SampleError as error:
        raise ConfigError(f"Dataset {dataset_name(data)}: sample 0{error}") from error


def _samples(data: Any, split: str, normalization: Normalization | None, workers: int) -> Samples:
    if isinstance(data, Samples):
        return data
    if _is_arrays(data):
        return TensorSamples(data[0], data[1], normalization)
    return DatasetSamples(data, normalization, workers=workers, source=f"{split} data: ")
