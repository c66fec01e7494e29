"""Tucker-2: a k x k convolution between two 1x1 ones, on the two channel axes.

The basis of the output side is that of the layer's outputs where calibration data are known, and that of the input side
follows from it. Without data, a higher-order SVD with one orthogonal iteration (De Lathauwer et al., 2000).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autocompress.catalogue import Method
from autocompress.compress.base import LayerOutputs
from autocompress.compress.factorizations.base import (
    Factor,
    Factorization,
    leading,
    output_basis,
    padding_of,
    pair,
    set_bias,
)

METHOD = Method(
    "tucker2",
    "lowrank",
    "k x k convolutions as three thinner ones, by the PCA of their outputs",
    "Kim et al., ICLR 2016",
    ("openvino", "onnxruntime", "tensorrt", "tensorrt-rtx"),
)


class Tucker2(Factorization):
    """1x1 to the input rank, k x k between the ranks, 1x1 to the outputs."""

    name = "tucker2"

    def full_ranks(self, ins: int, outs: int, kernel: tuple[int, int]) -> tuple[int, ...]:
        """See `Factorization.full_ranks`."""
        return ins, outs

    def factors(
        self, ins: int, outs: int, kernel: tuple[int, int], stride: tuple[int, int], ranks: Sequence[int]
    ) -> tuple[Factor, ...]:
        """See `Factorization.factors`. The first factor works on the map as it comes."""
        rank_in, rank_out = ranks
        first = Factor(ins, rank_in, 1, stride[0] * stride[1])
        return first, Factor(rank_in, rank_out, kernel[0] * kernel[1]), Factor(rank_out, outs, 1)

    def energies(self, weight: Tensor) -> tuple[Tensor, ...]:
        """See `Factorization.energies`."""
        weight = weight.double()
        sides = weight.transpose(0, 1).flatten(1), weight.flatten(1)
        return tuple(torch.linalg.eigvalsh(side @ side.T).clamp_min(0).flip(0) for side in sides)

    def build(self, layer: nn.Conv2d | nn.Linear, ranks: Sequence[int]) -> nn.Sequential:
        """See `Factorization.build`."""
        assert isinstance(layer, nn.Conv2d)
        rank_in, rank_out = ranks
        middle = nn.Conv2d(
            rank_in, rank_out, pair(layer.kernel_size), stride=pair(layer.stride), padding=padding_of(layer),
            dilation=pair(layer.dilation), padding_mode=layer.padding_mode, bias=False,
        )  # fmt: skip
        last = nn.Conv2d(rank_out, layer.out_channels, 1, bias=layer.bias is not None)
        return nn.Sequential(nn.Conv2d(layer.in_channels, rank_in, 1, bias=False), middle, last)

    def fill(self, chain: nn.Sequential, layer: nn.Conv2d | nn.Linear, outputs: LayerOutputs | None) -> None:
        """See `Factorization.fill`."""
        first, middle, last = chain
        assert isinstance(first, nn.Conv2d) and isinstance(middle, nn.Conv2d) and isinstance(last, nn.Conv2d)
        rank_in, rank_out = first.out_channels, middle.out_channels
        weight = layer.weight.double()  # (out, in, kh, kw)
        if outputs is None:
            v = leading(weight.transpose(0, 1).flatten(1), rank_in)
            u = leading(torch.einsum("oihw,ir->orhw", weight, v).flatten(1), rank_out)
        else:
            u = output_basis(weight.flatten(1), rank_out, outputs)
        v = leading(torch.einsum("oihw,or->irhw", weight, u).flatten(1), rank_in)
        first.weight.copy_(v.T[:, :, None, None])
        middle.weight.copy_(torch.einsum("oihw,or,is->rshw", weight, u, v))
        last.weight.copy_(u[:, :, None, None])
        set_bias(last, layer.bias, u, outputs)
