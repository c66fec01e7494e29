"""Which choices to try next: beliefs drawn, the knapsack solved for them, the solution that promises most taken.

With a budget, that is the solution within it that loses least. Without one, solutions along the whole front compete by
the hypervolume they would add to what has been found (Thompson sampling for fronts; Bradford et al., "Efficient
multiobjective optimization employing Gaussian processes, spectral sampling and a genetic algorithm", 2018). From the
best of these it goes on by single changes. The solution of the sums comes first, then a few uniform rows: a solution is
picked for what it is believed to lose, and by sensitivities alone that is believed too well. Knows positions and
numbers; Optuna is `knapsack`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.exploration.knapsack.additive_model import Effects
from autocompress.exploration.knapsack.beliefs import CostBelief, LossModel, flattened, refit_size
from autocompress.exploration.knapsack.choice_graph import Graph
from autocompress.exploration.knapsack.hypervolume import behind_front, hypervolume_gain
from autocompress.exploration.knapsack.milp import Solver
from autocompress.exploration.knapsack.problem import Array, Choice, Index, LossCostTables
from autocompress.exploration.knapsack.relaxation import Relaxation
from autocompress.exploration.knapsack.uniform_rows import uniform_rows

# Trials the models hold. Beyond, those farthest behind the front give way: the front is where accuracy counts.
_CAPACITY = 400
# Trials from which links and scales are chosen.
_TELLING = 100
_PATH, _BETWEEN, _NEIGHBOURS = 24, 12, 96
# Seconds and relative gap of the exact solver, which polishes one solution per proposal.
_POLISH_S, _POLISH_GAP = 0.3, 2e-3
_ATTEMPTS = 200
# Uniform rows among the first trials. With two, fronts of VGG-11 were lower after ten trials; with six, ResNet-20's.
_UNIFORM = 3
# Rows that a climb starts from, its most steps, the changes looked at in each, and those whose cost is asked for.
_STARTS, _STEPS, _CHANGES, _ASKED = 4, 8, 200, 16


@dataclass(frozen=True)
class Tuning:
    """How bold proposals are.

    Attributes:
        thompson_scale: Share of a Thompson draw's deviation that is believed; 0 is greedy, 1 a full draw.
        error: Standard deviation of a measured quality.
    """

    thompson_scale: float = 0.3
    error: float = 0.002


# Tells of rows and their costs how much each promises.
_Promise = Callable[[Sequence[Index], Array], Array]


class Planner:
    """Learn from trials, propose the next.

    Args:
        graph: Of the predicted costs.
        losses: Sensitivities, or None.
        floor: Quality of a ruined result, or None to take the worst seen for it.
        reference: Quality of the row that changes nothing, where it is known; it is tried first where not.
        tuning: How bold.
        interactions: Pairs of parameters whose losses may interact, beside those whose costs do.
        exact: What a row is predicted to cost, where more is known of it than the sum of its choices' costs.
    """

    def __init__(
        self,
        graph: Graph,
        losses: Mapping[str, Mapping[Choice, float]] | None,
        *,
        exact: Callable[[Index], float] | None = None,
        floor: float | None = None,
        reference: float | None = None,
        tuning: Tuning | None = None,
        interactions: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.graph = graph
        self.tuning = tuning or Tuning()
        self._floor = floor
        pairs = {(graph.position(p.first), graph.position(p.second)) for p in graph.costs.pairs}
        pairs |= {(graph.position(a), graph.position(b)) for a, b in interactions}
        self._losses = LossModel(graph, losses, sorted(pairs), _CAPACITY)
        # What the knapsack is solved for has to be a sum; what is chosen among need not.
        self._sums = CostBelief(graph, _CAPACITY)
        self._costs = self._sums if exact is None else CostBelief(graph, _CAPACITY, exact)
        self._beliefs = [self._sums] if exact is None else [self._sums, self._costs]
        self._quality, self._cost = np.zeros(0), np.zeros(0)
        self._dirty = False
        start = graph.read(np.zeros(len(graph.names), np.int64))
        self.reference = None if start is None else graph.to_positions(start)
        # Everything that was ever seen counts for the front, whatever the models have room for.
        self._front: list[tuple[float, float, bytes]] = []
        self._front_rows: dict[bytes, Index] = {}
        self._seen_reference = [] if reference is None else [reference]
        self._best_quality, self._worst_quality = -np.inf, np.inf
        self.count = 0

    # -- learning -----------------------------------------------------------------------------------------------------

    def observe(self, rows: Sequence[Index], quality: Sequence[float], cost: Sequence[float]) -> None:
        """Learn of finished trials.

        Args:
            rows: Position of each parameter's choice, or -1.
            quality: Higher is better.
            cost: In the unit of the budget; NaN where it was not measured.
        """
        ahead = behind_front(np.array(quality, float), np.array(cost, float)) <= 0
        for row, value, spent, leads in zip(rows, quality, cost, ahead, strict=True):
            self._best_quality, self._worst_quality = max(self._best_quality, value), min(self._worst_quality, value)
            if self.reference is not None and (row == self.reference).all():
                self._seen_reference.append(value)
            if leads:
                self._extend_front(row, value, spent)
        self.count += len(rows)
        room = _CAPACITY - len(self._quality)
        if len(rows) > room:
            # A resumed study may bring thousands: only those near the front are worth a row.
            kept = np.sort(np.argsort(behind_front(np.array(quality), np.array(cost)), kind="stable")[: max(room, 0)])
            rest = sorted(set(range(len(rows))) - set(kept.tolist()))
        else:
            kept, rest = np.arange(len(rows)), []
        for i in kept:
            self._losses.add(rows[i])
            for belief in self._beliefs:
                belief.add(rows[i])
        self._quality = np.concatenate([self._quality, np.array(quality, float)[kept]])
        self._cost = np.concatenate([self._cost, np.array(cost, float)[kept]])
        if room <= 0:
            for i in rest:
                self._exchange(rows[i], quality[i], cost[i])
        self._dirty = self._dirty or len(rows) > 0

    def _exchange(self, row: Index, quality: float, cost: float) -> None:
        """Give a new trial the row of the one that is farthest behind the front."""
        worst = int(np.argmax(behind_front(self._quality, self._cost)))
        self._losses.replace(worst, row)
        for belief in self._beliefs:
            belief.replace(worst, row)
        self._quality[worst], self._cost[worst] = quality, cost

    def _extend_front(self, row: Index, quality: float, cost: float) -> None:
        if np.isnan(cost) or any(v >= quality and ms <= cost for v, ms, _ in self._front):
            return
        self._front = [f for f in self._front if f[0] > quality or f[1] < cost]
        key = row.tobytes()
        self._front.append((quality, cost, key))
        self._front_rows[key] = row
        if len(self._front_rows) > 4 * len(self._front) + 16:
            self._front_rows = {k: self._front_rows[k] for _, _, k in self._front}

    def _ends(self) -> tuple[float, float]:
        """Return the quality at which nothing is lost, and the one at which all is."""
        top = float(np.mean(self._seen_reference)) if self._seen_reference else self._best_quality
        if self._floor is not None and self._floor < top:
            return top, self._floor
        return top, top - 1.05 * max(top - self._worst_quality, 1e-9 * max(abs(top), 1.0))

    def share(self, quality: Array) -> Array:
        """Return the share of the quality that is lost, 0 at the reference."""
        top, floor = self._ends()
        return (top - quality) / (top - floor)

    def _learn(self) -> None:
        if self._dirty and len(self._quality):
            top, floor = self._ends()
            # Of the first trials only, so that a resumed study chooses as the interrupted one did.
            size = refit_size(len(self._quality))
            behind = behind_front(self._quality[:size], self._cost[:size])
            telling = np.sort(np.argsort(behind, kind="stable")[:_TELLING])
            self._losses.update(self.share(self._quality), self.tuning.error / (top - floor), telling)
            for belief in self._beliefs:
                belief.update(self._cost, telling)
            self._dirty = False

    # -- proposing ----------------------------------------------------------------------------------------------------

    def propose(
        self, rng: np.random.Generator, budget: float | None, pending: Sequence[Index], known: set[bytes]
    ) -> Index:
        """Return the row to try next: one that is not known, where there is one.

        Args:
            rng: Decides everything that is left to chance.
            budget: Most that may be spent, or None for the whole front.
            pending: Rows that are being tried elsewhere; taken to come out as expected.
            known: All rows that have been tried, or are being, as bytes.
        """
        if self.reference is not None and not self._seen_reference and self.reference.tobytes() not in known:
            return self.reference
        self._learn()
        tried = known - (set() if self.reference is None else {self.reference.tobytes()})
        first = not tried
        thompson_scale = 0.0 if first and len(self._losses.models) > 1 else self.tuning.thompson_scale
        effects = self._losses.effects(rng, thompson_scale)
        if not first and len(tried) <= _UNIFORM:
            even = self._uniform(rng, self._promise(effects, budget, pending), known)
            if even is not None:
                return even
        weights = self._weigh(effects)
        relaxation = Relaxation(weights)
        if budget is not None:
            pool = self._within(rng, weights, budget, first=first)
        elif first:
            pool = self._middle(weights, relaxation)
        else:
            pool = self._along(rng, weights, relaxation)
        rows = [self.graph.to_positions(chosen) for chosen in pool]
        if first and budget is None:
            found = next((row for row in rows if row.tobytes() not in known), None)
        else:
            promise = self._promise(effects, budget, pending)
            if not first:
                rows += self._neighbours(rng)
            found = self._climb(rng, rows, promise, known, steps=0 if first else _STEPS)
        return self._new(rng, rows, known) if found is None else found

    def _uniform(self, rng: np.random.Generator, promise: _Promise, known: set[bytes]) -> Index | None:
        """Return the new uniform row that promises most; None where none promises anything."""
        rows = [row for row in uniform_rows(self.graph, rng) if row.tobytes() not in known]
        if not rows:
            return None
        values = promise(rows, self._costs.total(np.array(rows)))
        at = int(np.argmax(values))
        return rows[at] if values[at] > 0 else None

    def _weigh(self, effects: Effects) -> LossCostTables:
        flat_cost, factor, fixed = self._sums.flat()
        flat_loss = flattened(self.graph, effects.effects)
        return self.graph.weigh(
            flat_loss, flat_cost, self._losses.interactions(effects), pair_scale=factor, fixed_cost=fixed
        )

    def _middle(self, weights: LossCostTables, relaxation: Relaxation) -> list[Index]:
        """Return, alone in a list, the solution whose budget is as many times the least as the most is of it."""
        cheapest, dearest = relaxation.cheapest(), relaxation.minimise(0.0)[0]
        low, high = weights.totals(cheapest)[1], weights.totals(dearest)[1]
        solver = Solver(weights)
        budget = max((max(low, 1e-3 * high) * high) ** 0.5, solver.cheapest_cost)
        return [solver.solve(budget, gap=_POLISH_GAP, time_limit_s=0)[0]]

    def _along(self, rng: np.random.Generator, weights: LossCostTables, relaxation: Relaxation) -> list[Index]:
        """Return solutions along the whole front."""
        path = relaxation.path(_PATH)
        costs = np.array([weights.totals(chosen)[1] for chosen in path])
        found = list(path)
        for budget in rng.uniform(costs.min(), costs.max(), _BETWEEN):
            below = int(np.searchsorted(costs, budget, side="right")) - 1
            found.append(relaxation.fill(path[max(below, 0)], float(budget)))
        return found

    def _within(self, rng: np.random.Generator, weights: LossCostTables, budget: float, *, first: bool) -> list[Index]:
        """Return solutions within a budget, and within some less: predicted costs may be too low."""
        solver = Solver(weights)
        spare = (
            self._costs.spread * np.array([0.0, 0.5, 1.0, 2.0])
            if first
            else self._costs.spread * rng.uniform(-0.5, 2, 4)
        )
        return [
            solver.solve(max(budget * (1 - s), solver.cheapest_cost), gap=_POLISH_GAP, time_limit_s=_POLISH_S)[0]
            for s in spare
        ]

    def _neighbours(self, rng: np.random.Generator) -> list[Index]:
        """Return rows one or two changes away from the front."""
        found: list[Index] = []
        for _ in range(_NEIGHBOURS if self._front else 0):
            _, _, key = self._front[rng.integers(len(self._front))]
            chosen = self.graph.read(np.maximum(self._front_rows[key], 0))
            if chosen is None:
                continue
            row = self._nudged(rng, chosen, int(rng.integers(1, 3)))
            if row is not None:
                found.append(row)
        return found

    def _nudged(self, rng: np.random.Generator, chosen: Index, changes: int) -> Index | None:
        """Return the row after so many changes at random; None where that excludes itself."""
        chosen = chosen.copy()
        for _ in range(changes):
            node = int(rng.integers(len(chosen)))
            chosen[node] = rng.integers(len(self.graph.local[node]))
        return self.graph.canonicalise(chosen)

    def _climb(
        self, rng: np.random.Generator, rows: Sequence[Index], promise: _Promise, known: set[bytes], *, steps: int
    ) -> Index | None:
        """Return the new row that promises most of those given, and of those that changing single choices leads to.

        Sums find solutions whose costs and losses add up; from there it goes on with all that is believed of both.
        """
        values = promise(rows, self._costs.total(np.array(rows)))
        order = np.argsort(-values, kind="stable")
        most, best = -np.inf, None
        for i in order:
            if rows[i].tobytes() not in known:
                most, best = float(values[i]), rows[i]
                break
        for i in order[:_STARTS]:
            row, value = rows[i], values[i]
            for _ in range(steps):
                near = self._changed(rng, row, promise)
                if not near:
                    break
                found = promise(near, self._costs.total(np.array(near)))
                for k in np.argsort(-found, kind="stable"):
                    if near[k].tobytes() not in known:
                        if found[k] > most:
                            most, best = float(found[k]), near[k]
                        break
                at = int(np.argmax(found))
                if found[at] <= value:
                    break
                row, value = near[at], found[at]
        return best

    def _changed(self, rng: np.random.Generator, row: Index, promise: _Promise) -> list[Index]:
        """Return the rows that differ from one in the state of one node and promise most by what sums say of costs."""
        chosen = self.graph.read(np.maximum(row, 0))
        if chosen is None:
            return []
        nodes = [(i, len(self.graph.local[i])) for i in range(len(chosen)) if chosen[i] != self.graph.off[i]]
        changes = [(i, state) for i, offered in nodes for state in range(offered) if state != chosen[i]]
        if len(changes) > _CHANGES:
            changes = [changes[k] for k in rng.choice(len(changes), _CHANGES, replace=False)]
        found = self.graph.changed(chosen, changes)
        if len(found) > _ASKED and self._sums is not self._costs:
            here = np.array([row])
            cost = self._sums.total(np.array(found)) + self._costs.total(here) - self._sums.total(here)
            found = [found[k] for k in np.argsort(-promise(found, cost), kind="stable")[:_ASKED]]
        return found

    def _promise(self, effects: Effects, budget: float | None, pending: Sequence[Index]) -> _Promise:
        """Return what tells how much rows of given costs promise under the drawn losses, `(rows,)`; more is better."""
        front = [(float(self.share(np.array(value))), ms) for value, ms, _ in self._front]
        if pending and budget is None:
            running = np.array(pending)
            believed = self._losses.shares(self._losses.effects(None, 0.0), running)
            front += list(zip(believed.tolist(), self._costs.total(running).tolist(), strict=True))
        whole = [] if self.reference is None else self._costs.total(self.reference[None]).tolist()
        # Where nothing is known yet no row promises more than another.
        limit = max([ms for _, ms in front] + whole, default=0.0)

        def promise(rows: Sequence[Index], cost: Array) -> Array:
            loss = self._losses.shares(effects, np.array(rows))
            if budget is None:
                return hypervolume_gain(front, np.stack([loss, cost], 1), limit)
            # Within the budget what loses least, beyond it what is least beyond: nothing to hope for.
            over = np.maximum(cost / budget - 1, 0.0)
            return np.where(over > 0, -2 - over, 1 - np.minimum(loss, 1.0))

        return promise

    def _new(self, rng: np.random.Generator, rows: list[Index], known: set[bytes]) -> Index:
        """Return something new: a solution with more and more changes; a known one where all is known."""
        for attempt in range(_ATTEMPTS):
            chosen = self.graph.read(np.maximum(rows[rng.integers(len(rows))], 0))
            if chosen is None:
                continue
            row = self._nudged(rng, chosen, 1 + attempt // 20)
            if row is not None and row.tobytes() not in known:
                return row
        return rows[0]
