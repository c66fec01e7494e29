"""What a good engineer tries first: int8, without the layers it harms, then the mildest network inside the limit.

These trials come before the sampler's, which learns from them. They give, after two or three networks, a result that
one call of a quantization tool does not beat, and approach the limit from the safe side: what is far inside it has been
compressed more than it had to be. Owns the order; `TrialLoop` runs the trials, `ChoicePath` knows the way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from autocompress.exploration.choice_path import ChoicePath, Choices
from autocompress.exploration.constraints import Constraints
from autocompress.exploration.int8_sensitivity import Int8Sensitivity, harmful
from autocompress.exploration.knapsack.problem import Costs
from autocompress.policy import CompressionPolicy
from autocompress.runs.records import TrialRecord
from autocompress.space.search_space import Choice, SearchSpace

# Share of the allowed drop that int8 may take before layers are left out, and that it is to take then: what follows
# takes some, too, and validation data are not test data.
_ENOUGH, _AIM = 0.7, 0.5
# Networks with harmful layers left out, by how much less is left of what int8 does each time.
_LEFT_OUT, _LESS = 2, 3.0
# Where int8 as a whole could not be built: its share of the divergence that is to be left.
_REFUSED = 0.25
# Networks that approach the limit on one path, how far below it they aim and may come out, as shares of the limit.
_APPROACH, _BELOW, _NEAR = 4, 0.03, 0.07
# Paths that are tried where the one that loses least is not accurate enough at the limit.
_TRIED = 2
# Networks half-way back where the one at the limit is not accurate enough, or further on where there is no limit.
_HALFWAY = 2
# Of the start's cost, where there is no limit to aim at.
_FIRST_CUT = 0.75
# Channels and blocks, or ranks: both in one layer ruin each other.
_PATHS = (frozenset({"prune", "block", "sparsity"}), frozenset({"rank", "sparsity"}))


@dataclass(frozen=True)
class Knowns:
    """What is known before the first trial.

    Attributes:
        costs: Of each choice, predicted, in shares of the uncompressed network's.
        cost: Predicts the cost of a whole network.
        losses: Of single choices, as far as they are known.
        divergence: Measures how far the outputs of a network are from the uncompressed one's, without building it; None
            where there is no time for that.
        int8: Returns the network with every layer in int8, and each layer's part of what that does; None where that
            cannot be made.
    """

    costs: Costs
    cost: Callable[[CompressionPolicy], float]
    losses: Mapping[str, Mapping[Choice, float]]
    divergence: Callable[[CompressionPolicy], float | None] = lambda policy: None
    int8: Callable[[], tuple[Int8Sensitivity, Mapping[str, float]] | None] = lambda: None


class FirstCandidates:
    """Run the first trials of a search.

    Args:
        attempt: Runs a trial with these choices and returns its record; None where it failed or time is up.
        space: What may be chosen.
        constraints: Limits.
        knowns: What is known of choices.
        on_message: Called with what the user should know.
    """

    def __init__(
        self, attempt: Callable[[Choices], TrialRecord | None], space: SearchSpace, constraints: Constraints,
        knowns: Knowns, on_message: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self._attempt, self._space, self._constraints, self._knowns = attempt, space, constraints, knowns
        self._allowed, self._on_message = constraints.allowed_drop, on_message
        # The mildest and the fastest that is known to be accurate enough.
        self._safe: tuple[Choices, float] = (space.everywhere(), 1.0)

    def run(self) -> None:
        """Run them; as many as `attempt` has time for."""
        self._int8()
        budget = self._constraints.budget
        if budget is None:
            limited = self._constraints.max_drop is not None
            for path in self._ordered(_FIRST_CUT * self._safe[1])[:1] if limited else ():
                self._further(path)
        elif self._safe[1] > budget:
            paths = self._ordered(budget)
            if paths and not self._reachable(paths, budget):
                return
            for path in paths[:_TRIED]:
                if self._approach(path, budget):
                    return

    def reach(self, choices: Choices, cost: float) -> None:
        """Go on from a network that is over the limit until one is inside it.

        Args:
            choices: Of the network.
            cost: What it takes, in shares of the uncompressed one.
        """
        budget = self._constraints.budget
        if budget is None or cost <= budget:
            return
        self._safe = choices, cost
        for path in self._ordered(budget)[:_TRIED]:
            if self._approach(path, budget):
                return

    # -- int8 ---------------------------------------------------------------------------------------------------------

    def _int8(self) -> None:
        """Try int8 everywhere, then without the layers that it harms most, until the drop is small enough."""
        if not self._space.int8_layers:
            return
        everywhere = self._space.everywhere(dtype="int8")
        record = self._tried(everywhere)
        drop = None if record is None else self._constraints.drop(record)
        if (drop is not None and drop <= _ENOUGH * self._allowed) or "dtype/*" in everywhere:
            return
        known = self._knowns.int8()
        if known is None:
            return
        found, parts = known
        share = _REFUSED if drop is None else min(_AIM * self._allowed / drop, 1 / _LESS)
        target = share * found.together()
        for _ in range(_LEFT_OUT):
            left_out = harmful(found, parts, target)
            choices: Choices = {**everywhere, **{f"dtype/{layer}": "dense" for layer in left_out}}
            record = self._tried({name: choices[name] for name in everywhere})
            if record is not None and self._constraints.within_drop(record):
                return
            target /= _LESS

    # -- the limit ----------------------------------------------------------------------------------------------------

    def _ordered(self, cost: float) -> list[ChoicePath]:
        """Return the paths from what is known to be accurate on, the one that loses least at this cost first.

        What the networks there do is measured, as far as there is time: sums of what choices lose mislead, the more the
        less of them were measured.
        """
        paths = [p for kinds in _PATHS for even in (False, True) if len(p := self._path(kinds, even=even))]
        reaching = [path for path in paths if path.expected(len(path)) <= cost] or paths
        lost: dict[int, tuple[bool, float]] = {}
        for path in reaching:
            steps = path.steps_to(cost)
            found = self._knowns.divergence(self._space.policy(path.at(steps))) if len(reaching) > 1 else None
            lost[id(path)] = (found is None, path.loss(steps) if found is None else found)
        return sorted(reaching, key=lambda path: lost[id(path)])

    def _path(self, kinds: Collection[str], *, even: bool) -> ChoicePath:
        knowns = self._knowns
        path = ChoicePath(
            self._space, self._safe[0], kinds, costs=knowns.costs, losses=knowns.losses, cost=knowns.cost, even=even
        )
        path.measured(0, self._safe[1])
        return path

    def _reachable(self, paths: Sequence[ChoicePath], budget: float) -> bool:
        """Return whether a network may meet the limit; where none is expected to, the most compressed one tells."""
        path = min(paths, key=lambda path: path.expected(len(path)))
        if path.expected(len(path)) <= budget:
            return True
        record = self._tried(path.at(len(path)))
        if record is None:
            return True
        cost = self._constraints.cost(record)
        path.measured(len(path), cost)
        if cost <= budget:
            return True
        self._on_message(
            f"The limit looks out of reach: the most compressed network that the search space is expected to give "
            f"takes {cost:.3g}x of the uncompressed one, and {budget:.3g}x was asked. Within reach is about "
            f"{cost:.3g}x to 1x: a mixture may come a little lower, and a wider --space further."
        )
        return False

    def _approach(self, path: ChoicePath, budget: float) -> bool:
        """Try networks of a path until one is just inside the limit, then half-way back; return whether one is good."""
        tried: dict[int, TrialRecord | None] = {}
        inside: int | None = None
        for _ in range(_APPROACH):
            steps = path.steps_to(budget * (1 - _BELOW))
            if steps in tried:
                break
            record = tried[steps] = self._tried(path.at(steps))
            if record is None:
                break
            cost = self._constraints.cost(record)
            path.measured(steps, cost)
            if cost <= budget:
                inside = steps if inside is None else min(inside, steps)
                if cost >= budget * (1 - _NEAR):
                    break
        if inside is None:
            return False
        best = tried[inside]
        if best is not None and self._constraints.within_drop(best):
            return True
        self._halfway(path, 0, inside, tried)
        return False

    def _further(self, path: ChoicePath) -> None:
        """Try harsher networks while they are accurate enough, and milder ones where they are not."""
        start = self._safe[1]
        tried: dict[int, TrialRecord | None] = {}
        steps = path.steps_to(_FIRST_CUT * start)
        record = tried[steps] = self._tried(path.at(steps))
        if record is None:
            return
        path.measured(steps, self._constraints.cost(record))
        if self._constraints.within_drop(record):
            self._halfway(path, steps, len(path), tried)
        else:
            self._halfway(path, 0, steps, tried)

    def _halfway(self, path: ChoicePath, mild: int, harsh: int, tried: dict[int, TrialRecord | None]) -> None:
        """Look for the harshest network between two places that is accurate enough."""
        for _ in range(_HALFWAY):
            steps = path.between(mild, harsh)
            if steps in (mild, harsh) or steps in tried:
                return
            record = tried[steps] = self._tried(path.at(steps))
            if record is None:
                return
            path.measured(steps, self._constraints.cost(record))
            mild, harsh = (steps, harsh) if self._constraints.within_drop(record) else (mild, steps)

    # -- trials -------------------------------------------------------------------------------------------------------

    def _tried(self, choices: Choices) -> TrialRecord | None:
        """Run a trial; what is accurate enough and faster than what was known is where paths begin."""
        record = self._attempt(choices)
        if record is None or record.measurement is None or record.accuracy is None:
            return None
        cost = self._constraints.cost(record)
        if self._constraints.within_drop(record) and cost < self._safe[1]:
            self._safe = choices, cost
        return record
