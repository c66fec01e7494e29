"""Dict samples as the one input that the rest of the package knows, by a layout that `named_layout` finds.

That is the tensor of their only key, or all inputs packed for an `Adapter`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from autocompress.tasks.adapters import InputSpec, pack
from autocompress.tasks.sample_forms import (
    LABEL_KEYS,
    TOKENS_NEEDED,
    SampleError,
    class_number,
    described,
    label_key,
    numbers,
)
from autocompress.tasks.sampling import listed_labels
from autocompress.tasks.sources import Columns, dataset_name


@dataclass(frozen=True)
class NamedInput:
    """One input of the model, and where it comes from.

    Attributes:
        key: Of the dict sample.
        spec: Name, shape and dtype of the model's argument.
        fitted: Whether samples are padded or cut at the end to its length.
        scaled: Whether it is an 8-bit image, divided by 255.
        filler: What it is padded with.
    """

    key: Any
    spec: InputSpec
    fitted: bool = False
    scaled: bool = False
    filler: int = 0


@dataclass(frozen=True)
class Layout:
    """How dict samples become inputs.

    Attributes:
        key: Of the only input, taken as it is; None where there are `inputs`.
        inputs: Packed one behind the other.
        labelled: Whether samples have a class; else it is 0.
    """

    key: Any = None
    inputs: tuple[NamedInput, ...] = ()
    labelled: bool = True

    @property
    def specs(self) -> tuple[InputSpec, ...]:
        """What the packed input holds."""
        return tuple(part.spec for part in self.inputs)

    def read(self, sample: Any) -> tuple[Tensor, int]:
        """Return the input ``(...)`` and the class number of a sample.

        Raises:
            SampleError: An input is missing, of another shape, or no numbers.
        """
        named = split_sample(sample, self.labelled)
        if named is None:
            raise SampleError(f" must be a dict as the first one is, found {type(sample).__name__}.")
        inputs, label = named
        target = class_number(label) if self.labelled else 0
        if not self.inputs:
            return value_of(inputs, self.key), target
        rows = {part.spec.name: _fit(value_of(inputs, part.key), part).unsqueeze(0) for part in self.inputs}
        return pack(rows, self.specs)[0], target


class NamedDataset(Dataset[tuple[Tensor, int]]):
    """Dict samples as pairs of an input tensor and a class number.

    Args:
        dataset: Map-style, of dict samples or pairs of a dict and a class.
        layout: How they are read.
    """

    def __init__(self, dataset: Any, layout: Layout) -> None:
        self.dataset, self._layout = dataset, layout
        self.given_name = dataset_name(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._layout.read(self.dataset[index])

    @property
    def targets(self) -> list[int] | None:
        """Class numbers where they are in memory or in a column of their own, else None."""
        if not self._layout.labelled:
            return [0] * len(self)
        return _listed(self.dataset)


def _listed(rows: Any) -> list[int] | None:
    """Return the class numbers of dict samples where they need no reading, else None."""
    if isinstance(rows, Subset):
        inner = _listed(rows.dataset)
        return None if inner is None else [inner[index] for index in rows.indices]
    if isinstance(rows, (list, tuple)):
        return [class_number(split_sample(row, True)[1]) for row in rows]  # type: ignore[index]
    columns: Any = rows.columns if isinstance(rows, Columns) else getattr(rows, "column_names", None)
    if isinstance(columns, (Mapping, list, tuple)):  # the latter of a Hugging Face dataset
        key = label_key(dict.fromkeys(columns))
        values = None if key is None else columns[key] if isinstance(columns, Mapping) else rows[key]
        return None if values is None else [class_number(label) for label in values]
    labels = listed_labels(rows)
    return None if labels is None else labels.tolist()


def split_sample(sample: Any, labelled: bool) -> tuple[Mapping[Any, Any], Any] | None:
    """Return the inputs of a dict sample, or of a pair of a dict and a class, and its class; None for other samples.

    Raises:
        SampleError: The dict has no class.
    """
    if isinstance(sample, (tuple, list)) and len(sample) == 2 and isinstance(sample[0], Mapping):
        return {key: value for key, value in sample[0].items() if str(key).lower() not in LABEL_KEYS}, sample[1]
    if not isinstance(sample, Mapping):
        return None
    key = label_key(sample)
    if key is None and labelled:
        raise SampleError(f" must be (input tensor, class number), found {described(sample)}.")
    inputs = {name: value for name, value in sample.items() if str(name).lower() not in LABEL_KEYS}
    return inputs, None if key is None else sample[key]


def value_of(inputs: Mapping[Any, Any], key: Any) -> Tensor:
    """Return an input of a dict sample as a tensor.

    Raises:
        SampleError: It is missing or no numbers.
    """
    value = inputs.get(key)
    if value is None:
        raise SampleError(f" has no {key!r}, as the first one has; found {', '.join(map(repr, inputs))}.")
    tensor = numbers(value)
    if tensor is None:
        mend = TOKENS_NEEDED if is_text(value) else "give numbers, or to_input="
        raise SampleError(f": {key!r} is no numbers, but {type(value).__name__}: {mend}.")
    return tensor[0] if is_batch_of_one(tensor) else tensor


def _fit(value: Tensor, part: NamedInput) -> Tensor:
    """Return one input in its shape."""
    if part.spec.dtype != "float32" and value.is_floating_point() and bool((value != value.trunc()).any()):
        raise SampleError(
            f": {part.key!r} holds fractions, but whole numbers ({part.spec.dtype}) in the samples looked at first. "
            "Give floats in every sample."
        )
    if part.fitted and value.ndim == 1:
        (size,) = part.spec.shape
        value = value[:size]
        missing = size - len(value)
        return nn.functional.pad(value, (0, missing), value=part.filler) if missing > 0 else value
    if tuple(value.shape) != part.spec.shape:
        mend = " length= pads and cuts token numbers to one length." if is_ids(value) else " Make them of one shape."
        raise SampleError(f": {part.key!r} is {tuple(value.shape)}, but {part.spec.shape} elsewhere.{mend}")
    return value / 255 if part.scaled else value


def is_batch_of_one(value: Tensor) -> bool:
    """Return whether token numbers have a batch axis of their own, as tokenizers give them with return_tensors="pt"."""
    return value.ndim == 2 and len(value) == 1 and not value.is_floating_point() and value.dtype != torch.uint8


def is_ids(value: Tensor) -> bool:
    """Return whether a value may be token numbers or a mask ``(n,)``."""
    return value.ndim == 1 and not value.is_floating_point()


def is_text(value: object) -> bool:
    """Return whether a value is a text or several."""
    return isinstance(value, (str, bytes)) or (
        isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], (str, bytes))
    )
