"""Uniform symmetric levels: integers times one scale."""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.catalogue import Method
from autocompress.storage.quantizers.base import MAX_BITS, Levels, StorageQuantizer

METHOD = Method(
    name="uniform",
    family="storage",
    summary="Symmetric integer codes times one scale, for storage alone",
    source="Jacob et al., Quantization and training of neural networks, CVPR 2018",
)


class Uniform(StorageQuantizer):
    """Codes in ``[-(2^(b-1) - 1), 2^(b-1) - 1]`` times the largest magnitude over the largest code."""

    method = METHOD
    BITS = range(2, MAX_BITS + 1)

    def _fit(self, values: Tensor, weight_bits: int) -> Levels:
        top = 2 ** (weight_bits - 1) - 1
        return on_grid(values, self._scale(float(values.abs().max()), top), -top, top)

    def _scale(self, largest: float, top: int) -> float:
        return largest / top if largest > 0 else 1.0


def on_grid(values: Tensor, scale: float, low: int, high: int) -> Levels:
    """Round values ``(n,)`` to `scale` times an integer in ``[low, high]``; halves go to the even one."""
    codes, indices = torch.unique((values / scale).round().clamp(low, high), return_inverse=True)
    return Levels(codes * scale + 0.0, indices)  # + 0.0: no level is minus zero
