"""Links between a measured quality and a loss that adds up: monotone, zero at the reference, defined everywhere.

Small damages add up; a ruined network cannot be ruined twice. With `y` the share of the quality that is lost, from 0
to 1, every further damage multiplies the survival `1 - y`, so `-log(1 - y)` adds up; odds do where quality falls
slower; and a power below 1 straightens damages that reinforce each other. On made-up problems the link that best
foresees trials it has not seen came close to the best one everywhere; no fixed link did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from autocompress.exploration.knapsack.problem import Array

# Above this share nothing tells two ruined networks apart.
MOST = 0.97


@dataclass(frozen=True)
class LossTransform:
    """One link.

    Attributes:
        shape: ``"survival"``: -log(1 - y); ``"odds"``: y / (1 - y); ``"linear"``: y.
        power: Of the above.
    """

    shape: Literal["survival", "odds", "linear"]
    power: float = 1.0

    def forward(self, share: Array) -> Array:
        """Return the additive loss of shares lost; what is better than the reference loses nothing."""
        y = np.clip(share, 0.0, MOST)
        if self.shape == "survival":
            base = -np.log1p(-y)
        elif self.shape == "odds":
            base = y / (1 - y)
        else:
            base = y
        found: Array = base**self.power
        return found

    def inverse(self, loss: Array) -> Array:
        """Return the share lost of an additive loss, in [0, 1]."""
        base = np.maximum(loss, 0.0) ** (1 / self.power)
        if self.shape == "survival":
            found: Array = -np.expm1(-base)
            return found
        if self.shape == "odds":
            return np.asarray(base / (1 + base))
        return np.asarray(np.minimum(base, 1.0))

    def slope(self, share: Array) -> Array:
        """Return the derivative of `forward`, with shares kept off both ends."""
        y = np.clip(share, 0.01, MOST)
        if self.shape == "survival":
            base, slope = -np.log1p(-y), 1 / (1 - y)
        elif self.shape == "odds":
            base, slope = y / (1 - y), (1 - y) ** -2.0
        else:
            base, slope = y, np.ones_like(y)
        found: Array = self.power * base ** (self.power - 1) * slope
        return found


POWERS = (1.0, 0.7, 0.5)
LINKS = tuple(LossTransform(shape, power) for shape in ("linear", "survival", "odds") for power in POWERS)
