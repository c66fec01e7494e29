"""What a predictor takes from a table's rows, by hand; whole tables are in test_profiling."""

from __future__ import annotations

import pytest

from autocompress.policy import CompressionPolicy
from autocompress.prediction.profile import SPOILED, layer_times, observations
from tests.prediction.made_up import LAYOUT
from tests.prediction.tables import layer_row, network_row

POLICIES = [CompressionPolicy("bf16", {"c0": 0.25 + 0.125 * number}) for number in range(4)]
# The machine's pace changes by a third, and once something took its memory.
BASELINES = (1.0, 1.0, 1.3, 3.0)
NETWORKS = [
    network_row(policy=policy, ratio=0.5, ratio_low=0.49, ratio_high=0.51, baseline_ms=baseline)
    for policy, baseline in zip(POLICIES, BASELINES, strict=True)
]


def test_a_disturbed_measurement_is_doubted_by_as_much_as_it_was_disturbed() -> None:
    known, usual = observations(NETWORKS), 0.01 / 1.96
    assert [o.deviation for o in known] == pytest.approx([usual, usual, usual, 0.5 * 2.0])
    # By what the caller knows to be usual, all were.
    assert min(o.deviation for o in observations(NETWORKS, 0.5)) == pytest.approx(0.5 * 1.0)
    assert observations([]) == []


def test_layers_of_a_disturbed_measurement_teach_nothing() -> None:
    rows = [
        layer_row(layer="c1", policy=policy.hash, time_ms=0.1, baseline_ms=baseline)
        for policy, baseline in zip(POLICIES, BASELINES, strict=True)
    ]
    found = layer_times(rows, NETWORKS, LAYOUT)
    assert [time.network for time in found] == [policy.hash for policy in POLICIES[:3]]
    assert [time.ratio for time in found] == pytest.approx([0.1, 0.1, 0.1 / 1.3])
    assert [len(layer_times(rows, NETWORKS, LAYOUT, usual)) for usual in (1.0, 3.0, 0.9 / SPOILED)] == [3, 4, 0]
