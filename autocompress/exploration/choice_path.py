"""A path of networks from mild to harsh, and where on it a limit is met, by what was measured along it.

Each step of the path makes one choice harsher, the one that loses least for what it saves first. Predictions order the
networks and say how far apart they lie; what was measured of some of them says where they are. So a limit is approached
from the safe side in two or three measurements, whatever the prediction is worth. Knows no study.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Callable, Collection, Mapping
from typing import Any

from autocompress.exploration.knapsack.problem import Costs
from autocompress.policy import CompressionPolicy
from autocompress.space.parameter import Parameter
from autocompress.space.search_space import Choice, SearchSpace
from autocompress.space.severity import severity

Choices = dict[str, Choice]


class ChoicePath:
    """Networks of growing compression from one network on.

    Args:
        space: What may be chosen.
        start: Choices that the path begins with; missing ones do nothing.
        kinds: Kinds of parameters that it changes, such as ``{"prune", "block"}``.
        costs: What each choice costs, predicted; only differences count.
        losses: What each choice loses; what is missing is judged by its severity.
        cost: Predicts what a whole network costs.
        even: Whether every parameter takes its first step before any takes its second: where little is known of losses,
            what is spread loses least.
    """

    def __init__(
        self, space: SearchSpace, start: Mapping[str, Choice], kinds: Collection[str], *, costs: Costs,
        losses: Mapping[str, Mapping[Choice, float]], cost: Callable[[CompressionPolicy], float], even: bool = False,
    ) -> None:  # fmt: skip
        self._space, self._cost = space, cost
        self._start: Choices = {**space.everywhere(), **start}
        self._steps = sorted(
            (step for name in space.parameters if Parameter.of(name).kind in kinds
             for step in self._hull(name, costs.ms.get(name, {}), losses.get(name, {}))),
            key=lambda step: (severity(step[1], step[2]) if even else 0.0, step[0]),
        )  # fmt: skip
        self._predicted: dict[int, float] = {}
        # What was measured of networks of the path, over what was predicted of them, by what was predicted.
        self._anchors: list[tuple[float, float]] = []

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._steps)

    def _hull(
        self, name: str, cost: Mapping[Any, float], loss: Mapping[Choice, float]
    ) -> list[tuple[float, str, Choice, float]]:
        """Return the steps of one parameter that lose least for what they save, each worth less than the one before."""

        def lost(choice: Choice) -> float:
            return loss[choice] if choice in loss else severity(name, choice) ** 2

        found: list[tuple[float, str, Choice, float]] = []
        at = self._start[name]
        while True:
            worth = [
                ((lost(c) - lost(at)) / (cost[at] - cost[c]), c)
                for c in self._space.parameters[name]
                if cost.get(c, 0.0) < cost.get(at, 0.0) and severity(name, c) > severity(name, at)
            ]
            if not worth:
                return found
            # Of equal worth the harshest, so that it is one step.
            value, choice = min(worth, key=lambda pair: (pair[0], -severity(name, pair[1])))
            # A large step is taken in the small ones that are offered between, so that a limit can be used.
            offered = sorted(self._space.parameters[name], key=lambda c: severity(name, c))
            for step in offered[offered.index(at) + 1 : offered.index(choice) + 1]:
                if cost.get(step, math.inf) < cost[at]:
                    found.append((value, name, step, lost(step) - lost(at)))
                    at = step

    def at(self, steps: int) -> Choices:
        """Return the choices after so many steps."""
        return {**self._start, **{name: choice for _, name, choice, _ in self._steps[:steps]}}

    def loss(self, steps: int) -> float:
        """Return what so many steps lose, as a sum."""
        return sum(lost for *_, lost in self._steps[:steps])

    def predicted(self, steps: int) -> float:
        """Return what the network after so many steps is predicted to cost."""
        if steps not in self._predicted:
            self._predicted[steps] = self._cost(self._space.policy(self.at(steps)))
        return self._predicted[steps]

    def measured(self, steps: int, cost: float) -> None:
        """Take note of what the network after so many steps costs."""
        predicted = self.predicted(steps)
        self._anchors = [anchor for anchor in self._anchors if anchor[0] != predicted]
        insort(self._anchors, (predicted, cost))

    def expected(self, steps: int) -> float:
        """Return what the network after so many steps will cost, by predictions and what was measured beside it."""
        here = self.predicted(steps)
        if not self._anchors:
            return here
        at = bisect_right(self._anchors, here, key=lambda anchor: anchor[0])
        # The two measured networks around it, or the nearest two: what predictions leave out does not shrink with them.
        first = min(max(at - 1, 0), max(len(self._anchors) - 2, 0))
        (low, low_cost), *others = self._anchors[first : first + 2]
        if others and (high_cost := others[0][1]) > low_cost:
            return max(low_cost + (high_cost - low_cost) * (here - low) / (others[0][0] - low), 0.0)
        nearest = self._anchors[0] if at == 0 else self._anchors[at - 1]
        return here * nearest[1] / nearest[0]

    def steps_to(self, cost: float) -> int:
        """Return the fewest steps after which the network is expected to cost at most this; all where none does."""
        low, high = -1, len(self)
        while high - low > 1:
            middle = (low + high) // 2
            if self.expected(middle) <= cost:
                high = middle
            else:
                low = middle
        return high

    def between(self, mild: int, harsh: int) -> int:
        """Return the steps half-way between two places of the path, by cost; one of the two where there is none."""
        wanted = (self.expected(mild) + self.expected(harsh)) / 2
        return min(max(self.steps_to(wanted), mild), harsh)
