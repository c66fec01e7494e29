"""Roundings that a graph makes beside those of its int8 layers' inputs, simulated in the torch model.

An engine that computes a layer in int8 only where its result is int8, too, or that lets a shortcut read what the first
layer of its block reads, rounds what no layer of the torch model knows to be rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from autocompress.compress.quantization import QuantizationRange
from autocompress.graph.result_ranges import ending
from autocompress.model.channel_tracing import CONVOLUTIONS

# Factors of a norm below this cannot be inverted in fp32.
_LEAST_FACTOR = 1e-30


@dataclass(frozen=True)
class Roundings:
    """What else a graph rounds, by layer.

    Attributes:
        results: How what a layer gives is rounded, and whether it is rectified first: a ReLU is all that reads it.
        shared: How what a layer reads is rounded for all that reads it, not this layer alone.
        biases: What rounding added to a layer's bias ``(out,)``, that of a batch-norm folded into it.
        norms: Layer to the batch-norm that is folded into it.
    """

    results: Mapping[str, tuple[QuantizationRange, bool]] = field(default_factory=dict)
    shared: Mapping[str, QuantizationRange] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def simulated(model: nn.Module, roundings: Roundings) -> Iterator[None]:
    """Have `model` round as its graph does within the block; for inference alone, and nothing stays on it after.

    Tensors that are shared are rounded in place, what the model is given perhaps among them.
    """
    with ExitStack() as hooks:
        for name in dict.fromkeys((*roundings.results, *roundings.biases)):
            hooks.callback(_round_result(model, name, roundings))
        for name, found in roundings.shared.items():
            hooks.callback(_round_shared(model.get_submodule(name), found))
        yield


def _round_result(model: nn.Module, name: str, roundings: Roundings) -> Callable[[], None]:
    layer, scale, shift = ending(model, name, roundings.norms)
    found, rectified = roundings.results.get(name, (None, False))
    # A channel whose norm gives the same whatever it is given: what rounding changes of that is lost.
    dead = scale.abs() < _LEAST_FACTOR
    factor = scale.where(~dead, 1.0)
    added = roundings.biases.get(name, torch.zeros(1))
    bias = shift + (added.view(-1, *[1] * (layer.weight.ndim - 2)) if isinstance(layer, CONVOLUTIONS) else added)

    def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
        result = output * scale + bias
        if rectified:
            result = result.clamp_min(0)
        if found is not None:
            result = found.rounded(result)
        # As the norm has to be given it to make that of it.
        return torch.where(dead, output, (result - shift) / factor).to(output.dtype)

    return layer.register_forward_hook(hook).remove


def _round_shared(module: nn.Module, found: QuantizationRange) -> Callable[[], None]:
    def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        given[0].copy_(found.rounded(given[0]))

    return module.register_forward_pre_hook(hook).remove
