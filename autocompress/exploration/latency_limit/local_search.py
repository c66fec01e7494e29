"""One proposal moved to the latency limit, step by step, by predictions that take a millisecond.

A local search: what it prefers is an assumption about quality (`severity`), which trials then measure. Knows neither
predictor nor study.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial

from autocompress.policy import CompressionPolicy
from autocompress.space.parameter import Parameter
from autocompress.space.search_space import Choice, SearchSpace
from autocompress.space.severity import severity

Choices = dict[str, Choice]

# Predictions to fit one network (some 0.1 s), and those of them that are kept to make it a new one.
_PREDICTIONS, _KEPT = 150, 20
# Which of two choices takes more away is not known better than this.
_DOUBT = 0.2


class LocalSearch:
    """One proposal on its way to the limit.

    Args:
        choices: The proposal; parameters that are missing do nothing.
        space: What may be chosen.
        expect: Returns the ratio to count with.
        rng: Decides between moves that are equally good.
        blocks: Those that may be removed, the one whose removal changes least first.

    Attributes:
        choices: As they are now.
        ratio: What is expected of them.
    """

    def __init__(
        self,
        choices: Mapping[str, Choice],
        space: SearchSpace,
        expect: Callable[[CompressionPolicy], float],
        rng: random.Random,
        blocks: Sequence[str] = (),
    ) -> None:
        self._policy, self._expect, self._rng, self._blocks = space.policy, expect, rng, blocks
        self._steps = {
            name: tuple(sorted(offered, key=partial(severity, name))) for name, offered in space.parameters.items()
        }
        self._known: dict[tuple[Choice, ...], float] = {}
        self._saves: dict[tuple[str, Choice], float] = {}
        self._asked = 0
        self._doubt = {name: self._rng.uniform(0, _DOUBT) for name in self._steps}
        self.choices: Choices = {name: choices.get(name, steps[0]) for name, steps in self._steps.items()}
        self.ratio = self._ratio(self.choices)

    def _ratio(self, choices: Choices) -> float:
        key = tuple(choices.values())
        if key not in self._known:
            self._asked += 1
            self._known[key] = self._expect(self._policy(choices))
        return self._known[key]

    def _left(self, kept: int) -> bool:
        return self._asked < _PREDICTIONS - kept

    def _at(self, name: str) -> int:
        return self._steps[name].index(self.choices[name])

    def _weight(self, name: str, choice: Choice) -> float:
        return severity(name, choice, self._blocks) + self._doubt[name]

    def _take(self, choices: Choices) -> None:
        self.choices, self.ratio = choices, self._ratio(choices)

    def compress(self, top: float) -> None:
        """Compress more, evenly, until the ratio is at or below `top`; as far as it goes where it cannot be."""
        kinds = {Parameter.of(name).kind for name in self._steps}
        # A kind that makes the network slower, as int8 on some engines, is left alone.
        useful = {kind for kind in sorted(kinds) if self._ratio(self._all_of(kind)) < self.ratio}
        moves = [
            (self._weight(name, step), name, step)
            for name, steps in self._steps.items()
            if Parameter.of(name).kind in useful
            for step in steps[self._at(name) + 1 :]
        ]
        self._bisect([(name, step) for _, name, step in sorted(moves, key=lambda move: move[0])], top, fewest=True)

    def _all_of(self, kind: str) -> Choices:
        strongest = {name: steps[-1] for name, steps in self._steps.items() if name.startswith(f"{kind}/")}
        return {**self.choices, **strongest}

    def relax(self, top: float) -> None:
        """Undo the most severe choices as long as the ratio stays at or below `top`."""
        moves = [
            (self._weight(name, steps[number + 1]), name, steps[number])
            for name, steps in self._steps.items()
            if self._saves.get((name, self.choices[name]), 0.0) <= top - self.ratio
            for number in range(self._at(name))
        ]
        moves.sort(key=lambda move: -move[0])
        while moves and self._left(_KEPT):
            name, step = moves[0][1:]
            ratio = self._ratio({**self.choices, name: step})
            if ratio <= top:
                break
            self._saves[name, self.choices[name]] = ratio - self.ratio
            moves = [move for move in moves if move[1] != name]
        self._bisect([(name, step) for _, name, step in moves], top, fewest=False)

    def _bisect(self, moves: Sequence[tuple[str, Choice]], top: float, *, fewest: bool) -> None:
        """Make the first moves: the fewest that reach `top`, or the most that keep to it."""

        def after(count: int) -> Choices:
            return {**self.choices, **dict(moves[:count])}

        low, high = 0, len(moves)
        if (self._ratio(after(high)) <= top) != fewest:
            low = high
        while high - low > 1:
            middle = (low + high) // 2
            if (self._ratio(after(middle)) <= top) == fewest:
                high = middle
            else:
                low = middle
        self._take(after(high if fewest else low))

    def polish(self, bottom: float, top: float) -> None:
        """Undo, one by one and the most severe first, what saves nothing, and as much else as there is room for."""
        before: Choices | None = None
        while before != self.choices and self._left(_KEPT):
            before = self.choices
            if self.ratio < bottom:
                self.relax(top)
            self._undo(bottom, top)

    def _undo(self, bottom: float, top: float) -> None:
        names = [name for name in self._steps if self._at(name)]
        waiting = deque(sorted(names, key=lambda name: -self._weight(name, self.choices[name])))
        while waiting and self._left(_KEPT):
            name = waiting.popleft()
            room = top - self.ratio if self.ratio < bottom else 0.0
            saves = self._saves.get((name, self.choices[name]), 0.0)
            # What a step saves changes little with the others: one that was far too much is not asked for again.
            if saves > max(1.5 * room, 0.0):
                continue
            choices = {**self.choices, name: self._steps[name][self._at(name) - 1]}
            ratio = self._ratio(choices)
            if ratio <= self.ratio + room and ratio <= max(top, self.ratio):
                self._take(choices)
                if self._at(name):
                    waiting.append(name)
            else:
                self._saves[name, self.choices[name]] = ratio - self.ratio

    def swap(self, bottom: float, top: float) -> None:
        """Undo one step for another that is no more severe, at random, while that comes nearer to `top` from below."""
        for _ in range(_PREDICTIONS):
            undone = [name for name in self._steps if self._at(name)]
            added = [name for name, steps in self._steps.items() if self._at(name) < len(steps) - 1]
            if not undone or not added or self.ratio >= bottom or not self._left(_KEPT):
                return
            less, more = self._rng.choice(undone), self._rng.choice(added)
            step = self._steps[more][self._at(more) + 1]
            if less == more or self._weight(more, step) > self._weight(less, self.choices[less]):
                continue
            choices = {**self.choices, less: self._steps[less][self._at(less) - 1], more: step}
            if self.ratio < self._ratio(choices) <= top:
                self._take(choices)

    def perturb(self, bottom: float, top: float, taken: Container[CompressionPolicy]) -> None:
        """Walk at random along the limit, further and further below it, until the network is none of those taken."""
        names = [name for name, steps in self._steps.items() if len(steps) > 1]
        tries = 0
        while names and self._policy(self.choices) in taken and self._left(0) and tries < _PREDICTIONS:
            tries += 1
            choices = dict(self.choices)
            for name in self._rng.sample(names, min(len(names), self._rng.choice((1, 2)))):
                steps = self._steps[name]
                at = min(max(self._at(name) + self._rng.choice((-1, 1)), 0), len(steps) - 1)
                choices[name] = steps[at]
            ratio = self._ratio(choices)
            low = bottom - tries / _PREDICTIONS * top
            # On its way back to the limit, whatever is nearer to it will do.
            if low <= ratio <= top or top < ratio < self.ratio:
                self._take(choices)
