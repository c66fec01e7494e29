"""What is offered: inside every limit where there is such a network, else two true answers, and never a ruin."""

from __future__ import annotations

import random

import pytest

from autocompress.config import RunConfig
from autocompress.exploration.constraints import Constraints
from autocompress.exploration.dominance import dominates, pareto_front
from autocompress.exploration.selection import (
    CLOSEST,
    MET,
    UNCOMPRESSED,
    WITHIN_DROP,
    WITHIN_LATENCY,
    Offer,
    most_accurate,
    offer,
)
from autocompress.policy import CompressionPolicy
from autocompress.runs.records import TrialRecord
from tests.exploration.conftest import BASELINE, record


def limits(**changes: str) -> Constraints:
    return Constraints.of(RunConfig.model_validate(changes), BASELINE)


def offered(records: list[TrialRecord], **changes: str) -> Offer:
    return offer(records, limits(**changes), BASELINE)


BOTH = {"target_latency": "0.5x", "max_drop": "1pp"}


def test_inside_both_limits_the_most_accurate_of_the_front_is_offered() -> None:
    records = [record(1, 0.941, 3), record(2, 0.945, 5), record(3, 0.949, 9), record(4, 0.93, 2)]
    found = offered(records, **BOTH)
    assert (found.best.number, found.reason) == (2, MET)
    assert found.fastest_within_drop is records[0] and found.most_accurate_within_latency is records[1]
    # Of ties the faster one, whatever capacity the slower one has left.
    tied = [record(1, 0.9440, 4, samples=500, macs=500), record(2, 0.9450, 5, samples=500, macs=900)]
    assert offered(tied, **BOTH).best.number == 1


def test_where_both_cannot_be_met_both_answers_are_returned() -> None:
    fits, good = record(1, 0.90, 5), record(2, 0.943, 8)
    found = offered([fits, good, record(3, 0.948, 10), record(4, 0.88, 4)], **BOTH)
    assert (found.best, found.reason) == (good, WITHIN_DROP)
    assert found.fastest_within_drop is good and found.most_accurate_within_latency is fits
    # Nothing is within the drop: the most accurate inside the latency.
    found = offered([fits, record(4, 0.88, 4)], **BOTH)
    assert (found.best, found.reason, found.fastest_within_drop) == (fits, WITHIN_LATENCY, None)


def test_an_uncompressed_trial_is_no_answer() -> None:
    same = record(5, 0.95, 11.5, policy=BASELINE.policy)
    found = offered([same, record(1, 0.93, 5)], **BOTH)
    assert (found.best.number, found.reason) == (1, WITHIN_LATENCY)
    # But it is what meets a limit on the drop alone.
    assert offered([same, record(1, 0.90, 5)], max_drop="1pp").best is same


def test_what_is_slower_than_the_baseline_is_never_offered() -> None:
    assert offered([record(1, 0.95, 12.5)], max_drop="1pp").best is BASELINE
    assert offered([record(1, 0.95, 12.5)], **BOTH).reason == UNCOMPRESSED
    assert offered([record(1, 0.95, 12.5, size_bytes=100)], max_size="0.5x").best is BASELINE


@pytest.mark.parametrize("changes", [BOTH, {"target_latency": "0.5x"}, {"max_drop": "1pp"}, {}, {"max_size": "0.5x"}])
def test_a_network_that_has_collapsed_is_never_offered(changes: dict[str, str]) -> None:
    ruin = record(1, 0.147, 5, stage="recovered", size_bytes=100)
    found = offered([ruin], **changes)
    assert (found.best, found.reason) == (BASELINE, UNCOMPRESSED)
    # It is named all the same where it is the most accurate inside a bound.
    assert found.most_accurate_within_latency is (ruin if {"target_latency", "max_size"} & changes.keys() else None)
    mild = record(2, 0.944, 9)
    best = offered([ruin, mild], **changes).best
    assert best is mild


def test_how_much_is_a_ruin() -> None:
    assert limits().ruin == pytest.approx(0.475) and limits(max_drop="1pp").ruin == pytest.approx(0.1)
    assert limits(max_drop="0pp").ruin == pytest.approx(0.05) and limits(max_drop="50pp").ruin == pytest.approx(0.475)


def test_the_closest_is_offered_where_it_loses_little() -> None:
    records = [record(1, 0.943, 8), record(2, 0.939, 7), record(3, 0.90, 6.5)]
    assert offered(records, target_latency="0.5x").best is records[2]
    found = offered(records[1:], target_latency="0.5x", max_drop="0.5pp")
    assert found.best is BASELINE and found.reason == UNCOMPRESSED
    found = offered([record(2, 0.9405, 7), records[2]], target_latency="0.5x", max_drop="0.5pp")
    assert (found.best.number, found.reason) == (2, CLOSEST)


def test_nothing_at_all() -> None:
    failed = TrialRecord(1, CompressionPolicy(), "failed", error="no")
    for records in ([], [failed], [BASELINE]):
        found = offered(records, **BOTH)
        assert found == Offer(BASELINE, UNCOMPRESSED, None, None)
    assert most_accurate([failed], limits()) is None


def test_search_goes_on_from_the_most_accurate_inside_the_latency_whatever_it_loses() -> None:
    records = [record(1, 0.3, 3), record(2, 0.6, 5), record(3, 0.945, 9)]
    assert most_accurate(records, limits(**BOTH)) is records[1]
    assert most_accurate(records, limits(target_latency="0.1x")) is records[0]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("changes", [BOTH, {"target_latency": "0.4x"}, {"max_drop": "2pp"}, {}, {"max_size": "0.6x"}])
def test_what_is_offered_is_on_the_front(seed: int, changes: dict[str, str]) -> None:
    rng = random.Random(seed)
    records = [
        record(
            i, rng.uniform(0.5, 0.96), rng.uniform(2, 13), samples=400, size_bytes=rng.randint(100, 1500),
            stage=rng.choice(("proxy", "recovered")), policy=CompressionPolicy(pruning={"c0": (i + 1) / 100}),
        )
        for i in range(40)
    ]  # fmt: skip
    constraints = limits(**changes)
    found, front = offer(records, constraints, BASELINE), pareto_front(records, constraints)
    for one in (found.best, found.fastest_within_drop, found.most_accurate_within_latency):
        assert one is None or one is BASELINE or any(one is r for r in front)
    # Nothing is better in every figure that counts.
    assert not any(dominates(r, found.best, constraints, ties=False) for r in records if found.best is not BASELINE)
