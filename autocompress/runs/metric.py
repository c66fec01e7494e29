"""The metric by the name that its task gives it, and how its values are written: percent for shares, else plain.

"99.17 %" of samples are right, and one loses "0.28 pp"; a cosine is 0.9810, and one loses 0.0028. Records hold every
metric as a fraction, higher is better.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_MINUS = "\N{MINUS SIGN}"
# What is counted over samples, positions or pixels.
_SHARES = re.compile(r"accuracy|\bacc\b|\btop[-_ ]?\d+|agreement|precision|recall|hit|\brate\b|share|correct|exact")
# Of a metric that is no share: a loss of 0.5 points is 0.005.
_DECIMALS = 4


@dataclass(frozen=True)
class Metric:
    """One task's metric.

    Attributes:
        name: As the task calls it, such as ``"accuracy"`` or ``"cosine"``.
    """

    name: str = "accuracy"

    @property
    def is_share(self) -> bool:
        """Whether it is a share of samples, so that percent and percentage points mean something."""
        return _SHARES.search(self.name.lower()) is not None

    @property
    def short(self) -> str:
        """The name for a narrow column."""
        return "acc." if self.name == "accuracy" else self.name

    @property
    def scale(self) -> float:
        """What a value is multiplied by on an axis."""
        return 100.0 if self.is_share else 1.0

    @property
    def axis(self) -> str:
        """The name with its unit."""
        return f"{self.name} (%)" if self.is_share else self.name

    def value(self, value: float) -> str:
        """Format a value: ``"99.17%"`` or ``"0.9810"``."""
        return f"{value:.2%}" if self.is_share else f"{value:.{_DECIMALS}f}"

    def change(self, drop: float) -> str:
        """Format a loss (fraction) as the change it is: ``"−1.00 pp"`` or ``"−0.0100"``."""
        decimals = 2 if self.is_share else _DECIMALS
        change = round(-self.scale * drop, decimals)
        sign = "+" if change > 0 else _MINUS if change < 0 else "±"
        return f"{sign}{abs(change):.{decimals}f}{' pp' if self.is_share else ''}"

    def loss(self, drop: float) -> str:
        """Format a loss (fraction) that is allowed or was reached: ``"0.5 pp"`` or ``"0.005"``."""
        if self.is_share:
            return f"{100 * drop:.3g} pp"
        return f"{drop:.3g}" if abs(drop) >= 10**-_DECIMALS or drop == 0 else f"{drop:.1g}"


def metric_name(task: Any) -> str:
    """Return what a task calls its metric: its `metric_name`, or what stands for that in a task without one.

    Without labels that is the kind of agreement; else accuracy for class scores, and a score for anything else.
    """
    for attribute in ("metric_name", "kind"):
        named = getattr(task, attribute, None)
        if isinstance(named, str) and named:
            return named
    return "accuracy" if getattr(task, "outputs", "classes") == "classes" else "score"
