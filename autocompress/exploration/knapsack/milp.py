"""The multiple-choice knapsack: one choice for every parameter, least loss within a budget of milliseconds.

The problem is linear once every pair term has its own variables, and is solved by HiGHS (Huangfu & Hall, "Parallelizing
the dual revised simplex method", 2018) through `scipy.optimize.milp`. A relaxation (`relaxation`) comes first: it is
milliseconds where the exact solver may need seconds, its bound often proves its answer good enough, and it is what
remains where the solver runs out of time or the problem is too large for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from autocompress.errors import ConfigError
from autocompress.exploration.knapsack.choice_graph import Graph
from autocompress.exploration.knapsack.problem import Array, Choice, Index, LossCostTables, Problem
from autocompress.exploration.knapsack.relaxation import Relaxation

# Columns HiGHS is given; beyond, building the model alone takes seconds.
_MOST_COLUMNS = 60_000
GAP = 1e-3
TIME_LIMIT_S = 5.0

Status = Literal["optimal", "time_limit", "relaxed"]


@dataclass(frozen=True)
class Allocation:
    """One solution.

    Attributes:
        choices: Parameter to choice; what is switched off takes its first choice.
        loss: Sum of the losses.
        cost_ms: Sum of the costs.
        status: ``"optimal"`` within the gap; ``"time_limit"``: the best found before the solver's time was up;
            ``"relaxed"``: from the relaxation alone, the problem being too large for the solver or the solver failing.
        bound: No allocation within the budget loses less; -inf where unknown.
    """

    choices: dict[str, Choice]
    loss: float
    cost_ms: float
    status: Status
    bound: float

    @property
    def warning(self) -> str | None:
        """What a user should be told of the solution, or None."""
        if self.status == "optimal":
            return None
        gap = f"at most {self.loss - self.bound:.3g} above the best" if np.isfinite(self.bound) else "without a bound"
        why = "ran out of time" if self.status == "time_limit" else "was not used (problem too large) or failed"
        return f"The exact solver {why}; the allocation is the best one found, its loss {self.loss:.3g} {gap}."


def solve(problem: Problem, budget: float, *, gap: float = GAP, time_limit_s: float = TIME_LIMIT_S) -> Allocation:
    """Return the allocation that loses least and costs at most `budget` ms.

    Args:
        problem: What may be chosen.
        budget: In the unit of the costs.
        gap: Relative distance from the bound that counts as optimal.
        time_limit_s: Of the exact solver.

    Raises:
        ConfigError: Nothing is within the budget (the message says what the cheapest costs), or the problem
            contradicts itself.
    """
    return spread(problem, [budget], gap=gap, time_limit_s=time_limit_s)[0]


def spread(
    problem: Problem, budgets: Sequence[float], *, gap: float = GAP, time_limit_s: float = TIME_LIMIT_S
) -> list[Allocation]:
    """Return one allocation for each budget; see `solve`."""
    graph = Graph(problem.costs)
    weights = graph.weigh(graph.flatten(problem.losses), pair_losses=problem.pair_losses)
    solver = Solver(weights)
    found = []
    for budget in budgets:
        chosen, status, bound = solver.solve(budget, gap=gap, time_limit_s=time_limit_s)
        loss, cost = weights.totals(chosen)
        found.append(Allocation(graph.named(graph.to_positions(chosen)), loss, cost, status, bound))
    return found


class Solver:
    """Solve one set of weights for any number of budgets.

    Raises:
        ConfigError: No combination of choices is allowed.
    """

    def __init__(self, weights: LossCostTables) -> None:
        self.weights = weights
        self.relaxation = Relaxation(weights)
        self.cheapest = self.relaxation.cheapest()
        self._model: _Model | None = None
        if not self.relaxation.exact or not np.isfinite(weights.totals(self.cheapest)[0]):
            self._settle_cheapest()
        self.cheapest_cost = weights.totals(self.cheapest)[1]

    def _settle_cheapest(self) -> None:
        """Coordinate descent may end in a forbidden pair, or above the least cost: ask the exact solver."""
        model = self._whole()
        if model is not None:
            cost = np.where(np.isinf(model.loss), 0.0, model.cost)
            found, _ = model.solve(cost, None, GAP, TIME_LIMIT_S)
            if found is not None:
                self.cheapest = found
        if not np.isfinite(self.weights.totals(self.cheapest)[0]):
            raise ConfigError(
                "No combination of choices is allowed: the excluded pairs, equalities and switches contradict each "
                "other. Allow more choices."
            )

    def _whole(self) -> _Model | None:
        columns = int(np.isfinite(self.weights.loss).sum()) + sum(e.loss.size for e in self.weights.edges)
        if columns > _MOST_COLUMNS:
            return None
        if self._model is None:
            self._model = _Model(self.weights, np.isfinite(self.weights.loss))
        return self._model

    def solve(
        self, budget: float, *, gap: float = GAP, time_limit_s: float = TIME_LIMIT_S
    ) -> tuple[Index, Status, float]:
        """Return the state of every node, how good it is, and the bound.

        Raises:
            ConfigError: Nothing is within the budget.
        """
        # Sums of floats come out one unit apart, depending on their order.
        slack = 1e-9 * max(1.0, abs(self.cheapest_cost))
        if not budget >= self.cheapest_cost - slack:
            raise ConfigError(
                f"No choice fits a budget of {budget:.6g}: the cheapest one costs {self.cheapest_cost:.6g}. Raise the "
                "budget, or offer cheaper choices."
            )
        budget += slack
        relaxed = self.relaxation.solve(budget, self.cheapest)
        loss = self.weights.totals(relaxed.chosen)[0]
        if loss - relaxed.bound <= gap * max(abs(loss), 1e-12):
            return relaxed.chosen, "optimal", relaxed.bound
        model = self._reduced(relaxed.price, relaxed.bound, loss)
        if model is None or time_limit_s <= 0:
            return relaxed.chosen, "relaxed", relaxed.bound
        found, outcome = model.solve(None, budget, gap, time_limit_s)
        if found is not None and self.weights.totals(found)[0] < loss and self.weights.totals(found)[1] <= budget:
            chosen = found
        else:
            chosen = relaxed.chosen
        if outcome == "optimal":
            loss = self.weights.totals(chosen)[0]
            return chosen, "optimal", max(relaxed.bound, loss - gap * abs(loss))
        return chosen, "time_limit" if outcome == "time_limit" else "relaxed", relaxed.bound

    def _reduced(self, price: float, bound: float, loss: float) -> _Model | None:
        """Return the exact model without the choices that the bound rules out."""
        allowed = np.isfinite(self.weights.loss)
        if np.isfinite(bound):
            # A node without pairs adds its own minimum to the bound: any other choice adds the difference.
            alone = np.ones(len(allowed), bool)
            for edge in self.weights.edges:
                alone[[edge.first, edge.second]] = False
            priced = self.weights.loss + price * self.weights.cost
            dearer = priced - priced.min(1, keepdims=True)
            allowed &= ~(alone[:, None] & (dearer > loss - bound + 1e-9))
        columns = int(allowed.sum()) + sum(e.loss.size for e in self.weights.edges)
        return _Model(self.weights, allowed) if columns <= _MOST_COLUMNS else None


class _Model:
    """The linear form: a column per choice, and per pair of choices of an edge.

    A pair's columns sum to those of its choices, so they are whole where the choices are.
    """

    def __init__(self, weights: LossCostTables, allowed: Array) -> None:
        self.weights = weights
        nodes, states = np.nonzero(allowed)
        self._nodes, self._states = nodes, states
        column = np.full(allowed.shape, -1, np.int64)
        column[nodes, states] = np.arange(len(nodes))
        loss, cost = [weights.loss[nodes, states]], [weights.cost[nodes, states]]
        rows, columns, values = [nodes], [np.arange(len(nodes))], [np.ones(len(nodes))]
        sums = [np.ones(len(weights.loss))]
        row, next_column = len(weights.loss), len(nodes)
        for edge in weights.edges:
            a, b = np.nonzero(np.isfinite(edge.loss))
            keep = (column[edge.first, a] >= 0) & (column[edge.second, b] >= 0)
            a, b = a[keep], b[keep]
            own = next_column + np.arange(len(a))
            next_column += len(a)
            loss.append(edge.loss[a, b])
            cost.append(edge.cost[a, b])
            for node, side in ((edge.first, a), (edge.second, b)):
                mine = np.flatnonzero(allowed[node])
                at = np.full(allowed.shape[1], -1, np.int64)
                at[mine] = row + np.arange(len(mine))
                rows += [at[side], at[mine]]
                columns += [own, column[node, mine]]
                values += [np.ones(len(own)), -np.ones(len(mine))]
                sums.append(np.zeros(len(mine)))
                row += len(mine)
        self.loss, self.cost = np.concatenate(loss), np.concatenate(cost)
        where = np.concatenate(rows), np.concatenate(columns)
        self._matrix = sparse.csr_array((np.concatenate(values), where), shape=(row, next_column))
        self._sums = np.concatenate(sums)

    def solve(
        self, objective: Array | None, budget: float | None, gap: float, time_limit_s: float
    ) -> tuple[Index | None, str]:
        """Return the states found, or None, and ``"optimal"``, ``"time_limit"`` or ``"failed"``."""
        constraints = [LinearConstraint(self._matrix, self._sums, self._sums)]
        if budget is not None:
            spare = budget - self.weights.fixed_cost
            constraints.append(LinearConstraint(sparse.csr_array(self.cost[None, :]), -np.inf, spare))
        whole = np.zeros(len(self.loss), np.int64)
        whole[: len(self._nodes)] = 1
        result = milp(
            self.loss if objective is None else objective, integrality=whole, bounds=Bounds(0, 1),
            constraints=constraints, options={"time_limit": time_limit_s, "mip_rel_gap": gap},
        )  # fmt: skip
        outcome = {0: "optimal", 1: "time_limit"}.get(result.status, "failed")
        if result.x is None:
            return None, outcome
        taken = np.zeros(self.weights.loss.shape)
        taken[self._nodes, self._states] = result.x[: len(self._nodes)]
        return taken.argmax(1).astype(np.int64), outcome
