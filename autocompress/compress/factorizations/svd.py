"""Truncated SVD: a linear or 1x1 layer as two thinner ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autocompress.catalogue import Method
from autocompress.compress.base import LayerOutputs
from autocompress.compress.factorizations.base import Factor, Factorization, output_basis, padding_of, pair, set_bias

METHOD = Method(
    "svd",
    "lowrank",
    "linear and 1x1 layers as two thinner ones, by the PCA of their outputs",
    "Denton et al., NeurIPS 2014; Zhang et al., TPAMI 2016",
    ("openvino", "onnxruntime", "tensorrt", "tensorrt-rtx"),
)


class Svd(Factorization):
    """``W = A B`` with ``A (out, rank)`` and ``B (rank, in)``."""

    name = "svd"

    def full_ranks(self, ins: int, outs: int, kernel: tuple[int, int]) -> tuple[int, ...]:
        """See `Factorization.full_ranks`."""
        return (min(ins, outs),)

    def factors(
        self, ins: int, outs: int, kernel: tuple[int, int], stride: tuple[int, int], ranks: Sequence[int]
    ) -> tuple[Factor, ...]:
        """See `Factorization.factors`. The stride is the first factor's, so that both work on the small map."""
        (rank,) = ranks
        return Factor(ins, rank, 1), Factor(rank, outs, 1)

    def energies(self, weight: Tensor) -> tuple[Tensor, ...]:
        """See `Factorization.energies`."""
        return (torch.linalg.svdvals(weight.flatten(1).double()).square(),)

    def build(self, layer: nn.Conv2d | nn.Linear, ranks: Sequence[int]) -> nn.Sequential:
        """See `Factorization.build`."""
        (rank,) = ranks
        bias = layer.bias is not None
        if isinstance(layer, nn.Linear):
            return nn.Sequential(
                nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=bias)
            )
        first = nn.Conv2d(
            layer.in_channels, rank, 1, stride=pair(layer.stride), padding=padding_of(layer),
            padding_mode=layer.padding_mode, bias=False,
        )  # fmt: skip
        return nn.Sequential(first, nn.Conv2d(rank, layer.out_channels, 1, bias=bias))

    def fill(self, chain: nn.Sequential, layer: nn.Conv2d | nn.Linear, outputs: LayerOutputs | None) -> None:
        """See `Factorization.fill`."""
        first, last = chain
        assert isinstance(first, (nn.Conv2d, nn.Linear)) and isinstance(last, (nn.Conv2d, nn.Linear))
        weight = layer.weight.flatten(1).double()
        basis = output_basis(weight, first.weight.shape[0], outputs)
        inner = basis.T @ weight
        # What a component weighs is shared evenly between the factors, which then train and quantize alike.
        root = inner.norm(dim=1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        first.weight.copy_((inner / root[:, None]).reshape(first.weight.shape))
        last.weight.copy_((basis * root).reshape(last.weight.shape))
        set_bias(last, layer.bias, basis, outputs)
