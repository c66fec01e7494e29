"""What occasions say together: prediction intervals, states of the machine, and what a run knows of its spread."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from autocompress.measurement.measure import Taken
from autocompress.measurement.occasions import Spread, combined, crossings, figures, half_width, interval, sorted_out
from autocompress.runs.records import BUSY, QUIET, SHARED, Figures, Measurement, Occasion

MakeMeasurement = Callable[..., Measurement]


def occasion(ratio: float, *, baseline: float = 2.0, at: float = 0.0, busy: float | None = None) -> Occasion:
    states = {QUIET: Figures(ratio * baseline, baseline, ratio)}
    if busy is not None:
        states[BUSY] = Figures(busy * baseline, baseline, busy)
    return Occasion(at, states)


def taken(make: MakeMeasurement, rounds: Sequence[float]) -> Taken:
    values = np.array(rounds)
    return Taken(make(latency_ms=float(np.median(values))), values.astype(np.float32), values)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("deviation", [0.01, 0.04])
def test_the_next_occasion_lies_inside_as_often_as_is_said(count: int, deviation: float) -> None:
    rng, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        logs = math.log(0.5) + deviation * rng.standard_normal(count + 1)
        # As a run knows its spread: from a file against its copy, three times.
        known = Spread(deviation * math.sqrt(rng.chisquare(5) / 5), 5)
        _, low, high = interval(logs[:-1], known)
        inside += low <= math.exp(logs[-1]) <= high
    assert 0.93 < inside / 2000 < 0.97


def test_a_single_occasion_has_the_spread_of_its_run() -> None:
    alone, many = (interval(np.log([0.5] * count), Spread(0.02, 8)) for count in (1, 6))
    assert alone[0] == many[0] == pytest.approx(0.5)
    assert alone[2] / alone[0] - 1 == pytest.approx(0.067, abs=0.002)
    assert many[2] < alone[2] and many[1] > alone[1]


def test_the_spread_is_of_all_that_was_repeated(make_measurement: MakeMeasurement) -> None:
    assert Spread.of([]) == Spread()
    steady = combined(make_measurement(), [occasion(0.3), occasion(0.3), occasion(0.3)])
    moved = combined(make_measurement(), [occasion(0.3), occasion(0.33)])
    once = combined(make_measurement(), [occasion(0.7)])
    pooled = Spread.of([steady, moved, once])
    assert pooled.freedom == Spread().freedom + 2 + 1
    assert pooled.deviation > Spread.of([steady, once]).deviation
    # A file that is always faster than its copy deviates from 1, not from its own mean.
    copy = combined(make_measurement(), [occasion(0.95), occasion(0.95)])
    assert Spread.of([], [copy]).deviation > 2 * Spread.of([copy]).deviation


def test_all_states_are_in_the_interval_and_the_quiet_one_is_in_the_middle(make_measurement: MakeMeasurement) -> None:
    found = combined(make_measurement(p99_ms=9.0), [occasion(0.4, busy=0.5, at=10.0), occasion(0.4, busy=0.5, at=70.0)])
    assert (found.ratio, found.span_s, found.p99_ms) == (pytest.approx(0.4), 60.0, 9.0)
    assert found.states[QUIET][0] == pytest.approx(0.4) and found.states[BUSY][0] == pytest.approx(0.5)
    assert (found.ratio_low, found.ratio_high) == (found.states[QUIET][1], found.states[BUSY][2])
    assert found.quiet == found.states[QUIET] and found.worst_ratio == pytest.approx(0.5)
    assert (
        found.occasions[0].states[BUSY].ratio == 0.5
        and half_width(found) < 0.06 < (found.ratio_high - found.ratio_low) / 2 / found.ratio
    )
    assert found.low_ms < found.latency_ms < 0.5 * 2 < found.high_ms
    assert Measurement.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_disturbed_rounds_move_nothing_and_are_another_state_when_there_are_many(
    make_measurement: MakeMeasurement,
) -> None:
    dense, own = taken(make_measurement, [2.0] * 6), taken(make_measurement, [1.0, 1.0, 1.6, 1.0, 1.0, 1.0])
    assert figures(dense, own, loaded=False) == {QUIET: Figures(1.0, 2.0, 0.5, 1.0, 2.0)}
    slowed = taken(make_measurement, [1.0, 1.6, 1.6, 1.0, 1.6, 1.0])
    assert figures(dense, slowed, loaded=False) == {
        QUIET: Figures(1.0, 2.0, 0.5, 1.3, 2.0), SHARED: Figures(1.6, 2.0, pytest.approx(0.8), 1.3, 2.0),
    }  # fmt: skip
    assert set(figures(dense, slowed, loaded=True)) == {BUSY}
    # Where no two rounds are alike, all count.
    wild = taken(make_measurement, [1.0, 1.2, 1.4, 1.6, 1.8, 2.0])
    assert figures(dense, wild, loaded=False) == {QUIET: Figures(1.5, 2.0, 0.75, 1.5, 2.0)}


def test_the_shared_state_counts_where_it_was_seen_twice(make_measurement: MakeMeasurement) -> None:
    shared = {SHARED: Figures(1.6, 2.0, 0.8)}
    calm, other = occasion(0.5), Occasion(0.0, {**occasion(0.5).states, **shared})
    assert set(combined(make_measurement(), [calm, other]).states) == {QUIET}
    assert combined(make_measurement(), [calm, other, other]).ratio_high > 0.8


def test_an_occasion_that_was_slow_throughout_is_a_shared_one(make_measurement: MakeMeasurement) -> None:
    calm, slow = [occasion(0.5), occasion(0.505), occasion(0.495)], [occasion(0.62), occasion(0.6)]
    kept = sorted_out([*calm, *slow])
    assert [next(iter(one.states)) for one in kept] == [QUIET] * 3 + [SHARED] * 2
    found = combined(make_measurement(), [*calm, *slow])
    assert found.ratio == pytest.approx(0.5) and found.quiet[2] < 0.55
    assert found.ratio_high > 0.62 and found.states[SHARED][0] == pytest.approx(0.61, abs=0.005)
    # A baseline that was slow at that moment makes it another state as well: the ratio is not of the same machine.
    assert QUIET not in sorted_out([*calm, occasion(0.4, baseline=2.6)])[-1].states
    # Of two, nobody can say which is the quiet one.
    assert sorted_out([calm[0], slow[0]]) == [calm[0], slow[0]]


def test_an_occasion_beside_a_slow_baseline_is_a_shared_one_and_counts_where_there_is_no_other(
    make_measurement: MakeMeasurement,
) -> None:
    dense, own = taken(make_measurement, [2.4] * 6), taken(make_measurement, [1.5] * 6)
    shared = figures(dense, own, loaded=False, usual_ms=2.0)
    assert set(shared) == {SHARED} and set(figures(dense, own, loaded=False, usual_ms=2.3)) == {QUIET}
    once = Occasion(0.0, {**shared, **figures(dense, own, loaded=True, usual_ms=2.0)})
    found = combined(make_measurement(), [once])
    assert set(found.states) == {SHARED, BUSY} and found.ratio == pytest.approx(0.625) == found.quiet[0]
    assert (found.latency_ms, found.baseline_ms) == (pytest.approx(1.5), pytest.approx(2.4))


def moments(rng: np.random.Generator, count: int, flapping: float) -> list[Occasion]:
    """Occasions one after the other on a machine whose speed moves whole from one to the next."""
    made = []
    for index in range(count):
        speed = math.exp(flapping * rng.standard_normal())
        made.append(Occasion(3.0 * index, {QUIET: Figures(0.5 * speed, speed, 0.5, 0.5 * speed, speed)}))
    return made


def test_who_times_one_file_after_the_other_has_a_wider_interval(make_measurement: MakeMeasurement) -> None:
    rng = np.random.default_rng(0)
    found = combined(make_measurement(), moments(rng, 6, 0.05))
    assert found.ratio == pytest.approx(0.5) and half_width(found) < 0.03
    assert found.expected_high / found.ratio_high > 1.04 and found.expected_low / found.ratio_low < 0.96
    # Where the machine is known to be as steady from moment to moment as in turns, both are alike.
    still = combined(make_measurement(), moments(rng, 6, 0.0), Spread(0.012, 4.0, 0.012))
    assert still.expected_high == pytest.approx(still.ratio_high, rel=0.01)
    # What is known of the run reaches a single occasion.
    spread = Spread.of([], [combined(make_measurement(), moments(rng, 5, 0.05))])
    once = combined(make_measurement(), moments(rng, 1, 0.05), spread)
    assert once.expected_high / 0.5 > 1.06


def test_the_next_one_timed_after_the_other_lies_inside_as_often_as_is_said(make_measurement: MakeMeasurement) -> None:
    rng, inside = np.random.default_rng(1), 0
    for _ in range(400):
        found = combined(make_measurement(), moments(rng, 7, 0.04))
        later = 0.5 * math.exp(0.04 * (rng.standard_normal() - rng.standard_normal()))
        inside += found.expected_low <= later <= found.expected_high
    assert 0.9 < inside / 400 < 0.99


def test_only_occasions_that_follow_each_other_are_crossed() -> None:
    def at(*times: float) -> list[Occasion]:
        return [Occasion(time, {QUIET: Figures(1.0, 2.0, 0.5, 1.0, 2.0)}) for time in times]

    assert len(crossings(at(0, 3, 6))) == 4 and len(crossings(at(0, 300, 303))) == 2 and len(crossings(at(0))) == 0
    assert crossings(at(0, 3)) == pytest.approx(math.log(0.5))
    # Of an older release nothing is known.
    assert len(crossings([Occasion(t, {QUIET: Figures(1.0, 2.0, 0.5)}) for t in (0, 3)])) == 0
