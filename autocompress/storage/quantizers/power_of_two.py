"""Powers of two: weights that multiply by a shift."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autocompress.catalogue import Method
from autocompress.storage.quantizers.base import MAX_BITS, Levels, StorageQuantizer

METHOD = Method(
    name="power-of-two",
    family="storage",
    summary="Zero and powers of two of either sign, dense near zero",
    source="Zhou et al., Incremental network quantization, ICLR 2017",
)


class PowerOfTwo(StorageQuantizer):
    """Zero and ``2^(b-1) - 1`` powers of two of either sign, from the largest magnitude's own downwards.

    The greatest is the power nearest to the largest magnitude by the paper's rule, ``floor(log2(4/3 * max))``. A value
    takes the nearest level.
    """

    method = METHOD
    SCALED = False
    BITS = range(2, MAX_BITS + 1)

    def _fit(self, values: Tensor, weight_bits: int) -> Levels:
        largest = float(values.abs().max())
        greatest = math.floor(math.log2(4 / 3 * largest)) if largest > 0 else 0
        powers = torch.exp2(greatest - torch.arange(2 ** (weight_bits - 1) - 1, dtype=torch.float64)).float()
        return Levels.nearest(torch.cat([-powers, torch.zeros(1), powers]), values)
