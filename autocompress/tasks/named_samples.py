"""Dict samples: which key is the class, which are inputs of the model, of what shape and dtype, and how long.

A layout is found once, from the training samples and the model's `forward`, and turns every dict sample into the one
input that the rest of the package knows: the tensor of its only key, or all inputs packed for an `Adapter`.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from autocompress.errors import ConfigError
from autocompress.tasks.adapters import Adapter, InputSpec, pack
from autocompress.tasks.sample_forms import (
    LABEL_KEYS,
    TOKENS_NEEDED,
    SampleError,
    class_number,
    described,
    label_key,
    numbers,
)
from autocompress.tasks.sources import Columns, dataset_name

LENGTHS_SEEN = 1000  # training samples whose lengths are looked at
_SHARE = 95  # percentile of their lengths
_MULTIPLE = 8  # of tokens: rows of such a size suit vector units


@dataclass(frozen=True)
class NamedInput:
    """One input of the model, and where it comes from.

    Attributes:
        key: Of the dict sample.
        spec: Name, shape and dtype of the model's argument.
        fitted: Whether samples are padded with 0 or cut at the end to its length.
        scaled: Whether it is an 8-bit image, divided by 255.
    """

    key: Any
    spec: InputSpec
    fitted: bool = False
    scaled: bool = False


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
            return _value(inputs, self.key), target
        # One number of a sample is a row of one in the packed tensor.
        rows = [replace(spec, shape=spec.shape or (1,)) for spec in self.specs]
        fitted = {part.spec.name: _fit(_value(inputs, part.key), part) for part in self.inputs}
        return pack({row.name: fitted[row.name].reshape(1, *row.shape) for row in rows}, rows)[0], target


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
        rows, columns = self.dataset, getattr(self.dataset, "column_names", None)
        if isinstance(rows, (list, tuple)):
            return [class_number(split_sample(row, True)[1]) for row in rows]  # type: ignore[index]
        if isinstance(rows, Columns):
            return [class_number(label) for label in rows.columns[label_key(rows.columns)]]
        key = label_key(dict.fromkeys(columns)) if isinstance(columns, (list, tuple)) else None
        return None if key is None else [class_number(label) for label in rows[key]]  # a Hugging Face dataset


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


def find_layout(
    model: nn.Module, dataset: Any, first: Any, *, length: int | None, labelled: bool, notes: list[str]
) -> tuple[Layout, nn.Module]:
    """Return how dict samples are read, and the model that takes what comes of them.

    Args:
        model: Trained network; not changed. An `Adapter` with inputs says by itself what it takes.
        dataset: Training data, map-style.
        first: Its first sample.
        length: Of inputs whose length varies; None takes it from the data.
        labelled: Whether samples have a class.
        notes: Gets sentences for the user.

    Raises:
        SampleError: The first sample has no input for the model.
        ConfigError: The model lacks an input or does not take what there is.
    """
    inputs, _ = split_sample(first, labelled) or ({}, None)
    if isinstance(model, Adapter) and model.inputs is not None:
        parts = tuple(NamedInput(s.name, s, len(s.shape) == 1 and s.dtype != "float32") for s in model.inputs)
        return Layout(inputs=parts, labelled=labelled), model
    network = model.model if isinstance(model, Adapter) else model
    keep = model.keep if isinstance(model, Adapter) else ()
    parameters = _Parameters(network)
    chosen = _choose(inputs, parameters, type(network).__name__, notes)
    trial = copy.deepcopy(network).cpu().eval()
    only = next(iter(chosen)) if len(chosen) == 1 else None
    if only is not None and not _is_packed(inputs[only], only, parameters):
        layout = Layout(key=only, labelled=labelled)
        return layout, _outputs_named(network, trial, None, layout.read(first)[0], keep=keep, notes=notes)
    layout = Layout(inputs=_inputs(dataset, chosen, length, labelled, notes), labelled=labelled)
    packed = layout.read(first)[0]
    try:
        wrapped = _outputs_named(network, trial, layout.specs, packed, keep=keep, notes=notes)
    except ConfigError:
        if only is None:
            raise
        plain = Layout(key=only, labelled=labelled)  # integers that are no indices: features of a table
        try:
            return plain, _outputs_named(network, trial, None, plain.read(first)[0], keep=keep, notes=notes)
        except ConfigError:
            pass
        raise
    return layout, wrapped


class _Parameters:
    """Names that a network's forward takes."""

    def __init__(self, network: nn.Module) -> None:
        inner = getattr(network, "_orig_mod", network)  # torch.compile's
        inner = inner.module if isinstance(inner, nn.DataParallel) else inner
        known = list(inspect.signature(inner.forward).parameters.values())
        self.names = [p.name for p in known if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.needed = [p.name for p in known if p.name in self.names and p.default is p.empty]
        self.any = any(p.kind == p.VAR_KEYWORD for p in known)


def _choose(inputs: Mapping[Any, Any], parameters: _Parameters, network: str, notes: list[str]) -> dict[Any, str]:
    """Return the keys that are inputs with the parameters they go to, in the order of `forward`."""
    text = [key for key, value in inputs.items() if _is_text(value)]
    numeric = [key for key, value in inputs.items() if key not in text and numbers(value) is not None]
    takes = f"{network}.forward takes {', '.join(parameters.names) or 'none by name'}"
    tensors = [key for key in numeric if numbers(inputs[key]).ndim > 0]  # type: ignore[union-attr]
    if len(numeric) == 1 and (len(inputs) == 1 or (tensors and numeric[0] not in parameters.names)):
        # The only input there is goes to the first argument, whatever it is called.
        name = numeric[0] if numeric[0] in parameters.names else next(iter(parameters.names), str(numeric[0]))
        chosen = {numeric[0]: name}
    else:
        chosen = {name: name for name in parameters.names if name in numeric}
        if parameters.any and not parameters.needed:
            chosen |= {key: str(key) for key in tensors if key not in chosen}
        if not chosen and len(tensors) == 1 and parameters.names:
            chosen = {tensors[0]: parameters.names[0]}
    if not chosen and text:
        raise SampleError(f": {', '.join(map(repr, text))} is text: {TOKENS_NEEDED}.")
    if not chosen:
        kinds = ", ".join(f"{key!r} ({type(value).__name__})" for key, value in inputs.items()) or "no inputs"
        raise SampleError(
            f" has {kinds}, none of them an input of numbers that the model takes: {takes}. Rename the keys, or give "
            "to_input=, a function from a sample to ({name: tensor}, class number)."
        )
    lacking = [name for name in parameters.needed if name not in chosen.values()]
    if lacking:
        hint = f" ({', '.join(map(repr, text))} is text: {TOKENS_NEEDED})" if text else ""
        raise SampleError(
            f" has no {', '.join(map(repr, lacking))}, but {takes}; the sample's keys are "
            f"{', '.join(map(repr, inputs))}{hint}. Add it to the samples, or give to_input=."
        )
    dropped = [key for key in inputs if key not in chosen]
    if dropped:
        notes.append(
            f"inputs {', '.join(map(str, chosen))} of the samples are used; {', '.join(map(repr, dropped))} left out: "
            f"{takes}."
        )
    return chosen


def _is_text(value: object) -> bool:
    return isinstance(value, (str, bytes)) or (
        isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], (str, bytes))
    )


