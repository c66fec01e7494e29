"""Low-rank factorization: one layer becomes a chain of thinner ones.

Linear and 1x1 layers by truncated SVD, k x k convolutions by Tucker-2 on the two channel axes (Kim et al., 2016),
computed as a higher-order SVD with one orthogonal iteration (De Lathauwer et al., 2000).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from autocompress.compress.base import CompressionContext, Transform, check_names
from autocompress.errors import CompressionError
from autocompress.methods import Method
from autocompress.policy import CompressionPolicy

METHODS = (
    Method(
        "svd",
        "lowrank",
        "linear and 1x1 layers as two thinner ones, by truncated SVD",
        "Denton et al., NeurIPS 2014",
        ("openvino", "onnxruntime", "tensorrt", "tensorrt-rtx"),
    ),
    Method(
        "tucker2",
        "lowrank",
        "k x k convolutions as three thinner ones, by Tucker-2",
        "Kim et al., ICLR 2016",
        ("openvino", "onnxruntime", "tensorrt", "tensorrt-rtx"),
    ),
)
# Engines vectorise channels by eight at least; a rank in between costs the same as the next multiple.
RANK_STEP = 8


def rank_at(full: int, ratio: float) -> int:
    """Return the rank kept of `full` at `ratio`: a multiple of `RANK_STEP` where there is room, at least one."""
    if ratio >= 1:
        return full
    if full <= RANK_STEP:
        return max(1, round(full * ratio))
    return min(full, max(RANK_STEP, round(full * ratio / RANK_STEP) * RANK_STEP))


def factorized_macs_ratio(ins: int, outs: int, kernel: tuple[int, ...], ratio: float) -> float:
    """Return MACs of the factorized layer over the layer's own, at stride 1; at or above 1 it does not pay."""
    area = 1
    for size in kernel:
        area *= size
    if area == 1:
        return rank_at(min(ins, outs), ratio) * (ins + outs) / (ins * outs)
    rank_in, rank_out = rank_at(ins, ratio), rank_at(outs, ratio)
    return (ins * rank_in + rank_in * rank_out * area + rank_out * outs) / (ins * outs * area)


class LowRank(Transform):
    """Factorize every layer whose `rank_ratio` is below 1. Children of the new `nn.Sequential` are ``0, 1, (2)``."""

    def apply(self, model: nn.Module, policy: CompressionPolicy, context: CompressionContext) -> nn.Module:
        """See `Transform.apply`."""
        modules = dict(model.named_modules())
        ratios = {n: p.rank_ratio for n, p in policy.layers.items() if p.rank_ratio < 1}
        check_names(ratios, model, policy)
        wanted = {n: ratio for n, ratio in ratios.items() if n in modules}
        if not wanted:
            return model
        model = copy.deepcopy(model)
        for name, ratio in wanted.items():
            layer = model.get_submodule(name)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, factorize(layer, ratio, name))
        return model


def factorize(layer: nn.Module, ratio: float, name: str = "layer") -> nn.Sequential:
    """Return the low-rank form of a linear or ungrouped convolution layer; the layer is not changed.

    Raises:
        CompressionError: The layer has no low-rank form.
    """
    with torch.no_grad():
        if isinstance(layer, nn.Linear):
            return _svd_linear(layer, rank_at(min(layer.weight.shape), ratio))
        if isinstance(layer, nn.Conv2d) and layer.groups == 1:
            if layer.kernel_size == (1, 1):
                return _svd_pointwise(layer, rank_at(min(layer.weight.shape[:2]), ratio))
            return _tucker2(layer, rank_at(layer.in_channels, ratio), rank_at(layer.out_channels, ratio))
    raise CompressionError(f"{name!r} ({type(layer).__name__}) has no low-rank form; leave its rank_ratio at 1.")


def _split(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``A (out, rank)`` and ``B (rank, in)`` with the singular values shared evenly between them."""
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _svd_linear(layer: nn.Linear, rank: int) -> nn.Sequential:
    a, b = _split(layer.weight, rank)
    first = nn.Linear(layer.in_features, rank, bias=False)
    second = nn.Linear(rank, layer.out_features, bias=layer.bias is not None)
    first.weight.copy_(b)
    second.weight.copy_(a)
    if layer.bias is not None:
        second.bias.copy_(layer.bias)
    return nn.Sequential(first, second)


def _svd_pointwise(layer: nn.Conv2d, rank: int) -> nn.Sequential:
    a, b = _split(layer.weight[:, :, 0, 0], rank)
    # The stride goes to the first factor, so that the second works on the small map.
    first = nn.Conv2d(
        layer.in_channels, rank, 1, stride=_pair(layer.stride), padding=_padding(layer),
        padding_mode=layer.padding_mode, bias=False,
    )  # fmt: skip
    second = nn.Conv2d(rank, layer.out_channels, 1, bias=layer.bias is not None)
    first.weight.copy_(b[:, :, None, None])
    second.weight.copy_(a[:, :, None, None])
    if layer.bias is not None and second.bias is not None:
        second.bias.copy_(layer.bias)
    return nn.Sequential(first, second)


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    height, width = sizes
    return height, width


def _padding(layer: nn.Conv2d) -> str | tuple[int, int]:
    return layer.padding if isinstance(layer.padding, str) else _pair(layer.padding)


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Return the `rank` leading left singular vectors ``(rows, rank)``, from the Gram matrix: rows are few."""
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T)[1]
    return vectors[:, -rank:].flip(1)


def _tucker2(layer: nn.Conv2d, rank_in: int, rank_out: int) -> nn.Sequential:
    weight = layer.weight.double()  # (out, in, kh, kw)
    v = _leading(weight.transpose(0, 1).flatten(1), rank_in)
    u = _leading(torch.einsum("oihw,ir->orhw", weight, v).flatten(1), rank_out)
    v = _leading(torch.einsum("oihw,or->irhw", weight, u).flatten(1), rank_in)
    core = torch.einsum("oihw,or,is->rshw", weight, u, v)
    first = nn.Conv2d(layer.in_channels, rank_in, 1, bias=False)
    middle = nn.Conv2d(
        rank_in, rank_out, _pair(layer.kernel_size), stride=_pair(layer.stride), padding=_padding(layer),
        dilation=_pair(layer.dilation), padding_mode=layer.padding_mode, bias=False,
    )  # fmt: skip
    last = nn.Conv2d(rank_out, layer.out_channels, 1, bias=layer.bias is not None)
    first.weight.copy_(v.T[:, :, None, None])
    middle.weight.copy_(core)
    last.weight.copy_(u[:, :, None, None])
    if layer.bias is not None and last.bias is not None:
        last.bias.copy_(layer.bias)
    return nn.Sequential(first, middle, last)
