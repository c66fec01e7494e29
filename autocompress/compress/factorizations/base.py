"""The `Factorization` interface: one way to write a layer as a chain of thinner ones."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from autocompress.compress.base import LayerOutputs

# Engines vectorise channels by eight at least; a rank in between costs the same as the next multiple.
RANK_STEP = 8
# Beside what calibration data say of the outputs, what the weights alone would say, times this: few data span few
# directions. On ResNet-20 and VGG-11 anything between 0.01 and 1 does about as well.
_SHRINKAGE = 0.1


class Factor(NamedTuple):
    """One layer of a chain.

    Attributes:
        ins: Inputs of each output channel and kernel element; 1 for depthwise layers.
        outs: Output channels.
        area: Kernel elements.
        scale: Its output positions over those of the layer that the chain stands for.
    """

    ins: int
    outs: int
    area: int
    scale: int = 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one output position of the layer that the chain stands for."""
        return self.ins * self.outs * self.area * self.scale


def rank_at(full: int, ratio: float) -> int:
    """Return the rank kept of `full` at `ratio`: a multiple of `RANK_STEP` where there is room, at least one."""
    if ratio >= 1:
        return full
    if full <= RANK_STEP:
        return max(1, round(full * ratio))
    return min(full, max(RANK_STEP, round(full * ratio / RANK_STEP) * RANK_STEP))


class Factorization(abc.ABC):
    """One way to write a layer as a chain of thinner ones.

    `kernel` and `stride` are ``(height, width)`` throughout, ``(1, 1)`` for linear layers.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def full_ranks(self, ins: int, outs: int, kernel: tuple[int, int]) -> tuple[int, ...]:
        """Return the widths between the factors at which the chain can be all that the layer can."""

    def ranks(self, ins: int, outs: int, kernel: tuple[int, int], ratio: float) -> tuple[int, ...]:
        """Return the widths between the factors at a `rank_ratio`."""
        return tuple(rank_at(full, ratio) for full in self.full_ranks(ins, outs, kernel))

    @abc.abstractmethod
    def factors(
        self, ins: int, outs: int, kernel: tuple[int, int], stride: tuple[int, int], ranks: Sequence[int]
    ) -> tuple[Factor, ...]:
        """Return the chain's layers, the first one first."""

    def energies(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return squared singular values, the largest first, for each of `full_ranks`.

        Args:
            weight: ``(out, in, height, width)``.

        Returns:
            Nothing where the factorization has no singular values.
        """
        return ()

    @abc.abstractmethod
    def build(self, layer: nn.Conv2d | nn.Linear, ranks: Sequence[int]) -> nn.Sequential:
        """Return the chain for `layer`; its weights are not set yet."""

    @abc.abstractmethod
    def fill(self, chain: nn.Sequential, layer: nn.Conv2d | nn.Linear, outputs: LayerOutputs | None) -> None:
        """Set the weights of a chain that `build` made, from the layer's.

        Args:
            chain: As `build` returned it; changed in place.
            layer: Not changed.
            outputs: What the layer gives on calibration data; None where that is not known.

        Raises:
            CompressionError: The factorization does not converge.
        """


def ratio_of_energy(
    factorization: Factorization, weight: Tensor, share: float, energies: Sequence[Tensor] | None = None
) -> float:
    """Return the smallest rank ratio that keeps `share` of the squared singular values; 1 where all are needed.

    Args:
        factorization: One with singular values.
        weight: ``(out, in, height, width)``.
        share: In (0, 1].
        energies: As `Factorization.energies`, where they are known.
    """
    outs, ins, *kernel = weight.shape
    found = factorization.energies(weight) if energies is None else energies
    needed = [rank_of_energy(values, share) for values in found]
    full = factorization.full_ranks(ins, outs, (kernel[0], kernel[1]))
    steps = {kept / size for size in full for kept in range(min(size, RANK_STEP), size, RANK_STEP)}
    steps |= {kept / size for size in full if size <= RANK_STEP for kept in range(1, size)}
    for ratio in sorted(steps):
        if all(rank_at(size, ratio) >= rank for size, rank in zip(full, needed, strict=True)):
            return ratio
    return 1.0


def rank_of_energy(energies: Tensor, share: float) -> int:
    """Return the smallest rank that keeps `share` of `energies`, squared singular values with the largest first."""
    kept = energies.double().cumsum(0)
    # What rounding alone takes away is not missed.
    return min(int((kept < share * kept[-1] * (1 - 1e-12)).sum()) + 1, len(energies))


def leading(matrix: Tensor, rank: int) -> Tensor:
    """Return the `rank` leading left singular vectors ``(rows, rank)``, from the Gram matrix: rows are few."""
    return principal(matrix @ matrix.T, rank)


def principal(gram: Tensor, rank: int) -> Tensor:
    """Return the `rank` leading eigenvectors ``(n, rank)`` of a symmetric matrix ``(n, n)``."""
    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors[:, -rank:].flip(1)


def output_basis(weight: Tensor, rank: int, outputs: LayerOutputs | None) -> Tensor:
    """Return an orthonormal basis ``(out, rank)`` of the directions that matter among a layer's outputs.

    Those are the principal components of what the layer gives on calibration data: a linear autoencoder of its
    outputs (Zhang et al., Accelerating very deep convolutional networks, TPAMI 2016). Without data, of its weights.

    Args:
        weight: ``(out, inputs)``.
        rank: At most ``out``.
        outputs: Of the layer.
    """
    gram = weight @ weight.T
    if outputs is not None:
        seen = outputs.covariance.to(gram.dtype)
        if float(seen.trace()) > 0:
            gram = seen / seen.trace() + _SHRINKAGE * gram / gram.trace().clamp_min(torch.finfo(gram.dtype).tiny)
    return principal(gram, rank)


def set_bias(last: nn.Conv2d | nn.Linear, bias: Tensor | None, basis: Tensor, outputs: LayerOutputs | None) -> None:
    """Give the last factor the layer's bias, and the mean of what the basis ``(out, rank)`` leaves out."""
    if bias is None or last.bias is None:
        return
    last.bias.copy_(bias)
    if outputs is not None:
        rest = outputs.mean.to(basis.dtype) - bias.to(basis.dtype)
        last.bias += (rest - basis @ (basis.T @ rest)).to(last.bias.dtype)


def pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Return a height and a width."""
    height, width = sizes
    return height, width


def padding_of(layer: nn.Conv2d) -> str | tuple[int, int]:
    """Return a convolution's padding: ``"same"``, ``"valid"``, or of height and width."""
    return layer.padding if isinstance(layer.padding, str) else pair(layer.padding)
