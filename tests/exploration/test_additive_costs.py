"""Additive costs fitted to predictions of whole networks."""

from __future__ import annotations

import pytest

from autocompress.exploration.additive_costs import fitted_costs, macs_ratio, size_ratio
from autocompress.exploration.knapsack.problem import Switch
from autocompress.exploration.knapsack.sampler import KnapsackSampler
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.space.parameter import Parameter
from tests.prediction.made_up import LAYOUT, SPACE


def additive(policy: CompressionPolicy) -> float:
    """A network whose latency is exactly a sum."""
    total = 1.0 - 0.1 * len(policy.removed_blocks)
    total -= sum(0.08 * ratio for ratio in policy.pruning.values())
    for layer in policy.layers.values():
        total -= 0.02 * (layer.dtype == "int8") + 0.03 * (1 - layer.rank_ratio)
    return total


def test_costs_that_add_up_are_found() -> None:
    # What is inside a removed block costs nothing any more, which no sum can say: the others are exact.
    costs = fitted_costs(SPACE, additive)
    assert costs.choices == dict(SPACE.parameters)
    for name in ("prune/c0", "dtype/c1", "rank/c2", "prune/c6"):
        row = costs.ms[name]
        first = SPACE.parameters[name][0]
        for choice, cost in row.items():
            kind = Parameter.of(name).kind
            saved = 0.08 * float(choice) if kind == "prune" else 0.02 if choice == "int8" else 0.0
            saved = 0.03 * (1 - float(choice)) if kind == "rank" else saved
            assert row[first] - cost == pytest.approx(saved, abs=0.006)
        assert min(row.values()) == 0
    assert costs.fixed_ms > 0


def test_removed_blocks_free_what_is_inside() -> None:
    costs = fitted_costs(SPACE, additive)
    assert costs.free == (Switch("block/b", "remove", ("prune/c3", "rank/c3", "dtype/c3")),)
    # What is fitted is a problem that the sampler takes.
    KnapsackSampler(costs, seed=0)


def test_arithmetic_and_bytes_stand_in_where_nothing_is_predicted() -> None:
    macs, size = macs_ratio(LAYOUT), size_ratio(LAYOUT, 4)
    assert macs(CompressionPolicy()) == size(CompressionPolicy()) == 1
    int8 = CompressionPolicy(layers={name: LayerPolicy("int8") for name in LAYOUT.inventory.layers})
    assert macs(int8) == pytest.approx(0.5) and size(int8) == pytest.approx(0.25)
    half = CompressionPolicy(pruning={"c0": 0.5})
    assert macs(half) < 1 and size(half) < 1
