"""A parameter's loss over the severity of its choices: measured points, and a power law between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from autocompress.space.search_space import Choice
from autocompress.space.severity import severity

# How a loss grows with what is taken away, where only one choice of a parameter was measured, and its bounds.
_USUAL_POWER, _POWERS = 2.0, (0.5, 5.0)
_SMALLEST = 1e-9


def completed(
    name: str, offered: Sequence[Choice], known: Mapping[Choice, float], typical: float
) -> dict[Choice, float]:
    """Return the loss of every choice of a parameter: measured ones, and a power law of severity between them.

    Args:
        name: The parameter.
        offered: Its choices, the first does nothing.
        known: Losses that were measured.
        typical: Loss of the strongest choice where none was.
    """
    points = sorted((severity(name, choice), loss) for choice, loss in known.items() if severity(name, choice) > 0)
    strongest = max(severity(name, choice) for choice in offered)
    points = points or [(strongest, typical)]
    found: dict[Choice, float] = {offered[0]: 0.0}
    for choice in offered[1:]:
        found[choice] = known[choice] if choice in known else at_severity(points, severity(name, choice))
    return found


def at_severity(points: Sequence[tuple[float, float]], place: float) -> float:
    """Return the loss at a severity, by the power law through the two nearest measured ones."""
    above = [number for number, point in enumerate(points) if point[0] > place]
    at = above[0] if above else len(points) - 1
    near = points[at]
    power = _USUAL_POWER
    if len(points) > 1:
        other = points[at - 1] if at else points[1]
        if min(other[1], near[1]) > _SMALLEST:
            power = math.log(near[1] / other[1]) / math.log(near[0] / other[0])
    power = min(max(power, _POWERS[0]), _POWERS[1])
    return float(near[1] * (place / near[0]) ** power)
