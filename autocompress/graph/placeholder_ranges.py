"""Ranges of int8 layers where nothing is calibrated because latency alone is asked for.

Latency does not depend on a scale. It does on the sign: engines fuse a ReLU into a quantized layer only where the codes
behind it are unsigned (VGG-11 all in int8 on ONNX Runtime: 0.18 of the dense network's latency, with signed ones 1.6).
"""

from __future__ import annotations

from collections.abc import Container
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from autocompress.compress.quantization import QuantizationRange, quantized_layers
from autocompress.graph.builder import Ranges
from autocompress.graph.result_ranges import ResultRange
from autocompress.model.channel_tracing import CONVOLUTIONS

_SCALE = 0.05
_RESULT = ResultRange(QuantizationRange(_SCALE, signed=True), QuantizationRange(_SCALE, signed=False))


class AssumedRanges:
    """Say of every int8 layer's input whether it has negative values, as calibration would find.

    Args:
        base: The uncompressed model; it is run once.
        inputs: For it, ``(N, ...)``.
        layers: Names of its layers; what has another name is a factor of one.
    """

    def __init__(self, base: nn.Module, inputs: Tensor, layers: Container[str]) -> None:
        self._layers = layers
        self._unsigned = _never_negative(base, inputs)

    def __call__(self, model: nn.Module) -> Ranges:
        """Return ranges for each int8 layer of a compressed form of the model."""
        names = [name for name, _ in quantized_layers(model)]
        return Ranges({n: QuantizationRange(_SCALE, self._signed(n)) for n in names}, dict.fromkeys(names, _RESULT))

    def _signed(self, name: str) -> bool:
        if name in self._layers:
            return name not in self._unsigned
        # Of a layer's factors the first reads what the whole layer read, the others what factors give.
        layer, _, place = name.rpartition(".")
        return place != "0" or layer not in self._unsigned


def _never_negative(model: nn.Module, inputs: Tensor) -> set[str]:
    """Return the convolutions and linear layers whose input has no negative value, as behind a ReLU."""
    lowest: dict[str, float] = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, (*CONVOLUTIONS, nn.Linear)):

                def look(module: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                    # Of one that is called by keyword nothing is seen, and signed codes hold any value.
                    if given:
                        lowest[name] = min(lowest.get(name, 0.0), float(given[0].min()))

                stack.callback(module.register_forward_pre_hook(look).remove)
        with torch.no_grad():
            model.eval()(inputs)
    return {name for name, value in lowest.items() if value >= 0}
