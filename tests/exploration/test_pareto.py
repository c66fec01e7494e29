from __future__ import annotations

import random
from dataclasses import replace

import pytest

from autocompress.config import RunConfig
from autocompress.exploration.latency_limit.machine_speed import MachineSpeed
from autocompress.exploration.pareto import Constraints, best_record, finalists, is_lossless, pareto_front
from autocompress.policy import CompressionPolicy
from autocompress.runs.records import TrialRecord
from tests.exploration.conftest import BASELINE, make_measurement, record


def limits(**changes: str) -> Constraints:
    return Constraints.of(RunConfig.model_validate(changes), BASELINE)


FAILED = TrialRecord(99, CompressionPolicy(), "failed", error="BuildError: no")


# -- the front --------------------------------------------------------------------------------------------------------


def test_the_front_is_what_nothing_beats() -> None:
    rng = random.Random(0)
    records = [record(i, rng.randint(80, 95) / 100, rng.randint(1, 20)) for i in range(60)]
    front = pareto_front([*records, FAILED])

    def beaten(r: TrialRecord) -> bool:
        return any(
            (o.accuracy or 0) >= (r.accuracy or 0)
            and (o.latency_ms or 0) <= (r.latency_ms or 0)
            and (o.accuracy, o.latency_ms) != (r.accuracy, r.latency_ms)
            for o in records
        )

    assert {(r.accuracy, r.latency_ms) for r in front} == {(r.accuracy, r.latency_ms) for r in records if not beaten(r)}
    assert [r.latency_ms for r in front] == sorted({r.latency_ms or 0 for r in front})


def test_equal_results_are_shown_once_and_nothing_gives_nothing() -> None:
    assert len(pareto_front([record(1, 0.9, 5), record(2, 0.9, 5)])) == 1
    assert pareto_front([FAILED]) == []


# -- constraints ------------------------------------------------------------------------------------------------------


def test_limits_are_resolved_against_the_baseline() -> None:
    found = limits(target_latency="0.5x", max_drop="2pp", max_size="0.25x")
    assert (found.latency_ms, found.max_drop, found.size_bytes) == pytest.approx((5.75, 0.02, 250))
    assert limits(target_latency="5ms").latency_ms == 5
    assert limits() == Constraints(None, None, None, None)


@pytest.mark.parametrize("target", ["0.5x", "5.75ms"])
def test_the_upper_end_of_the_interval_must_fit(target: str) -> None:
    measured = replace(make_measurement(5.7), high_ms=5.8, ratio_high=5.8 / 11.5)
    found = limits(target_latency=target)
    assert found.latency_excess(measured) == pytest.approx(5.8 / 5.75 - 1)
    assert found.latency_excess(measured) > 0 and found.reached(measured)
    assert not found.within_budget(record(1, 0.9, 5, measurement=measured))
    assert found.within_budget(record(1, 0.9, 5.7))


def test_the_engines_files_must_fit_the_size() -> None:
    found = limits(max_size="0.25x")  # of 1000 bytes
    fits, large = (replace(record(1, 0.9, 5), size_bytes=size) for size in (250, 300))
    assert found.violations(fits) == {"size": 0} and found.within_budget(fits)
    assert found.violations(large) == {"size": pytest.approx(0.2)} and not found.within_budget(large)
    assert found.cost(large) == 0.3 and found.budget == 0.25
    assert limits(max_size="200B").size_bytes == 200


def test_within_the_size_the_most_accurate_is_offered() -> None:
    sized = [replace(record(i, 0.8 + i / 100, 5), size_bytes=size) for i, size in enumerate((100, 200, 300))]
    assert chosen(sized, max_size="0.25x") == 1
    assert chosen(sized, max_size="0.05x") == 0  # nothing fits: the closest
    # Both limits count.
    assert chosen([*sized, replace(record(9, 0.95, 9), size_bytes=100)], max_size="0.25x", target_latency="0.5x") == 1


def test_without_a_limit_everything_is_within() -> None:
    assert limits().violations(record(1, 0.5, 100)) == {}
    assert limits().reached(make_measurement(1000)) and limits().latency_excess(make_measurement(1000)) < 0


# -- the result -------------------------------------------------------------------------------------------------------


