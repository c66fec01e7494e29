"""The knapsack with its budget turned into a price: fast, bounded from below, and nearly right.

For a price of so much loss per millisecond the problem has no budget and falls apart: minimising over a graph of small
width is exact by eliminating one node after the other (min-sum; Dechter, "Bucket elimination", 1999). The best price is
found by the secant rule on the dual; what budget is then left over is spent greedily. Knows arrays only.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from autocompress.exploration.knapsack.problem import Array, Index, LossCostTables

# Largest table of an elimination: 2 MB of floats. Wider graphs are minimised by coordinate descent, without a bound.
_WIDEST = 250_000
_PRICES = 40


@dataclass(frozen=True)
class Relaxed:
    """What a price found.

    Attributes:
        chosen: State of every node, within the budget.
        bound: No solution loses less than this; -inf where unknown.
        price: Loss per millisecond at the end.
    """

    chosen: Index
    bound: float
    price: float


class Relaxation:
    """Minimise loss plus price times cost on one set of weights.

    Args:
        weights: The figures. Their edges may not change afterwards.

    Attributes:
        exact: Whether `minimise` finds the true minimum.
    """

    def __init__(self, weights: LossCostTables) -> None:
        self.weights = weights
        count = len(weights.loss)
        self._sizes = [int(np.flatnonzero(np.isfinite(row)).max()) + 1 for row in weights.loss]
        self._edges_of: list[list[int]] = [[] for _ in range(count)]
        for number, edge in enumerate(weights.edges):
            for end, width in zip((edge.first, edge.second), edge.loss.shape, strict=True):
                self._edges_of[end].append(number)
                self._sizes[end] = width
        self._joined = [i for i in range(count) if self._edges_of[i]]
        self.exact = self._plan()
        self._rows = np.arange(count)

    def _plan(self) -> bool:
        """Order the elimination, fewest neighbours first; return whether every table stays small."""
        edges = self.weights.edges
        around: dict[int, set[int]] = {i: set() for i in self._joined}
        for edge in edges:
            around[edge.first].add(edge.second)
            around[edge.second].add(edge.first)
        queue = [(len(found), i) for i, found in around.items()]
        heapq.heapify(queue)
        self._order: list[tuple[int, tuple[int, ...]]] = []
        done: set[int] = set()
        while queue:
            degree, node = heapq.heappop(queue)
            if node in done or degree != len(around[node]):
                continue
            near = sorted(around.pop(node))
            if np.prod([float(self._sizes[i]) for i in (node, *near)]) > _WIDEST:
                return False
            done.add(node)
            self._order.append((node, tuple(near)))
            for i in near:
                around[i].discard(node)
                around[i].update(j for j in near if j != i)
                heapq.heappush(queue, (len(around[i]), i))
        return True

    # -- one price ----------------------------------------------------------------------------------------------------

    def minimise(self, price: float) -> tuple[Index, float]:
        """Return the states with the least loss plus `price` times cost, and that minimum.

        An infinite price minimises cost alone.
        """
        weights = self.weights
        if np.isinf(price):
            unary = np.where(np.isinf(weights.loss), np.inf, weights.cost)
            tables = [np.where(np.isinf(e.loss), np.inf, e.cost) for e in weights.edges]
        else:
            unary = weights.loss + price * weights.cost
            tables = [e.loss + price * e.cost for e in weights.edges]
        chosen = unary.argmin(1).astype(np.int64)
        if not weights.edges:
            return chosen, float(unary.min(1).sum())
        if not self.exact:
            return self._descend(unary, tables, chosen)
        alone = np.ones(len(unary), bool)
        alone[self._joined] = False
        total = float(unary[alone].min(1).sum())
        return self._eliminate(unary, tables, chosen, total)

    def _eliminate(self, unary: Array, tables: list[Array], chosen: Index, total: float) -> tuple[Index, float]:
        rank = {node: i for i, (node, _) in enumerate(self._order)}
        waiting: dict[int, list[tuple[tuple[int, ...], Array]]] = {node: [] for node in rank}
        for edge, table in zip(self.weights.edges, tables, strict=True):
            first = min(edge.first, edge.second, key=rank.__getitem__)
            waiting[first].append(((edge.first, edge.second), table))
        best: list[Array] = []
        for node, near in self._order:
            scope = (node, *near)
            joint = unary[node, : self._sizes[node]].reshape(-1, *[1] * len(near))
            for names, table in waiting.pop(node):
                axes = [names.index(n) for n in scope if n in names]
                shape = [self._sizes[n] if n in names else 1 for n in scope]
                joint = joint + table.transpose(axes).reshape(shape)
            if joint.ndim == 1 + len(near):
                joint = np.broadcast_to(joint, [self._sizes[n] for n in scope])
            at = joint.argmin(0)
            best.append(at)
            message = joint.min(0)
            if near:
                waiting[min(near, key=rank.__getitem__)].append((near, message))
            else:
                total += float(message)
        for (node, near), at in zip(reversed(self._order), reversed(best), strict=True):
            chosen[node] = at[tuple(chosen[n] for n in near)]
        return chosen, total

    def _descend(self, unary: Array, tables: list[Array], chosen: Index) -> tuple[Index, float]:
        """Improve one node after the other, given its neighbours, until nothing changes: a local minimum."""
        for _ in range(50):
            before = chosen.copy()
            for node in self._joined:
                row = unary[node, : self._sizes[node]].copy()
                for number in self._edges_of[node]:
                    edge = self.weights.edges[number]
                    if edge.first == node:
                        row += tables[number][:, chosen[edge.second]]
                    else:
                        row += tables[number][chosen[edge.first]]
                chosen[node] = row.argmin()
            if (chosen == before).all():
                break
        value = float(unary[self._rows, chosen].sum())
        value += sum(
            float(t[chosen[e.first], chosen[e.second]]) for e, t in zip(self.weights.edges, tables, strict=True)
        )
        return chosen, value

    # -- a budget -----------------------------------------------------------------------------------------------------

    def cheapest(self) -> Index:
        """Return the states that cost least."""
        return self.minimise(np.inf)[0]

    def solve(self, budget: float, cheapest: Index | None = None) -> Relaxed:
        """Return a good solution within a budget that the cheapest one is within."""
        totals = self.weights.totals
        over, bound = self.minimise(0.0)
        bound += self.weights.fixed_loss
        if totals(over)[1] <= budget:
            return Relaxed(over, bound if self.exact else -np.inf, 0.0)
        within = self.cheapest() if cheapest is None else cheapest
        price, best = 0.0, (totals(within)[0], within)
        for _ in range(_PRICES):
            (loss_over, cost_over), (loss_within, cost_within) = totals(over), totals(within)
            if cost_over <= cost_within:
                break
            price = (loss_within - loss_over) / (cost_over - cost_within)
            if not np.isfinite(price) or price <= 0:
                break
            found, value = self.minimise(price)
            loss, cost = totals(found)
            if self.exact:
                fixed = self.weights.fixed_loss + price * (self.weights.fixed_cost - budget)
                bound = max(bound, value + fixed)
            if cost <= budget:
                if loss < best[0]:
                    best = (loss, found)
                if loss + price * cost >= loss_within + price * cost_within - 1e-12 * abs(loss_within):
                    break
                within = found
            else:
                if loss + price * cost >= loss_over + price * cost_over - 1e-12 * abs(loss_over):
                    break
                over = found
        return Relaxed(self.fill(best[1], budget), bound if self.exact else -np.inf, price)

    def fill(self, chosen: Index, budget: float) -> Index:
        """Spend what is left of the budget: change single nodes while that loses less and still fits."""
        chosen = chosen.copy()
        loss, cost = self.weights.totals(chosen)
        lost, spent = self.conditional(chosen)
        for _ in range(len(chosen)):
            less = lost - lost[self._rows, chosen][:, None]
            more = spent - spent[self._rows, chosen][:, None]
            less[more > budget - cost + 1e-12 * abs(budget)] = np.inf
            node, state = np.unravel_index(int(less.argmin()), less.shape)
            if not less[node, state] < -1e-12 * max(1.0, abs(loss)):
                break
            cost += float(more[node, state])
            loss += float(less[node, state])
            before, chosen[node] = int(chosen[node]), state
            if not self._moved(lost, spent, int(node), before, int(state)):
                lost, spent = self.conditional(chosen)
        return chosen

    def _moved(self, lost: Array, spent: Array, node: int, before: int, now: int) -> bool:
        """Update what `conditional` returned after a change; return False where it must be redone."""
        for number in self._edges_of[node]:
            edge = self.weights.edges[number]
            first = edge.first == node
            other = edge.second if first else edge.first
            loss, cost = (edge.loss, edge.cost) if first else (edge.loss.T, edge.cost.T)
            if not np.isfinite(loss[[before, now]]).all():
                return False
            lost[other, : loss.shape[1]] += loss[now] - loss[before]
            spent[other, : loss.shape[1]] += cost[now] - cost[before]
        return True

    def conditional(self, chosen: Index) -> tuple[Array, Array]:
        """Return loss and cost `(nodes, widest)` of every state of every node, given the states of the others."""
        lost, spent = self.weights.loss.copy(), self.weights.cost.copy()
        for edge in self.weights.edges:
            i, j = edge.first, edge.second
            n, m = edge.loss.shape
            lost[i, :n] += edge.loss[:, chosen[j]]
            spent[i, :n] += edge.cost[:, chosen[j]]
            lost[j, :m] += edge.loss[chosen[i]]
            spent[j, :m] += edge.cost[chosen[i]]
        return lost, spent

    # -- many budgets -------------------------------------------------------------------------------------------------

    def path(self, count: int) -> list[Index]:
        """Return up to `count` solutions on the lower hull of loss against cost, cheapest first.

        The widest gap between two neighbours is opened first, so that a few points describe the whole front.
        """
        ends = [self.minimise(0.0)[0], self.cheapest()]
        # The cheapest of all may lose more than it must: ask again at a steep price.
        points = [(*self.weights.totals(chosen), chosen) for chosen in ends]
        points.sort(key=lambda p: p[1])
        if points[0][1] >= points[-1][1]:
            return [points[0][2]]
        closed: set[tuple[float, float]] = set()
        span_loss = max(points[0][0] - points[-1][0], 1e-12)
        span_cost = points[-1][1] - points[0][1]
        while len(points) < count:
            gaps = [
                (abs(a[0] - b[0]) / span_loss + abs(b[1] - a[1]) / span_cost, i)
                for i, (a, b) in enumerate(pairwise(points))
                if (a[1], b[1]) not in closed
            ]
            if not gaps:
                break
            _, i = max(gaps)
            (loss_a, cost_a, _), (loss_b, cost_b, _) = points[i], points[i + 1]
            price = (loss_a - loss_b) / (cost_b - cost_a)
            found = self.minimise(max(price, 0.0))[0]
            loss, cost = self.weights.totals(found)
            if not cost_a < cost < cost_b:
                closed.add((cost_a, cost_b))
                continue
            points.insert(i + 1, (loss, cost, found))
        return [p[2] for p in points]
