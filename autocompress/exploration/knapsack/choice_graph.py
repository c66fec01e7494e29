"""The one array form of a knapsack's problem: equal parameters are merged, implications are ordinary pair terms.

Solves nothing; knows nothing of models, engines or Optuna.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from autocompress.errors import ConfigError, nearest
from autocompress.exploration.knapsack.problem import Array, Choice, Costs, Edge, Index, LossCostTables, Table


class Graph:
    """The structure of `Costs`: nodes are sets of equal parameters, edges join those with a term in common.

    Attributes:
        names: Parameters, in the caller's order.
        choices: Of each parameter, by position.
        offsets: Where each parameter's choices begin in a flat vector of all choices; one more at the end.
        first_free: For each node, the index of its state "switched off", or -1.

    Raises:
        ConfigError: Nothing to choose, contradictory constraints, tables of the wrong shape, unknown names.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.names = list(costs.ms)
        self.choices = [tuple(costs.ms[name]) for name in self.names]
        if not self.names:
            raise ConfigError("There is nothing to allocate: the costs name no parameter.")
        for name, offered in zip(self.names, self.choices, strict=True):
            if not offered:
                raise ConfigError(f"Parameter {name!r} has no choices.")
        self._at = {name: i for i, name in enumerate(self.names)}
        self.offsets = np.concatenate([[0], np.cumsum([len(c) for c in self.choices])]).astype(np.int64)
        self.flat_cost = np.array([v for name in self.names for v in costs.ms[name].values()], dtype=np.float64)
        self._finite("cost", self.flat_cost)
        self._merge()
        self._switch()
        self.width = max(self.sizes)
        tables = [(p, np.isinf(np.array(p.ms, np.float64))) for p in costs.pairs]
        self._excluded = [(self.position(p.first), self.position(p.second), t) for p, t in tables if t.any()]
        # Nodes of which a change changes nothing else, and is excluded by nothing else.
        bound = {int(self.node_of[i]) for first, second, _ in self._excluded for i in (first, second)}
        bound |= {node for governor, _, target in self.switches for node in (governor, target)}
        self._plain = [len(group) == 1 and node not in bound for node, group in enumerate(self.members)]

    def position(self, name: str) -> int:
        """Return where a parameter stands in `names`."""
        if name not in self._at:
            raise ConfigError(f"Unknown parameter {name!r} in the problem.{nearest(name, self.names)}")
        return self._at[name]

    def kinds(self) -> list[list[int]]:
        """Return the parameters of each kind: those named ``kind/…`` alike, or without such a name offered the same."""
        found: dict[object, list[int]] = {}
        for i, (name, offered) in enumerate(zip(self.names, self.choices, strict=True)):
            found.setdefault(name.partition("/")[0] if "/" in name else offered, []).append(i)
        return list(found.values())

    def _finite(self, what: str, flat: Array) -> None:
        for i, name in enumerate(self.names):
            mine = flat[self.offsets[i] : self.offsets[i + 1]]
            if np.isnan(mine).any() or (mine == -np.inf).any():
                raise ConfigError(f"The {what} of parameter {name!r} is {mine.tolist()}; it must be a number or inf.")

    def _merge(self) -> None:
        """Make one node of all parameters that must be equal, over the choices that all of them offer."""
        parent = list(range(len(self.names)))

        def root(i: int) -> int:
            while parent[i] != i:
                i = parent[i]
            return i

        for group in self.costs.equal:
            members = [self.position(name) for name in group]
            for member in members[1:]:
                parent[root(member)] = root(members[0])
        groups: dict[int, list[int]] = {}
        for i in range(len(self.names)):
            groups.setdefault(root(i), []).append(i)
        # Per node: its parameters, and `(choices, parameters)` positions in each parameter's own list.
        self.members = [tuple(group) for group in groups.values()]
        self.node_of = np.empty(len(self.names), np.int64)
        self.local: list[Index] = []
        for node, joined in enumerate(self.members):
            self.node_of[list(joined)] = node
            shared = [c for c in self.choices[joined[0]] if all(c in self.choices[m] for m in joined)]
            if not shared:
                listed = "; ".join(f"{self.names[m]}: {list(self.choices[m])}" for m in joined)
                raise ConfigError(f"Parameters that must be equal have no choice in common: {listed}.")
            self.local.append(np.array([[self.choices[m].index(c) for m in joined] for c in shared], np.int64))
        self.sizes = [len(rows) for rows in self.local]
        self._merged = [node for node, group in enumerate(self.members) if len(group) > 1]
        # All others' states are the positions of their one parameter.
        self._alone = np.array([node for node, group in enumerate(self.members) if len(group) == 1], np.int64)
        self._lone = np.array([self.members[node][0] for node in self._alone], np.int64)
        self._offered = np.array([len(self.local[node]) for node in self._alone], np.int64)

    def _switch(self) -> None:
        """Give every node that can be switched off a last state for it; list who switches whom."""
        self.off = np.full(len(self.members), -1, np.int64)
        self.switches: list[tuple[int, int, int]] = []  # governing node, its state, node switched off
        seen: dict[int, tuple[int, int]] = {}
        for rule in self.costs.free:
            governor = self.position(rule.parameter)
            if rule.choice not in self.choices[governor]:
                raise ConfigError(
                    f"Parameter {rule.parameter!r} has no choice {rule.choice!r}; it offers "
                    f"{list(self.choices[governor])}."
                )
            node, own = int(self.node_of[governor]), self.choices[governor].index(rule.choice)
            column = self.members[node].index(governor)
            states = np.flatnonzero(self.local[node][:, column] == own)
            for target in dict.fromkeys(int(self.node_of[self.position(n)]) for n in rule.parameters):
                within = {self.names[m] for m in self.members[target]}
                if not within <= set(rule.parameters):
                    raise ConfigError(
                        f"{sorted(within)} must be equal, but {rule.parameter!r} = {rule.choice!r} switches off only "
                        f"{sorted(within & set(rule.parameters))} of them."
                    )
                if target == node or (target in seen and len(states)):
                    raise ConfigError(
                        f"{sorted(within)} would be switched off by {rule.parameter!r} = {rule.choice!r}, but "
                        + ("switches it itself." if target == node else "another rule switches them off already.")
                    )
                for state in states:  # none where equality has already excluded the choice
                    if self.off[target] < 0:
                        self.off[target] = self.sizes[target]
                        self.sizes[target] += 1
                    self.switches.append((node, int(state), target))
                    seen[target] = (node, int(state))

    # -- figures ------------------------------------------------------------------------------------------------------

    def flatten(self, table: Mapping[str, Mapping[Choice, float]]) -> Array:
        """Return a flat vector of one figure per choice; what is missing is 0."""
        flat = np.zeros(self.offsets[-1])
        for name, figures in table.items():
            i = self.position(name)
            for choice, value in figures.items():
                if choice not in self.choices[i]:
                    raise ConfigError(
                        f"Parameter {name!r} has no choice {choice!r}; it offers {list(self.choices[i])}."
                    )
                flat[self.offsets[i] + self.choices[i].index(choice)] = value
        return flat

    def weigh(
        self,
        flat_loss: Array,
        flat_cost: Array | None = None,
        pair_losses: Mapping[tuple[str, str], Table] | None = None,
        *,
        pair_scale: float = 1.0,
        fixed_cost: float | None = None,
    ) -> LossCostTables:
        """Return the figures of the graph for one vector of losses (and of costs, where they differ from `costs`).

        Args:
            flat_loss: One loss per choice, in the order of `offsets`; an infinite one forbids the choice.
            flat_cost: Likewise.
            pair_losses: As `Problem.pair_losses`.
            pair_scale: Multiplies the costs of pairs.
            fixed_cost: Instead of `costs.fixed_ms`.
        """
        self._finite("loss", flat_loss)
        flat_cost = self.flat_cost if flat_cost is None else flat_cost
        shape = len(self.members), self.width
        loss, cost = np.full(shape, np.inf), np.zeros(shape)
        for node, rows in enumerate(self.local):
            at = rows + self.offsets[list(self.members[node])]
            loss[node, : len(rows)], cost[node, : len(rows)] = flat_loss[at].sum(1), flat_cost[at].sum(1)
            if self.off[node] >= 0:
                loss[node, self.off[node]] = 0.0
        loss[np.isinf(cost)] = np.inf
        cost[np.isinf(cost)] = 0.0
        edges: dict[tuple[int, int], tuple[Array, Array]] = {}
        for pair in self.costs.pairs:
            table = self._table(pair.first, pair.second, pair.ms) * pair_scale
            self._add(loss, cost, edges, (pair.first, pair.second), lost=np.zeros_like(table), spent=table)
        for names, losses in (pair_losses or {}).items():
            table = self._table(*names, losses)
            self._add(loss, cost, edges, names, lost=table, spent=np.zeros_like(table))
        for governor, state, target in self.switches:
            found = self._edge(edges, governor, target)
            # Off if and only if the governor says so.
            is_off = np.zeros((self.sizes[governor], self.sizes[target]), bool)
            is_off[:, self.off[target]] = True
            wrong = is_off.copy()
            wrong[state] = ~is_off[state]
            for table, value in zip(found, (np.inf, 0.0), strict=True):
                table[wrong if governor < target else wrong.T] = value
        for node, name in enumerate(self.members):
            if np.isinf(loss[node]).all():
                raise ConfigError(f"No choice of {[self.names[m] for m in name]} is allowed: all are infinite.")
        kept = tuple(
            Edge(i, j, lost, spent) for (i, j), (lost, spent) in sorted(edges.items()) if lost.any() or spent.any()
        )
        return LossCostTables(loss, cost, kept, 0.0, self.costs.fixed_ms if fixed_cost is None else fixed_cost)

    def _table(self, first: str, second: str, table: Table) -> Array:
        found = np.array(table, dtype=np.float64)
        expected = len(self.choices[self.position(first)]), len(self.choices[self.position(second)])
        if found.shape != expected or np.isnan(found).any():
            raise ConfigError(
                f"The table of ({first!r}, {second!r}) has shape {found.shape}; it needs {expected}, without NaN."
            )
        return found

    def _edge(self, edges: dict[tuple[int, int], tuple[Array, Array]], i: int, j: int) -> tuple[Array, Array]:
        i, j = min(i, j), max(i, j)
        shape = self.sizes[i], self.sizes[j]
        return edges.setdefault((i, j), (np.zeros(shape), np.zeros(shape)))

    def _add(
        self,
        loss: Array,
        cost: Array,
        edges: dict[tuple[int, int], tuple[Array, Array]],
        names: tuple[str, str],
        *,
        lost: Array,
        spent: Array,
    ) -> None:
        """Add a table of two parameters to the nodes they belong to."""
        lost = np.where(np.isinf(spent), np.inf, lost)
        spent = np.where(np.isinf(spent), 0.0, spent)
        p, q = (self.position(name) for name in names)
        if self.node_of[p] > self.node_of[q]:
            p, q, lost, spent = q, p, lost.T, spent.T
        i, j = int(self.node_of[p]), int(self.node_of[q])
        rows = self.local[i][:, self.members[i].index(p)]
        columns = self.local[j][:, self.members[j].index(q)]
        if i == j:
            loss[i, : len(rows)] += lost[rows, columns]
            cost[i, : len(rows)] += spent[rows, columns]
            return
        on_loss, on_cost = self._edge(edges, i, j)
        on_loss[: len(rows), : len(columns)] += lost[np.ix_(rows, columns)]
        on_cost[: len(rows), : len(columns)] += spent[np.ix_(rows, columns)]

    # -- choices ------------------------------------------------------------------------------------------------------

    def to_positions(self, chosen: Index) -> Index:
        """Return the position of each parameter's choice, -1 where it is switched off."""
        found = np.full(len(self.names), -1, np.int64)
        state = chosen[self._alone]
        found[self._lone] = np.where(state == self.off[self._alone], -1, state)
        for node in self._merged:
            if chosen[node] != self.off[node]:
                found[list(self.members[node])] = self.local[node][chosen[node]]
        return found

    def read(self, positions: Index) -> Index | None:
        """Return the state of each node for one position per parameter; None where they are not equal."""
        chosen = np.zeros(len(self.members), np.int64)
        state = positions[self._lone]
        chosen[self._alone] = np.where((state >= 0) & (state < self._offered), state, -1)
        for node in self._merged:
            match = np.flatnonzero((self.local[node] == positions[list(self.members[node])]).all(1))
            chosen[node] = match[0] if len(match) else -1
        for governor, switch, target in self.switches:
            if chosen[governor] == switch:
                chosen[target] = self.off[target]
        return None if (chosen < 0).any() else chosen

    def apply_switches(self, positions: Index) -> Index | None:
        """Return one position per parameter with -1 for what is switched off; None where equals differ."""
        found = positions.copy()
        for node in self._merged:
            members = list(self.members[node])
            if not (self.local[node] == positions[members]).all(1).any():
                return None
        for node, state, target in self.switches:
            governor = list(self.members[node])
            if (positions[governor] == self.local[node][state]).all():
                found[list(self.members[target])] = -1
        return found

    def canonicalise(self, chosen: Index) -> Index | None:
        """Return one position per parameter for states changed at will; None where they exclude each other."""
        settled = self.read(np.maximum(self.to_positions(chosen), 0))
        return None if settled is None or not self.allowed(settled) else self.to_positions(settled)

    def changed(self, chosen: Index, changes: Sequence[tuple[int, int]]) -> list[Index]:
        """Return one position per parameter for each change of one node's state, without those that are not allowed."""
        row = self.to_positions(chosen)
        found = []
        for node, state in changes:
            if self._plain[node]:
                (member,) = self.members[node]
                if np.isfinite(self.flat_cost[self.offsets[member] + state]):
                    found.append(row.copy())
                    found[-1][member] = state
                continue
            states = chosen.copy()
            states[node] = state
            if (tidied := self.canonicalise(states)) is not None:
                found.append(tidied)
        return found

    def allowed(self, chosen: Index) -> bool:
        """Whether no state and no pair of states is excluded, by the costs."""
        positions = self.to_positions(chosen)
        on = positions >= 0
        if np.isinf(self.flat_cost[self.offsets[:-1][on] + positions[on]]).any():
            return False
        for first, second, table in self._excluded:
            i, j = positions[first], positions[second]
            if i >= 0 and j >= 0 and table[i, j]:
                return False
        return True

    def named(self, positions: Index) -> dict[str, Choice]:
        """Return the choices by name; a parameter that is switched off takes its reference."""
        return {
            name: offered[max(int(i), 0)] for name, offered, i in zip(self.names, self.choices, positions, strict=True)
        }
