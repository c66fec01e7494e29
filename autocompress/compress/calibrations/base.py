"""`Calibration`: one way to choose where a tensor is clipped, and what it may look at."""

from __future__ import annotations

import abc
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Magnitudes:
    """What calibration data say of one tensor. Its size does not grow with the data.

    Attributes:
        counts: Histogram ``(bins,)`` of magnitudes, equal bins over [0, top]; zeros are in the first.
        top: Largest magnitude, in the tensor's unit; positive and finite.
        signed: Whether a value was negative.
    """

    counts: Tensor
    top: float
    signed: bool

    @property
    def levels(self) -> int:
        """The largest code: 127 of int8, 255 of uint8."""
        return 127 if self.signed else 255

    @property
    def width(self) -> float:
        """What one bin spans, in the tensor's unit."""
        return self.top / len(self.counts)


class Calibration(abc.ABC):
    """One way to choose a clipping threshold."""

    @abc.abstractmethod
    def threshold(self, seen: Magnitudes) -> float:
        """Return the magnitude that the largest code stands for, in (0, top], in the tensor's unit."""
