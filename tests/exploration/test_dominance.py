"""One definition of dominance, and the fronts that follow from it."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from autocompress.config import RunConfig
from autocompress.exploration.constraints import Constraints
from autocompress.exploration.dominance import dominates, measurably_better, pareto_front, standard_error_of_difference
from autocompress.policy import CompressionPolicy
from autocompress.runs.records import TrialRecord
from tests.exploration.conftest import BASELINE, record


def limits(**changes: str) -> Constraints:
    return Constraints.of(RunConfig.model_validate(changes), BASELINE)


def numbers(records: list[TrialRecord], constraints: Constraints | None = None) -> list[int]:
    return [r.number for r in pareto_front(records, constraints)]


def test_the_standard_error_is_that_of_two_networks_that_err_alike() -> None:
    rng = random.Random(0)
    samples, accuracy = 2000, 0.9

    def differ() -> float:
        # Each sample is decided by a coin that the two share half of the time: a correlation of one half.
        total = 0
        for _ in range(samples):
            shared = rng.random() < accuracy
            one, other = (shared if rng.random() < 0.5**0.5 else rng.random() < accuracy for _ in range(2))
            total += one - other
        return total / samples

    found = [differ() for _ in range(300)]
    spread = (sum(d * d for d in found) / len(found)) ** 0.5
    assert standard_error_of_difference(accuracy, samples) == pytest.approx(spread, rel=0.15)


def test_where_all_samples_are_right_one_more_error_is_no_difference() -> None:
    perfect, nearly = (record(i, right / 360, 5, samples=360) for i, right in enumerate((360, 359)))
    assert not measurably_better(perfect, nearly)
    assert standard_error_of_difference(1.0, 360) > 0 and standard_error_of_difference(0.9, None) == 0
    # Without a number of samples every difference counts.
    assert measurably_better(record(1, 0.9001, 5), record(2, 0.9, 5))


def test_a_tie_is_decided_by_latency_then_by_size() -> None:
    slow, fast = record(1, 0.903, 5, samples=1000), record(2, 0.900, 4, samples=1000)
    assert dominates(fast, slow) and not dominates(slow, fast)
    assert not dominates(fast, slow, ties=False)
    large, small = record(3, 0.903, 5, samples=1000), record(4, 0.9, 5, samples=1000, size_bytes=900)
    assert dominates(small, large) and not dominates(large, small)
    # More samples tell them apart.
    many = [replace(r, samples=100_000) for r in (slow, fast)]
    assert not dominates(many[1], many[0]) and not dominates(many[0], many[1])


def test_the_demo_that_starred_a_dominated_network() -> None:
    starred = record(1, 0.9889, 0.48 * 11.5, samples=360, size_bytes=1_050_000)
    better = record(2, 0.9917, 0.32 * 11.5, samples=360, size_bytes=413_000)
    for constraints in (None, limits(target_latency="0.5x"), limits(target_latency="0.5x", max_drop="1pp"), limits()):
        assert dominates(better, starred, constraints) and numbers([starred, better], constraints) == [2]


def test_ties_do_not_chain() -> None:
    # Each is within a standard error (0.95 points) of its neighbours, and faster than the one above.
    records = [record(i, 0.90 - 0.005 * i, 10 - i / 5, samples=1000) for i in range(30)]
    front = pareto_front(records)
    assert front[0].number == 29 and len(front) > 5
    # The most accurate one is there, or something faster that is as good as it.
    assert not measurably_better(records[0], front[-1])
    for fast, slow in pairwise(front):
        assert measurably_better(slow, fast)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_left_out_is_dominated_by_what_is_shown_and_nothing_shown_is_beaten(seed: int) -> None:
    rng = random.Random(seed)
    constraints = limits(target_latency="0.6x", max_drop="2pp", max_size="0.9x")
    records = [
        record(
            i, rng.uniform(0.3, 0.97), rng.uniform(1, 13), samples=500, size_bytes=rng.randint(100, 1500),
            stage=rng.choice(("proxy", "recovered")), policy=CompressionPolicy(pruning={"c0": (i + 1) / 1000}),
        )
        for i in range(300)
    ]  # fmt: skip
    for limit in (None, constraints):
        front = pareto_front(records, limit)
        for r in records:
            shown = any(r is f for f in front)
            assert shown != any(dominates(f, r, limit) for f in front)
            # Nothing on the front is beaten outright, not even by what is left out.
            assert not shown or not any(
                o.measurement.ratio < r.measurement.ratio  # type: ignore[union-attr]
                and (o.accuracy or 0) >= (r.accuracy or 0)
                and dominates(o, r, limit, ties=False)
                for o in records
            )


def test_what_breaks_a_limit_dominates_nothing_that_keeps_it() -> None:
    # Allowed are 94 %; the faster one is as good but for the limit.
    keeps, breaks = record(1, 0.9401, 5, samples=500), record(2, 0.9399, 4, samples=500)
    assert numbers([keeps, breaks]) == [2]
    assert numbers([keeps, breaks], limits(max_drop="1pp")) == [2, 1]
    large = record(3, 0.95, 4, samples=500, size_bytes=700)
    small = record(4, 0.94, 5, samples=500, size_bytes=600)
    assert numbers([large, small], limits(max_size="0.65x")) == [3, 4]
    # Where neither fits, the one that is closer to the bound is shown as well.
    assert numbers([large, small], limits(max_size="0.1x")) == [3, 4]
    assert numbers([large, small]) == [3]


def test_what_was_not_fine_tuned_counts_against_what_was_only_where_it_needs_none() -> None:
    tuned = record(1, 0.90, 5, stage="recovered", samples=500)
    remembers, lossless = record(2, 0.91, 4, samples=500), record(3, 0.949, 4, samples=500)
    assert not dominates(remembers, tuned, limits(target_latency="0.5x"))
    assert dominates(lossless, tuned, limits(target_latency="0.5x"))
    # Within the drop that is allowed both are judged by the same limit.
    assert dominates(remembers, tuned, limits(target_latency="0.5x", max_drop="5pp"))
    assert dominates(tuned, record(4, 0.89, 6, samples=500), limits(target_latency="0.5x"))


def test_of_one_network_the_longer_trained_is_shown() -> None:
    policy = CompressionPolicy(pruning={"c0": 0.5})
    short = record(1, 0.905, 5, stage="recovered", seconds={"recovery": 30.0}, policy=policy, samples=500)
    long = record(1, 0.902, 5.05, stage="recovered", seconds={"recovery": 300.0}, policy=policy, samples=500)
    assert pareto_front([short, long]) == [long] == pareto_front([long, short])
    # Unless that has made it worse.
    ruined = replace(long, accuracy=0.7)
    assert pareto_front([short, ruined]) == [short]
