"""Spatial SVD: a k x k convolution as a k x 1 one and a 1 x k one (Jaderberg et al., BMVC 2014).

Seen as a matrix from (input channel, row) to (output channel, column), a kernel has a truncated SVD, whose two factors
are the two convolutions. Padding, stride and dilation of each axis go to the factor that works along it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autocompress.catalogue import Method
from autocompress.compress.base import LayerOutputs
from autocompress.compress.factorizations.base import Factor, Factorization, padding_of, pair

METHOD = Method(
    "spatial_svd",
    "lowrank",
    "k x k convolutions as a k x 1 and a 1 x k one, by truncated SVD",
    "Jaderberg, Vedaldi & Zisserman, BMVC 2014",
    ("openvino", "onnxruntime", "tensorrt", "tensorrt-rtx"),
)


class SpatialSvd(Factorization):
    """Down the rows to the rank, then along the columns to the outputs."""

    name = "spatial_svd"

    def full_ranks(self, ins: int, outs: int, kernel: tuple[int, int]) -> tuple[int, ...]:
        """See `Factorization.full_ranks`."""
        return (min(ins * kernel[0], outs * kernel[1]),)

    def factors(
        self, ins: int, outs: int, kernel: tuple[int, int], stride: tuple[int, int], ranks: Sequence[int]
    ) -> tuple[Factor, ...]:
        """See `Factorization.factors`. The first factor leaves the columns' stride to the second."""
        (rank,) = ranks
        return Factor(ins, rank, kernel[0], stride[1]), Factor(rank, outs, kernel[1])

    def energies(self, weight: Tensor) -> tuple[Tensor, ...]:
        """See `Factorization.energies`."""
        return (torch.linalg.svdvals(_matrix(weight)).square(),)

    def build(self, layer: nn.Conv2d | nn.Linear, ranks: Sequence[int]) -> nn.Sequential:
        """See `Factorization.build`."""
        assert isinstance(layer, nn.Conv2d)
        (rank,) = ranks
        (high, wide), (down, right), (far, apart) = (pair(p) for p in (layer.kernel_size, layer.stride, layer.dilation))
        padding = padding_of(layer)
        above, beside = (padding, padding) if isinstance(padding, str) else ((padding[0], 0), (0, padding[1]))
        first = nn.Conv2d(
            layer.in_channels, rank, (high, 1), stride=(down, 1), padding=above, dilation=(far, 1),
            padding_mode=layer.padding_mode, bias=False,
        )  # fmt: skip
        last = nn.Conv2d(
            rank, layer.out_channels, (1, wide), stride=(1, right), padding=beside, dilation=(1, apart),
            padding_mode=layer.padding_mode, bias=layer.bias is not None,
        )  # fmt: skip
        return nn.Sequential(first, last)

    def fill(self, chain: nn.Sequential, layer: nn.Conv2d | nn.Linear, outputs: LayerOutputs | None) -> None:
        """See `Factorization.fill`. The rank is not one of outputs alone, so that these say nothing of it."""
        first, last = chain
        assert isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d)
        rank, (outs, ins, high, wide) = first.out_channels, layer.weight.shape
        u, s, v = torch.linalg.svd(_matrix(layer.weight), full_matrices=False)
        root = s[:rank].sqrt()
        first.weight.copy_((u[:, :rank] * root).reshape(ins, high, rank).permute(2, 0, 1)[..., None])
        last.weight.copy_((v[:rank].T * root).reshape(outs, wide, rank).permute(0, 2, 1)[:, :, None])
        if layer.bias is not None and last.bias is not None:
            last.bias.copy_(layer.bias)


def _matrix(weight: Tensor) -> Tensor:
    """Return a weight ``(out, in, height, width)`` as ``(in * height, out * width)``."""
    outs, ins, high, wide = weight.shape
    return weight.double().permute(1, 2, 0, 3).reshape(ins * high, outs * wide)