def _is_packed(value: object, key: Any, parameters: _Parameters) -> bool:
    """Return whether a sample's only input needs its name or its own dtype to reach the model."""
    tensor = numbers(value)
    whole = tensor is not None and not tensor.is_floating_point() and tensor.dtype != torch.uint8
    return whole or (key in parameters.names[1:])


def _outputs_named(
    network: nn.Module,
    trial: nn.Module,
    specs: Sequence[InputSpec] | None,
    sample: Tensor,
    *,
    keep: Sequence[str],
    notes: list[str],
) -> nn.Module:
    """Return the network, in an `Adapter` where its inputs or outputs need one.

    Raises:
        ConfigError: It does not run.
    """
    inputs = sample.float() / (255 if sample.dtype == torch.uint8 else 1)
    takes = ", ".join(f"{s.name} (N, {', '.join(map(str, s.shape))}) of {s.dtype}" for s in specs or ())
    try:
        with torch.no_grad():
            outputs = Adapter(trial, specs, keep).output_specs(inputs.unsqueeze(0))
    except Exception as error:  # whatever the user's network raises
        raise ConfigError(
            f"model {type(network).__name__} does not take {takes or f'inputs {(1, *sample.shape)}'}: "
            f"{type(error).__name__}: {error}"
        ) from error
    kept = tuple(keep) or (("logits",) if any(output.name == "logits" for output in outputs) else ())
    if specs is None and not kept:
        return network
    name = type(network).__name__
    called = f"it is called with {takes}" if specs else "it is called as before"
    notes.append(
        f"model {name} is wrapped in autocompress.tasks.Adapter: {called}"
        + (f", and its output {', '.join(kept)} is kept." if kept else ".")
    )
    return Adapter(network, specs, kept)


