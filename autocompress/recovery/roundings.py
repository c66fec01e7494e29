"""Roundings that a graph makes beside those of its int8 layers' inputs, simulated in the torch model.

An engine that computes a layer in int8 only where its result is int8, too, or that lets a shortcut read what the first
layer of its block reads, rounds what no layer of the torch model knows to be rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from autocompress.compress.quantization import ActivationRange
from autocompress.recovery.result_ranges import ending


@dataclass(frozen=True)
class Roundings:
    """What else a graph rounds, by layer.

    Attributes:
        results: How what a layer gives is rounded, and whether it is rectified first: a ReLU is all that reads it.
        shared: How what a layer reads is rounded for all that reads it, not this layer alone.
        norms: Layer to the batch-norm that is folded into it.
    """

    results: Mapping[str, tuple[ActivationRange, bool]] = field(default_factory=dict)
    shared: Mapping[str, ActivationRange] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def simulated(model: nn.Module, roundings: Roundings) -> Iterator[None]:
    """Have `model` round as its graph does within the block; for inference alone, and nothing stays on it after.

    Tensors that are shared are rounded in place, what the model is given perhaps among them.
    """
    with ExitStack() as hooks:
        for name, (found, rectified) in roundings.results.items():
            hooks.callback(_round_result(ending(model, name, roundings.norms), found, rectified=rectified))
        for name, found in roundings.shared.items():
            hooks.callback(_round_shared(model.get_submodule(name), found))
        yield


def _round_result(module: nn.Module, found: ActivationRange, *, rectified: bool) -> Callable[[], None]:
    def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return found.rounded(output.clamp_min(0) if rectified else output).to(output.dtype)

    return module.register_forward_hook(hook).remove


def _round_shared(module: nn.Module, found: ActivationRange) -> Callable[[], None]:
    def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        given[0].copy_(found.rounded(given[0]))

    return module.register_forward_pre_hook(hook).remove
