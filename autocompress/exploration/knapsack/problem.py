"""What a knapsack solver needs to know: parameters, their choices, and what each costs and loses.

`Costs` and `Problem` are plain data that a caller fills; `choice_graph.Graph` is their array form, its figures are
`LossCostTables`. Solves nothing; knows nothing of models, engines or Optuna.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Choice = str | float | int | bool | None
Array = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
Table = Sequence[Sequence[float]] | Array


@dataclass(frozen=True)
class Pair:
    """Milliseconds that depend on two parameters at once: a layout conversion, a layer between two widths.

    Attributes:
        first, second: Parameter names.
        ms: `(choices of first, choices of second)`; infinite where the two choices exclude each other.
    """

    first: str
    second: str
    ms: Table


@dataclass(frozen=True)
class Switch:
    """While `parameter` takes `choice`, what `parameters` choose matters not: a removed block has no layers."""

    parameter: str
    choice: Choice
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Costs:
    """Parameters, their choices, and what they cost.

    Attributes:
        ms: Parameter to its choices to their milliseconds. The first choice is the reference, the one that does
            nothing. Infinite: the choice is not offered. Any unit will do that the budget is in, too.
        pairs: Terms of two parameters.
        equal: Groups of parameters that must take the same choice.
        free: What is switched off by what.
        fixed_ms: Milliseconds that no choice changes.
    """

    ms: Mapping[str, Mapping[Choice, float]]
    pairs: Sequence[Pair] = ()
    equal: Sequence[Sequence[str]] = ()
    free: Sequence[Switch] = ()
    fixed_ms: float = 0.0

    @property
    def choices(self) -> dict[str, tuple[Choice, ...]]:
        """Parameter to its choices, in order."""
        return {name: tuple(found) for name, found in self.ms.items()}


@dataclass(frozen=True)
class Problem:
    """Costs, and what each choice loses.

    Attributes:
        costs: Of the choices; decides what may be chosen.
        losses: Parameter to its choices to what they lose; what is missing loses nothing.
        pair_losses: Two parameter names to a table `(choices of first, choices of second)` that is added.
    """

    costs: Costs
    losses: Mapping[str, Mapping[Choice, float]] = field(default_factory=dict)
    pair_losses: Mapping[tuple[str, str], Table] = field(default_factory=dict)


@dataclass(frozen=True)
class Edge:
    """One pair term between two nodes: `(choices of first, choices of second)` tables; a forbidden loss is infinite."""

    first: int
    second: int
    loss: Array
    cost: Array


@dataclass(frozen=True)
class LossCostTables:
    """The figures of a graph: what may change between two solutions of one problem.

    Attributes:
        loss, cost: `(nodes, widest)`, padded; a forbidden or padded entry has infinite loss and zero cost.
        edges: Pair terms, at most one for two nodes.
        fixed_loss, fixed_cost: Added to every solution.
    """

    loss: Array
    cost: Array
    edges: tuple[Edge, ...]
    fixed_loss: float = 0.0
    fixed_cost: float = 0.0

    def totals(self, chosen: Index) -> tuple[float, float]:
        """Return loss and cost of one choice per node."""
        rows = np.arange(len(self.loss))
        loss, cost = float(self.loss[rows, chosen].sum()), float(self.cost[rows, chosen].sum())
        for edge in self.edges:
            at = chosen[edge.first], chosen[edge.second]
            loss += float(edge.loss[at])
            cost += float(edge.cost[at])
        return loss + self.fixed_loss, cost + self.fixed_cost