def _inputs(
    dataset: Any, chosen: Mapping[Any, str], length: int | None, labelled: bool, notes: list[str]
) -> tuple[NamedInput, ...]:
    """Return shape and dtype of each input, from up to `LENGTHS_SEEN` training samples."""
    values: dict[Any, list[Tensor]] = {key: [] for key in chosen}
    for sample in _spread(dataset, labelled):
        for key in chosen:
            values[key].append(_value(sample, key))
        if all(not _is_ids(column[0]) for column in values.values()):
            break  # neither lengths nor dtypes vary
    lengths = {key: [len(v) for v in column] for key, column in values.items() if all(map(_is_ids, column))}
    sizes = _lengths(lengths, length, notes)
    parts = []
    for key, name in chosen.items():
        column, fitted = values[key], key in sizes
        shape = (sizes[key],) if fitted else tuple(column[0].shape)
        scaled = column[0].dtype == torch.uint8 and column[0].ndim > 2
        kinds = {"float32" if scaled or v.is_floating_point() else "bool" if v.dtype == torch.bool else "int64"
                 for v in column}  # fmt: skip
        dtype = next(kind for kind in ("float32", "int64", "bool") if kind in kinds)
        parts.append(NamedInput(key, InputSpec(name, shape, dtype), fitted, scaled))
    padded = [part for part in parts if part.fitted]
    if padded and not any(part.spec.dtype == "bool" or "mask" in part.spec.name for part in parts):
        notes.append(
            f"no mask is among the inputs: the model sees the zeros that {', '.join(p.spec.name for p in padded)} are "
            "padded with."
        )
    return tuple(parts)


def _lengths(seen: Mapping[Any, list[int]], length: int | None, notes: list[str]) -> dict[Any, int]:
    """Return the fixed length of each input that needs one."""
    varying = [key for key, lengths in seen.items() if len(set(lengths)) > 1]
    if length is not None:
        # Without a varying one: the first input of token numbers, and what is as long as it in every sample.
        first = varying[0] if varying else next(iter(seen), None)
        if first is None:
            raise ConfigError(f"length={length}: the samples have no input of token numbers (n,) to give this length.")
        varying = [key for key in seen if key in varying or seen[key] == seen[first]]
    sizes = {}
    for key in varying:
        lengths = np.asarray(seen[key])
        usual = int(np.percentile(lengths, _SHARE, method="higher"))
        sizes[key] = length or max(1, min(int(lengths.max()), _MULTIPLE * math.ceil(usual / _MULTIPLE)))
    for size in sorted(set(sizes.values())):
        keys = [key for key in sizes if sizes[key] == size]
        lengths = np.asarray(seen[keys[0]])
        cut = float((lengths > size).mean())
        reason = (
            "as length= says" if length is not None else f"their {_SHARE}th percentile rounded up; length= fixes it"
        )
        notes.append(
            f"{', '.join(map(str, keys))} of {len(lengths):,} training samples are {lengths.min()} to {lengths.max()} "
            f"long; all are made {size} long ({reason}): shorter ones padded with 0 at the end, longer ones cut "
            f"({100 * cut:.3g} %)."
        )
    return sizes


def _spread(dataset: Any, labelled: bool) -> Iterator[Mapping[Any, Any]]:
    """Yield the inputs of samples from all over the data, the first one first."""
    places = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), LENGTHS_SEEN)).round().astype(int))
    for index in places.tolist():
        try:
            found = split_sample(dataset[index], labelled)
        except SampleError as error:
            raise ConfigError(f"Dataset {dataset_name(dataset)}: sample {index}{error}") from error
        except ConfigError:
            raise
        except Exception:  # noqa: BLE001 - a sample that cannot be read is named when it is due
            continue
        if found is not None:
            yield found[0]


def _is_ids(value: Tensor) -> bool:
    return value.ndim == 1 and not value.is_floating_point()


def _value(inputs: Mapping[Any, Any], key: Any) -> Tensor:
    value = inputs.get(key)
    if value is None:
        raise SampleError(f" has no {key!r}, as the first one has; found {', '.join(map(repr, inputs))}.")
    tensor = numbers(value)
    if tensor is None:
        mend = TOKENS_NEEDED if _is_text(value) else "give numbers, or to_input="
        raise SampleError(f": {key!r} is no numbers, but {type(value).__name__}: {mend}.")
    return tensor


def _fit(value: Tensor, part: NamedInput) -> Tensor:
    """Return one input in its shape."""
    if part.fitted and value.ndim == 1:
        (size,) = part.spec.shape
        value = value[:size]
        return nn.functional.pad(value, (0, size - len(value))) if len(value) < size else value
    if tuple(value.shape) != part.spec.shape:
        mend = " length= pads and cuts token numbers to one length." if _is_ids(value) else " Make them of one shape."
        raise SampleError(f": {part.key!r} is {tuple(value.shape)}, but {part.spec.shape} elsewhere.{mend}")
    return value / 255 if part.scaled else value
