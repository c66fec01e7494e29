"""Pruning schedules: in which steps a pruning ratio is reached, with fine-tuning between them."""

from __future__ import annotations

from autocompress.catalogue import Method
from autocompress.errors import ConfigError, nearest

METHODS = (
    Method("one_shot", "pruning", "everything goes at once, then fine-tuning", "Li et al., ICLR 2017"),
    Method(
        "iterative",
        "pruning",
        "the same share of what is left at every step, fine-tuning after each",
        "Han et al., Learning both weights and connections, NeurIPS 2015",
    ),
    Method(
        "gradual",
        "pruning",
        "the cubic schedule: much at first, ever less; fine-tuning after each",
        "Zhu & Gupta, To prune, or not to prune, 2017",
    ),
)
SCHEDULES = tuple(method.name for method in METHODS)


def cumulative_ratios(schedule: str, ratio: float, steps: int) -> tuple[float, ...]:
    """Return the share of the uncompressed model that has gone after each step; the last is `ratio`.

    Args:
        schedule: One of `SCHEDULES`. ``"one_shot"`` has one step, whatever `steps` says.
        ratio: Fraction removed in the end, in (0, 1).
        steps: Number of steps.

    Raises:
        ConfigError: Unknown `schedule`, or `ratio` or `steps` out of range.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"Unknown pruning schedule {schedule!r}.{nearest(schedule, SCHEDULES)}")
    if not 0 < ratio < 1:
        raise ConfigError(f"A pruning schedule to {ratio} is not possible: give a fraction removed, in (0, 1).")
    if steps < 1:
        raise ConfigError(f"A pruning schedule of {steps} steps is not possible: give 1 or more.")
    if schedule == "one_shot":
        return (ratio,)
    done = [(step + 1) / steps for step in range(steps - 1)]
    if schedule == "iterative":
        return (*(1 - (1 - ratio) ** share for share in done), ratio)
    return (*(ratio * (1 - (1 - share) ** 3) for share in done), ratio)
