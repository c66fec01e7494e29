"""Binary weights: a sign times the tensor's mean magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.catalogue import Method
from autocompress.storage.quantizers.base import Levels, StorageQuantizer

METHOD = Method(
    name="binary",
    family="storage",
    summary="Signs times the mean magnitude of the tensor, one bit a weight",
    source="Rastegari et al., XNOR-Net, ECCV 2016",
)


class Binary(StorageQuantizer):
    """Signs times the mean magnitude, the scale of least squared error; zero counts as positive."""

    method = METHOD
    BITS = range(1, 2)

    def _fit(self, values: Tensor, weight_bits: int) -> Levels:
        scale = values.double().abs().mean().float()
        return Levels(torch.stack([-scale, scale]), (values >= 0).long())
