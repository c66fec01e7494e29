"""What each choice costs in latency, as a sum: the knapsack's costs, fitted to predictions of whole networks.

A network's latency is nearly, not exactly, the sum of what its choices cost: a narrower layer gains less from int8.
So the sum is fitted to many random networks, as compressed as those that a search will try, rather than to one choice
at a time on the uncompressed network.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from autocompress.evaluation.profiler import random_choices
from autocompress.exploration.knapsack.problem import Choice, Costs, Switch
from autocompress.graph.layout import Layout
from autocompress.policy import CompressionPolicy
from autocompress.space.parameter import Parameter
from autocompress.space.search_space import SearchSpace

# Networks per free number, between these bounds.
_PER_NUMBER, _LEAST, _MOST = 3, 200, 1500
_RIDGE = 1e-3
# Arithmetic in int8 against dense, where no table says better.
_INT8 = 0.5


def fitted_costs(space: SearchSpace, ratio: Callable[[CompressionPolicy], float], seed: int = 0) -> Costs:
    """Return additive costs of all choices, in units of the uncompressed network's latency.

    Args:
        space: What may be chosen.
        ratio: Returns what a network takes over what the uncompressed one does, predicted.
        seed: Of the networks that the sum is fitted to.
    """
    names = list(space.parameters)
    starts = np.cumsum([0, *(len(space.parameters[name]) - 1 for name in names)])
    count = min(max(_PER_NUMBER * int(starts[-1]), _LEAST), _MOST)
    rng = random.Random(f"costs {seed}")
    rows = np.zeros((count, int(starts[-1])))
    ratios = np.zeros(count)
    for number in range(count):
        choices = random_choices(space, rng)
        ratios[number] = ratio(space.policy(choices))
        for place, name in enumerate(names):
            at = space.parameters[name].index(choices[name])
            if at:
                rows[number, starts[place] + at - 1] = 1.0
    effects, rest = _ridge(rows, ratios)
    ms: dict[str, dict[Choice, float]] = {}
    for place, name in enumerate(names):
        own = [0.0, *effects[starts[place] : starts[place + 1]]]
        # Counted from the cheapest choice, so that nothing costs less than nothing.
        ms[name] = {c: float(cost - min(own)) for c, cost in zip(space.parameters[name], own, strict=True)}
        rest += min(own)
    return Costs(ms, free=_free(space), fixed_ms=max(rest, 0.01 * float(ratios.min())))


def macs_ratio(layout: Layout) -> Callable[[CompressionPolicy], float]:
    """Return what stands in for predicted latency where nothing is known: arithmetic, halved where it is int8."""

    def work(policy: CompressionPolicy) -> float:
        return sum(unit.macs * (_INT8 if unit.int8 else 1.0) for unit in layout.units(policy))

    whole = work(CompressionPolicy())
    return lambda policy: work(policy) / whole


def size_ratio(layout: Layout, dense_bytes: int) -> Callable[[CompressionPolicy], float]:
    """Return what stands in for an engine's size: its weights' bytes over the uncompressed network's."""

    def size(policy: CompressionPolicy) -> float:
        units = layout.units(policy)
        weights = ((sum(ins * outs * area for ins, outs, area, _ in unit.chain), unit.int8) for unit in units)
        return float(sum(count * (1 if int8 else dense_bytes) for count, int8 in weights))

    whole = size(CompressionPolicy())
    return lambda policy: size(policy) / whole


def _ridge(rows: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Return effects and constant; relative errors count, as networks near a tight target are small."""
    weights = 1 / values
    columns = np.column_stack([rows, np.ones(len(rows))]) * weights[:, None]
    penalty = _RIDGE * len(rows) * np.eye(columns.shape[1])
    penalty[-1, -1] = 0.0
    found = np.asarray(np.linalg.solve(columns.T @ columns + penalty, columns.T @ (values * weights)), np.float64)
    return found[:-1], float(found[-1])


def _free(space: SearchSpace) -> tuple[Switch, ...]:
    """Return what choices of removed blocks' layers no longer matter."""
    found = []
    for name in space.parameters:
        kind, block = Parameter.of(name)
        if kind == "block":
            inside = tuple(n for n in space.parameters if n != name and space.within(n, block))
            if inside:
                found.append(Switch(name, "remove", inside))
    return tuple(found)
