"""Uniform asymmetric levels: integers less a zero point, times one scale."""

from __future__ import annotations

from torch import Tensor

from autocompress.catalogue import Method
from autocompress.storage.quantizers.base import MAX_BITS, Levels, StorageQuantizer
from autocompress.storage.quantizers.uniform import on_grid

METHOD = Method(
    name="asymmetric",
    family="storage",
    summary="Integer codes less a zero point, times one scale; none lie beyond the weights",
    source="Jacob et al., Quantization and training of neural networks, CVPR 2018",
)


class Asymmetric(StorageQuantizer):
    """``2^b`` codes from the least weight, or zero, to the largest, or zero; zero is one of the levels."""

    method = METHOD
    BITS = range(1, MAX_BITS + 1)

    def _fit(self, values: Tensor, weight_bits: int) -> Levels:
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
        top = 2**weight_bits - 1
        scale = (high - low) / top if high > low else 1.0
        zero = round(-low / scale)
        return on_grid(values, scale, -zero, top - zero)
