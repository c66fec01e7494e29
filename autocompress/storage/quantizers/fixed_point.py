"""Fixed point: integers times a power of two, which a machine without floating point can multiply by a shift."""

from __future__ import annotations

import math

from torch import Tensor

from autocompress.catalogue import Method
from autocompress.storage.quantizers.base import MAX_BITS, Levels, StorageQuantizer
from autocompress.storage.quantizers.uniform import on_grid

METHOD = Method(
    name="fixed-point",
    family="storage",
    summary="Two's-complement codes times a power of two",
    source="Courbariaux, Bengio & David, Training deep neural networks with low precision multiplications, 2015",
)


class FixedPoint(StorageQuantizer):
    """Two's-complement codes of `weight_bits` times the least power of two that loses no magnitude."""

    method = METHOD
    BITS = range(2, MAX_BITS + 1)

    def _fit(self, values: Tensor, weight_bits: int) -> Levels:
        top = 2 ** (weight_bits - 1)
        largest = float(values.abs().max())
        exponent = math.ceil(math.log2(largest / (top - 1))) if largest > 0 else 0
        return on_grid(values, 2.0**exponent, -top, top - 1)
