"""Which keys of dict samples are inputs of the model, of what shape and dtype, and how long.

Found once, from the training samples and the model's `forward`; `named_samples` reads every sample by it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.errors import ConfigError
from autocompress.tasks.adapters import Adapter, InputSpec
from autocompress.tasks.named_samples import (
    Layout,
    NamedInput,
    is_batch_of_one,
    is_ids,
    is_text,
    split_sample,
    value_of,
)
from autocompress.tasks.sample_forms import TOKENS_NEEDED, SampleError, numbers
from autocompress.tasks.samples import read_raw
from autocompress.tasks.sources import dataset_name

LENGTHS_SEEN = 1000  # training samples whose lengths are looked at
_SHARE = 95  # percentile of their lengths
_SHOWN = 8  # parameters of forward in a sentence
_TOKENS = "input_ids"  # the argument that takes token numbers, in transformers
_MULTIPLE = 8  # of tokens: rows of such a size suit vector units


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
        if length is not None:
            raise ConfigError(
                f"length={length}: the model is an Adapter, whose InputSpecs say the length. Leave it out."
            )
        parts = tuple(NamedInput(s.name, s, len(s.shape) == 1 and s.dtype != "float32") for s in model.inputs)
        return Layout(inputs=parts, labelled=labelled), model
    network = model.model if isinstance(model, Adapter) else model
    keep = model.keep if isinstance(model, Adapter) else ()
    parameters = _Parameters(network)
    chosen = _choose(inputs, parameters, type(network).__name__, notes)
    only = next(iter(chosen)) if len(chosen) == 1 else None
    if only is not None and not _is_packed(inputs[only], only, parameters):
        layout = Layout(key=only, labelled=labelled)
        return layout, _outputs_named(network, None, layout.read(first)[0], keep=keep, notes=notes)
    layout = Layout(
        inputs=_inputs(dataset, chosen, inputs, length=length, labelled=labelled, filler=_filler(network), notes=notes),
        labelled=labelled,
    )
    packed = layout.read(first)[0]
    try:
        wrapped = _outputs_named(network, layout.specs, packed, keep=keep, notes=notes)
    except ConfigError:
        if only is None:
            raise
        plain = Layout(key=only, labelled=labelled)  # integers that are no indices: features of a table
        try:
            return plain, _outputs_named(network, None, plain.read(first)[0], keep=keep, notes=notes)
        except ConfigError:
            pass
        raise
    return layout, wrapped


class _Parameters:
    """Names that a network's forward takes."""

    def __init__(self, network: nn.Module) -> None:
        known = list(inspect.signature(network.forward).parameters.values())
        self.names = [p.name for p in known if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.needed = [p.name for p in known if p.name in self.names and p.default is p.empty]
        self.any = any(p.kind == p.VAR_KEYWORD for p in known)


def _choose(inputs: Mapping[Any, Any], parameters: _Parameters, network: str, notes: list[str]) -> dict[Any, str]:
    """Return the keys that are inputs with the parameters they go to, in the order of `forward`."""
    text = [key for key, value in inputs.items() if is_text(value)]
    numeric = [key for key, value in inputs.items() if key not in text and numbers(value) is not None]
    shown = [*parameters.names[:_SHOWN], *(["…"] if len(parameters.names) > _SHOWN else [])]
    takes = f"{network}.forward takes {', '.join(shown) or 'none by name'}"
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
    if not chosen and inputs and not numeric:
        kinds = ", ".join(f"{key!r} ({type(value).__name__})" for key, value in inputs.items())
        raise SampleError(
            f" has {kinds}, which is no tensor. Add a transform that makes tensors, or give to_input=, a function from "
            "a sample to (input tensor, class number)."
        )
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


def _is_packed(value: object, key: Any, parameters: _Parameters) -> bool:
    """Return whether a sample's only input needs its name or its own dtype to reach the model."""
    tensor = numbers(value)
    whole = tensor is not None and not tensor.is_floating_point() and tensor.dtype != torch.uint8
    return whole or (key in parameters.names[1:])


def _outputs_named(
    network: nn.Module,
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
            outputs = Adapter(network, specs, keep).output_specs(inputs.unsqueeze(0))
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
    dataset: Any,
    chosen: Mapping[Any, str],
    first: Mapping[Any, Any],
    *,
    length: int | None,
    labelled: bool,
    filler: int,
    notes: list[str],
) -> tuple[NamedInput, ...]:
    """Return shape and dtype of each input, from up to `LENGTHS_SEEN` training samples; token numbers get `filler`."""
    firsts = {key: value_of(first, key) for key in chosen}
    dtypes: dict[Any, set[str]] = {key: set() for key in chosen}
    seen: dict[Any, list[int]] = {key: [] for key, value in firsts.items() if is_ids(value)}
    for values in _spread(dataset, chosen, labelled):
        for key, value in values.items():
            dtypes[key].add(_dtype(value))
            if key in seen and is_ids(value):
                seen[key].append(len(value))
            else:
                seen.pop(key, None)
        if all(value.is_floating_point() or value.ndim > 1 for value in firsts.values()):
            break  # neither lengths nor dtypes vary
    single = [str(key) for key in chosen if is_batch_of_one(numbers(first[key]))]  # type: ignore[arg-type]
    if single:
        notes.append(f"{', '.join(single)} of each sample have a first axis of 1, which is taken off.")
    sizes = _lengths(seen, length, filler, notes)
    parts = []
    for key, name in chosen.items():
        shape = (sizes[key],) if key in sizes else tuple(firsts[key].shape)
        dtype = next(kind for kind in ("float32", "int64", "bool") if kind in dtypes[key])
        spec = InputSpec(name, shape, dtype)
        own = filler if name == _TOKENS else 0
        parts.append(NamedInput(key, spec, key in sizes, scaled=_is_image(firsts[key]), filler=own))
    padded = [part for part in parts if part.fitted]
    if padded and not any(part.spec.dtype == "bool" or "mask" in part.spec.name for part in parts):
        notes.append(
            f"no mask is among the inputs: the model sees the {'zeros' if filler == 0 else 'numbers'} that "
            f"{', '.join(p.spec.name for p in padded)} are padded with."
        )
    return tuple(parts)


def _filler(network: nn.Module) -> int:
    """Return the number that a network takes for no token, by its configuration or its largest table; 0 for none."""
    named = getattr(getattr(network, "config", None), "pad_token_id", None)
    tables = [m for m in network.modules() if isinstance(m, nn.Embedding) and m.padding_idx is not None]
    largest = max(tables, key=lambda table: table.num_embeddings, default=None)
    found = named if isinstance(named, int) else getattr(largest, "padding_idx", None)
    return 0 if found is None else int(found)


def _lengths(seen: Mapping[Any, list[int]], length: int | None, filler: int, notes: list[str]) -> dict[Any, int]:
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
        padding = "with 0 at the end" if filler == 0 else f"at the end ({_TOKENS} with {filler}, others with 0)"
        notes.append(
            f"{', '.join(map(str, keys))} of {len(lengths):,} training samples are {lengths.min()} to {lengths.max()} "
            f"long; all are made {size} long ({reason}): shorter ones padded {padding}"
            + (f", longer ones cut ({100 * cut:.3g} %)." if cut else ".")
        )
    return sizes


def _dtype(value: Tensor) -> str:
    if value.is_floating_point() or _is_image(value):
        return "float32"
    return "bool" if value.dtype == torch.bool else "int64"


def _is_image(value: Tensor) -> bool:
    return value.dtype == torch.uint8 and value.ndim > 2


def _spread(dataset: Any, keys: Iterable[Any], labelled: bool) -> Iterator[dict[Any, Tensor]]:
    """Yield the inputs of samples from all over the data, the first one first."""
    places = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), LENGTHS_SEEN)).round().astype(int))
    for index in places.tolist():
        try:
            sample = read_raw(dataset, index)
        except ConfigError:  # named when it is due
            continue
        try:
            found = split_sample(sample, labelled)
            if found is not None:
                yield {key: value_of(found[0], key) for key in keys}
        except SampleError as error:
            raise ConfigError(f"Dataset {dataset_name(dataset)}: sample {index}{error}") from error
