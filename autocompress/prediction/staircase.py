"""Choices that a latency table says cannot pay: widths between two steps of a staircase, slower ranks and int8.

Hardware computes channels by vectors and tiles: a width in between two steps costs as much as the next one, or more. A
choice goes only where the predictor is certain that it saves nothing, with all else uncompressed and in the middle of
the space as well; what it does not know stays. Decides nothing about quality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autocompress.prediction.predictor import LatencyPredictor
from autocompress.space.parameter import Parameter
from autocompress.space.search_space import Choice, SearchSpace

# Networks of this model that must be known before anything is left out.
LEAST_NETWORKS = 60
# One-sided 95 % of a normal distribution.
_CERTAIN = 1.645
# A width that saves less than this share of what its multiply-accumulates would is on the step of a wider one.
_STEP = 0.1
# The middle of the space.
_MIDDLE_PRUNING = 0.5


def drop_dominated_choices(predictor: LatencyPredictor, space: SearchSpace) -> dict[str, tuple[Choice, ...]]:
    """Return the choices that are left of each parameter that loses some, for `SearchSpace.narrowed`.

    Empty while the predictor knows fewer than `LEAST_NETWORKS` networks, and where no parameter would be left.

    Args:
        predictor: With what a table of this model, device and engine says.
        space: What is offered now.
    """
    if predictor.size < LEAST_NETWORKS or not predictor.ready:
        return {}
    stairs = _Stairs(predictor, space)
    found = {}
    for name, allowed_choices in space.every.items():
        kind = Parameter.of(name).kind
        if kind == "prune":
            left = stairs.widths(name, allowed_choices)
        elif kind in ("rank", "dtype", "sparsity"):
            left = stairs.faster(name, allowed_choices)
        else:
            continue
        if left != allowed_choices:
            found[name] = left
    nothing = all(len(found.get(name, allowed_choices)) == 1 for name, allowed_choices in space.every.items())
    return {} if nothing else found


class _Stairs:
    """What a predictor says of single choices, at a few settings of all others."""

    def __init__(self, predictor: LatencyPredictor, space: SearchSpace) -> None:
        self._predictor, self._space = predictor, space
        dense, int8 = space.everywhere(), space.everywhere(dtype="int8")
        middle = space.everywhere(prune=_MIDDLE_PRUNING, dtype="int8")
        # In a network that is mostly int8 a layer that is not converts its inputs and outputs, and the other way round.
        self._settings: Mapping[str, Sequence[Mapping[str, Choice]]] = {
            "prune": (dense, middle), "rank": (dense, int8), "dtype": (dense, int8), "sparsity": (dense, int8),
        }  # fmt: skip

    def widths(self, name: str, allowed_choices: Sequence[Choice]) -> tuple[Choice, ...]:
        """Return the choices that are faster than every wider one, or may be."""
        ordered = sorted(allowed_choices, key=float)
        lost = {
            choice
            for number, choice in enumerate(ordered[1:], 1)
            if all(self._on_a_step(name, choice, ordered[:number], others) for others in self._settings["prune"])
        }
        return tuple(choice for choice in allowed_choices if choice not in lost)

    def _on_a_step(self, name: str, choice: Choice, wider: Sequence[Choice], others: Mapping[str, Choice]) -> bool:
        """Whether a width is certain to save next to nothing over the fastest of some wider ones."""
        policy = self._space.policy
        fastest = min(wider, key=lambda c: self._predictor.predict(policy({**others, name: c})).ratio)
        narrow, wide = policy({**others, name: choice}), policy({**others, name: fastest})
        macs = [self._predictor.layout.macs(p) for p in (narrow, wide)]
        worth = self._predictor.predict(wide).ratio * (1 - macs[0] / macs[1]) if macs[1] else 0.0
        return self._slower(name, choice, fastest, others) > -_STEP * worth

    def faster(self, name: str, allowed_choices: Sequence[Choice]) -> tuple[Choice, ...]:
        """Return the first choice, which does nothing, and those that are faster than it, or may be."""
        nothing = allowed_choices[0]
        return tuple(
            choice
            for choice in allowed_choices
            if choice == nothing
            or any(
                self._slower(name, choice, nothing, others) <= 0 for others in self._settings[Parameter.of(name).kind]
            )
        )

    def _slower(self, name: str, choice: Choice, other: Choice, others: Mapping[str, Choice]) -> float:
        """Return by how much of the ratio one choice is at least slower than another; below 0 when it may be faster."""
        policy = self._space.policy
        mean, deviation = self._predictor.difference(policy({**others, name: choice}), policy({**others, name: other}))
        return mean - _CERTAIN * deviation
