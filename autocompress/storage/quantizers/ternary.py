"""Ternary weights: minus, zero or plus one times a scale of the tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.catalogue import Method
from autocompress.storage.quantizers.base import Levels, StorageQuantizer

METHOD = Method(
    name="ternary",
    family="storage",
    summary="Minus, zero or plus the mean magnitude of the larger weights of the tensor",
    source="Li & Liu, Ternary weight networks, 2016",
)

# Of the mean magnitude: near the best threshold for normal and uniform weights (section 2.2 of the paper).
_THRESHOLD = 0.7


class Ternary(StorageQuantizer):
    """Magnitudes of at most 0.7 of the mean become zero, the others their mean with their sign."""

    method = METHOD
    BITS = range(2, 3)

    def _fit(self, values: Tensor, weight_bits: int) -> Levels:
        magnitudes = values.double().abs()
        large = magnitudes > _THRESHOLD * magnitudes.mean()
        scale = float(magnitudes[large].mean()) if bool(large.any()) else 0.0
        return Levels(torch.tensor([-scale, 0.0, scale]), (large * values.sign()).long() + 1)