def chosen(records: list[TrialRecord], **changes: str) -> int | None:
    """Return the number of what is offered; None for the uncompressed model."""
    best = best_record(records, limits(**changes), BASELINE)
    return None if best is BASELINE else best.number


def test_within_the_budget_the_most_accurate_is_offered() -> None:
    records = [record(1, 0.80, 3), record(2, 0.85, 5), record(3, 0.94, 9), FAILED]
    assert chosen(records, target_latency="0.5x") == 2
    assert chosen(records, target_latency="0.1x") == 1  # nothing fits: the closest
    assert chosen([FAILED], target_latency="0.5x") is None


def test_fine_tuned_results_come_before_untuned_ones_that_lose_something() -> None:
    tuned = record(1, 0.90, 5, stage="recovered")
    assert chosen([tuned, record(2, 0.92, 5)], target_latency="0.5x") == 1
    assert chosen([tuned, record(2, 0.949, 5)], target_latency="0.5x") == 2  # lossless


def test_of_equal_accuracies_the_faster_is_offered() -> None:
    assert chosen([record(1, 0.9, 5), record(2, 0.9, 4)], target_latency="0.5x") == 2


def test_a_lossless_result_is_not_given_up_for_one_that_loses() -> None:
    records = [record(1, 0.948, 4, macs=500), record(2, 0.944, 5, macs=900)]
    assert chosen(records, target_latency="0.5x") == 1


def test_without_a_budget_the_fastest_within_the_drop_is_offered() -> None:
    records = [record(1, 0.90, 3), record(2, 0.93, 5), record(3, 0.945, 9)]
    assert chosen(records) == 3
    assert chosen(records, max_drop="3pp") == 2
    assert chosen(records, max_drop="50pp") == 1
    assert chosen(records, max_drop="0pp") == 3  # nothing is as good: the best there is


def test_lossless() -> None:
    assert is_lossless(record(1, 0.95, 1), BASELINE) and is_lossless(record(1, 0.948, 1), BASELINE)
    assert not is_lossless(record(1, 0.94, 1), BASELINE)


def test_the_tie_among_candidates_for_fine_tuning_is_at_least_half_a_point() -> None:
    # The baseline's 95 % are of 300 samples: 1.3 points.
    few = replace(BASELINE, samples=300)
    assert Constraints.of(RunConfig(), few).tie == pytest.approx((0.95 * 0.05 / 300) ** 0.5)
    # Of many it is no less than before, and a metric beyond 1 has none.
    assert Constraints.of(RunConfig(), replace(BASELINE, samples=10**6)).tie == limits().tie
    assert Constraints.of(RunConfig(), replace(BASELINE, accuracy=1.2, samples=10)).tie == limits().tie


# -- finalists --------------------------------------------------------------------------------------------------------


def finalist_numbers(records: list[TrialRecord], count: int = 3, **changes: str) -> list[int]:
    machine_speed = MachineSpeed.of(records, 11.5)
    return [r.number for r in finalists(records, limits(**changes), BASELINE, count, machine_speed)]


def test_finalists_are_accurate_or_large_and_within_the_budget() -> None:
    records = [record(i, 0.5 + i / 100, 5, macs=1000 - i) for i in range(10)] + [record(50, 0.95, 9)]
    found = finalist_numbers(records, target_latency="0.5x")
    assert found == [9, 5, 8]  # the most accurate, the largest of the better half, the next accurate
    assert len({r.policy for r in records if r.number in found}) == 3


def test_where_nothing_fits_the_closest_is_tuned() -> None:
    assert finalist_numbers([record(1, 0.9, 9), record(2, 0.9, 8), FAILED], target_latency="0.1x") == [2]
    assert finalist_numbers([FAILED], target_latency="0.1x") == []


def test_without_a_budget_the_front_is_tuned_but_not_what_is_lost() -> None:
    assert finalist_numbers([record(1, 0.3, 1), record(2, 0.6, 2), record(3, 0.9, 5), record(4, 0.8, 6)]) == [2, 3]


def test_tuned_records_are_not_tuned_again() -> None:
    assert finalist_numbers([record(1, 0.9, 5, stage="recovered")], target_latency="0.5x") == []
