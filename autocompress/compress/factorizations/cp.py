"""CP: a k x k convolution as a 1x1, a depthwise k x k and a 1x1 one (Lebedev et al., ICLR 2015).

Rows and columns of the kernel are taken as one axis (Astrid & Lee, BigComp 2017), so that the two depthwise factors of
Lebedev et al. are one: a kernel less to start, and never a worse fit at the same rank. Alternating least squares by
tensorly, from the singular vectors and a fixed seed; the product that takes its time is formed in an order of our own,
since the usual one multiplies out a matrix of (inputs x outputs, rank): gigabytes for a layer of 512 channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autocompress._optional import optional
from autocompress.catalogue import Method
from autocompress.compress.base import LayerOutputs
from autocompress.compress.factorizations.base import Factor, Factorization, padding_of, pair
from autocompress.errors import CompressionError

METHOD = Method(
    "cp",
    "lowrank",
    "k x k convolutions as a 1x1, a depthwise and a 1x1 one, by CP (needs tensorly)",
    "Lebedev et al., ICLR 2015; Astrid & Lee, BigComp 2017",
    ("openvino", "onnxruntime", "tensorrt", "tensorrt-rtx"),
)
_ITERATIONS, _TOLERANCE, _SEED = 50, 1e-5, 0
# Left alone, components grow and cancel each other, and what follows them cannot be trained (Lebedev et al. call it
# instability). This penalty on them, for a weight of norm one, holds them back; the fit is no worse for it.
_PENALTY = 1e-4
_DIVERGES = (
    "the CP decomposition of a weight {shape} at rank {rank} does not converge; choose another rank ratio, or another "
    "factorization"
)


class Cp(Factorization):
    """1x1 to the rank, one k x k kernel for each component, 1x1 to the outputs."""

    name = "cp"

    def full_ranks(self, ins: int, outs: int, kernel: tuple[int, int]) -> tuple[int, ...]:
        """See `Factorization.full_ranks`. No tensor of this shape has a higher rank."""
        area = kernel[0] * kernel[1]
        full = min(ins * outs, ins * area, outs * area)
        return full, full

    def factors(
        self, ins: int, outs: int, kernel: tuple[int, int], stride: tuple[int, int], ranks: Sequence[int]
    ) -> tuple[Factor, ...]:
        """See `Factorization.factors`. The first factor works on the map as it comes."""
        rank, area = ranks[0], kernel[0] * kernel[1]
        return Factor(ins, rank, 1, stride[0] * stride[1]), Factor(1, rank, area), Factor(rank, outs, 1)

    def build(self, layer: nn.Conv2d | nn.Linear, ranks: Sequence[int]) -> nn.Sequential:
        """See `Factorization.build`."""
        assert isinstance(layer, nn.Conv2d)
        rank = ranks[0]
        middle = nn.Conv2d(
            rank, rank, pair(layer.kernel_size), stride=pair(layer.stride), padding=padding_of(layer),
            dilation=pair(layer.dilation), padding_mode=layer.padding_mode, groups=rank, bias=False,
        )  # fmt: skip
        last = nn.Conv2d(rank, layer.out_channels, 1, bias=layer.bias is not None)
        return nn.Sequential(nn.Conv2d(layer.in_channels, rank, 1, bias=False), middle, last)

    def fill(self, chain: nn.Sequential, layer: nn.Conv2d | nn.Linear, outputs: LayerOutputs | None) -> None:
        """See `Factorization.fill`. The rank is not one of outputs alone, so that these say nothing of it.

        Raises:
            CompressionError: The alternating least squares gave values that are not finite.
            MissingDependencyError: tensorly is not installed.
        """
        first, middle, last = chain
        assert isinstance(first, nn.Conv2d) and isinstance(middle, nn.Conv2d) and isinstance(last, nn.Conv2d)
        weight = layer.weight.flatten(2).double().numpy()  # (out, in, area)
        u, v, k = _components(weight, first.out_channels)
        # Each component's weight is shared evenly between its three vectors.
        norms = np.stack([np.linalg.norm(axis, axis=0) for axis in (u, v, k)])
        even = np.cbrt(norms.prod(0))
        u, v, k = (axis * (even / np.maximum(norm, 1e-30)) for axis, norm in zip((u, v, k), norms, strict=True))
        first.weight.copy_(torch.from_numpy(v.T[:, :, None, None].copy()))
        middle.weight.copy_(torch.from_numpy(k.T.reshape(middle.weight.shape).copy()))
        last.weight.copy_(torch.from_numpy(u[:, :, None, None].copy()))
        if layer.bias is not None and last.bias is not None:
            last.bias.copy_(layer.bias)


def _components(weight: NDArray[np.float64], rank: int) -> tuple[NDArray[np.float64], ...]:
    """Return the vectors ``(out, rank)``, ``(in, rank)`` and ``(area, rank)`` whose products add up to `weight`."""
    decomposition = optional("tensorly.decomposition", "cp", "The CP factorization")
    algebra = optional("tensorly.tenalg", "cp", "The CP factorization")
    ours = optional("tensorly.tenalg.core_tenalg", "cp", "The CP factorization").CoreTenalgBackend()
    ours.unfolding_dot_khatri_rao = _unfolded_product
    scale = float(np.linalg.norm(weight))
    if scale == 0:
        return tuple(np.zeros((size, rank)) for size in weight.shape)
    try:
        with warnings.catch_warnings(), algebra.backend_context(ours, local_threadsafe=True):
            # More components than an axis has singular vectors: the others start at random, as they may.
            warnings.filterwarnings("ignore", "Trying to compute SVD", UserWarning)
            shares, found = decomposition.parafac(
                weight / scale, rank, n_iter_max=_ITERATIONS, init="svd", tol=_TOLERANCE, random_state=_SEED,
                l2_reg=_PENALTY,
            )  # fmt: skip
    except np.linalg.LinAlgError as error:
        raise CompressionError(_DIVERGES.format(shape=weight.shape, rank=rank)) from error
    if not all(np.isfinite(axis).all() for axis in found):
        raise CompressionError(_DIVERGES.format(shape=weight.shape, rank=rank))
    return found[0] * shares * scale, found[1], found[2]


def _unfolded_product(
    tensor: NDArray[np.float64], components: tuple[NDArray[np.float64] | None, list[NDArray[np.float64]]], mode: int
) -> NDArray[np.float64]:
    """Return `tensor`, of three axes, multiplied by the factors of the two axes other than `mode`: ``(axis, rank)``.

    The longer of the two axes goes first: what is between is never larger than the rank times both others.
    """
    weights, factors = components
    short, long = sorted((axis for axis in range(3) if axis != mode), key=lambda axis: tensor.shape[axis])
    between = np.tensordot(tensor, factors[long], (long, 0))
    found: NDArray[np.float64] = np.einsum("xyr,yr->xr" if mode < short else "yxr,yr->xr", between, factors[short])
    return found if weights is None else found * weights
