"""LSQ: int8 steps trained with the weights, those of activations and those of weights.

A step's gradient is that of the rounded value, straight through the rounding, scaled so that steps move as fast as
weights do (Esser et al., ICLR 2020). Exporters take a weight's step from the largest magnitude of its output channel:
so a step may only shrink below that, and in the end weights are cut off where the largest code ends, which leaves the
learned step as the one that is exported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.catalogue import Method
from autocompress.compress.quantization import quantized_layers

METHOD = Method(
    "lsq",
    "recovery",
    "quantization-aware training whose int8 steps are learned, too",
    "Esser et al., Learned step size quantization, ICLR 2020",
)
# Steps stay within this factor of what they were calibrated to.
_FURTHEST = 4.0


def learn_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Have the int8 layers of a calibrated `model` compute with steps that `optimizer` trains, without weight decay.

    After every step of the optimizer the model's `scale` buffers are what was learned. `settle` ends it.
    """
    layers = [layer for _, layer in quantized_layers(model)]
    given = [_Step.of(layer.input_quantizer.scale) for layer in layers]
    weights = [_Step.of(layer.largest_step()) for layer in layers]
    for layer, one, other in zip(layers, given, weights, strict=True):
        layer.input_quantizer.learned, layer.learned = one.value, other.value
    optimizer.add_param_group({"params": [step.value for step in (*given, *weights)], "weight_decay": 0.0})

    @torch.no_grad()
    def bound(*_: Any) -> None:
        for layer, one, other in zip(layers, given, weights, strict=True):
            one.value.clamp_(one.lowest, one.highest)
            layer.input_quantizer.scale.copy_(one.value)
            other.value.copy_(torch.minimum(other.value.clamp(other.lowest), layer.largest_step()))

    optimizer.register_step_post_hook(bound)


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Leave a model that computes the same without learned steps; one that has none is left as it is."""
    for _, layer in quantized_layers(model):
        if layer.learned is not None:
            most = 127 * layer.learned.view(-1, *[1] * (layer.weight.ndim - 1))
            layer.weight.copy_(layer.weight.clamp(-most, most))
        layer.input_quantizer.learned = layer.learned = None


@dataclass(frozen=True)
class _Step:
    """Steps that are learned, and the bounds that hold whatever the weights become."""

    value: Tensor
    lowest: Tensor
    highest: Tensor

    @classmethod
    def of(cls, start: Tensor) -> _Step:
        start = start.detach()
        return cls(start.clone().requires_grad_(), start / _FURTHEST, start * _FURTHEST)
