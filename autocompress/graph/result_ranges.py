"""Ranges of what int8 convolutions give, for engines that compute one in int8 only between two pairs of Q/DQ.

Layers simulate int8 of what they read; what they give is rounded in addition where a reader is in another dtype, as a
sum is (`roundings` simulates that). The range is that of the graph's tensor: behind the batch-norm that an export folds
into the convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autocompress.compress.calibration import calibration
from autocompress.compress.quantization import ActivationQuantizer, QuantizationRange, quantized_layers
from autocompress.config import QuantizationConfig
from autocompress.errors import CompressionError
from autocompress.model.channel_tracing import CONVOLUTIONS

# Smaller steps cannot be inverted in fp32: what a layer of zero weights gives is zero but for rounding.
_LEAST = 1e-30


class ResultRange(NamedTuple):
    """Quantization of one layer's result.

    Attributes:
        whole: Of all its values.
        rectified: Of its positive values, unsigned: of what a ReLU leaves.
    """

    whole: QuantizationRange
    rectified: QuantizationRange


def result_ranges(
    model: nn.Module, inputs: Tensor, norms: Mapping[str, str], quantization: QuantizationConfig
) -> dict[str, ResultRange]:
    """Return the range of every int8 convolution's result; those that give nothing but zeros are left out.

    Args:
        model: Calibrated, in eval mode; not changed.
        inputs: Calibration inputs ``(N, ...)``.
        norms: Layer, or what it was factorized from, to the batch-norm that is folded into it.
        quantization: How ranges are set.
    """
    method = calibration(quantization)
    seen = {
        name: (ActivationQuantizer(method), ActivationQuantizer(method))
        for name, layer in quantized_layers(model)
        if isinstance(layer, CONVOLUTIONS)
    }
    if not seen:
        return {}
    with ExitStack() as hooks, torch.no_grad():
        for name, (whole, rectified) in seen.items():
            whole.mode = rectified.mode = "observe"

            layer, scale, shift = ending(model, name, norms)

            def look(
                _: nn.Module,
                __: object,
                output: Tensor,
                whole: ActivationQuantizer = whole,
                rectified: ActivationQuantizer = rectified,
                scale: Tensor = scale,
                shift: Tensor = shift,
            ) -> None:
                result = output * scale + shift
                whole(result)
                rectified(result.clamp_min(0))

            hooks.callback(layer.register_forward_hook(look).remove)
        model(inputs)
    return {name: found for name, pair in seen.items() if (found := _range(name, *pair)) is not None}


def ending(model: nn.Module, name: str, norms: Mapping[str, str]) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the convolution that gives a layer's result, and what a norm that is folded into it makes of that.

    A norm may hold the activation behind it, so that what it gives is not the convolution's result in the graph.

    Returns:
        The layer, and the factor and shift of each channel, to be broadcast over ``(N, C, ...)``.
    """
    layer, norm = model.get_submodule(name), norms.get(name)
    parent, _, child = name.rpartition(".")
    if norm is None and parent in norms:
        # Of the factors of a layer the last one takes the norm up.
        factors = model.get_submodule(parent)
        if isinstance(factors, nn.Sequential) and child == str(len(factors) - 1):
            norm = norms[parent]
    found = None if norm is None else model.get_submodule(norm)
    if not isinstance(found, nn.modules.batchnorm._BatchNorm) or found.running_mean is None:
        return layer, torch.ones(1), torch.zeros(1)
    assert found.running_var is not None
    scale = torch.rsqrt(found.running_var.double() + found.eps)
    scale = scale * found.weight.detach() if found.affine else scale
    shift = -found.running_mean.double() * scale
    shift = shift + found.bias.detach() if found.affine else shift
    assert isinstance(layer, CONVOLUTIONS)
    shape = (-1, *[1] * (layer.weight.ndim - 2))
    return layer, scale.float().view(shape), shift.float().view(shape)


def _range(name: str, whole: ActivationQuantizer, rectified: ActivationQuantizer) -> ResultRange | None:
    try:
        whole.finish(name)
    except CompressionError:
        return None
    found = whole.range()
    if found.scale < _LEAST:
        return None
    try:
        rectified.finish(name)
    except CompressionError:
        # Nothing is positive: a ReLU leaves zeros, which any step holds.
        return ResultRange(found, QuantizationRange(found.scale, signed=False))
    return ResultRange(found, rectified.range())
