"""The interface of weight quantizers for storage: values in, a few levels and an index per value out.

Every scheme ends as a table of levels and indices into it, so the container needs to know none of them: an engine that
is given the weights back computes with the levels as they are.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autocompress.catalogue import Method
from autocompress.errors import CompressionError, ConfigError

MAX_BITS = 8


@dataclass(frozen=True)
class Shared:
    """Quantized values.

    Attributes:
        levels: What a value can be, ascending, ``(k,)``, float32.
        indices: Which level each value has, int64, of the values' shape.
    """

    levels: Tensor
    indices: Tensor

    def values(self) -> Tensor:
        """Return the quantized values, float32, of the indices' shape."""
        return self.levels[self.indices]


class StorageQuantizer(abc.ABC):
    """One scheme.

    Attributes:
        method: What it is and where it comes from; its file's `METHOD`.
        BITS: The `weight_bits` it can do.
        SCALED: Whether levels are integers times a scale. Only then does a container keep a scale for every channel or
            group: a table of levels for each would take what it saves.
    """

    method: ClassVar[Method]
    SCALED: ClassVar[bool] = True
    BITS: ClassVar[range] = range(1, MAX_BITS + 1)

    def fit(self, values: Tensor, weight_bits: int) -> Shared:
        """Quantize weights that stay.

        Args:
            values: Of any shape and floating dtype; zeros that pruning left are not among them.
            weight_bits: At most ``2 ** weight_bits`` levels.

        Raises:
            ConfigError: The scheme cannot do so many bits.
            CompressionError: There are no values, or one is not finite.
        """
        if weight_bits not in self.BITS:
            allowed = f"{self.BITS[0]} to {self.BITS[-1]}" if len(self.BITS) > 1 else f"{self.BITS[0]} alone"
            raise ConfigError(f"The quantizer {self.method.name!r} does {allowed} bits, not {weight_bits}.")
        if values.numel() == 0:
            raise CompressionError("There are no weights to quantize.")
        if not bool(torch.isfinite(values).all()):
            raise CompressionError("Weights to quantize hold NaN or infinite values. Check how they were trained.")
        return self._fit(values.detach().float().flatten(), weight_bits).reshaped(values.shape)

    @abc.abstractmethod
    def _fit(self, values: Tensor, weight_bits: int) -> Levels:
        """Quantize finite float32 `values` ``(n,)``, ``n >= 1``."""


@dataclass(frozen=True)
class Levels:
    """Levels ``(k,)`` and the nearest one's index of every value ``(n,)``; levels that nothing uses go."""

    levels: Tensor
    indices: Tensor

    @classmethod
    def nearest(cls, levels: Tensor, values: Tensor) -> Levels:
        """Give every value its nearest level; halfway between two, the upper one."""
        levels = torch.unique(levels.float())
        return cls(levels, torch.bucketize(values, (levels[1:] + levels[:-1]) / 2, right=True))

    def reshaped(self, shape: torch.Size) -> Shared:
        """Return the result in the values' shape."""
        used, indices = torch.unique(self.indices, return_inverse=True)
        return Shared(self.levels[used], indices.reshape(shape))
