"""Proposals are moved to the limit: on a machine whose costs are known exactly, and on one that was learned."""

from __future__ import annotations

import random
from statistics import median

import pytest

from autocompress.evaluation.profiler import random_choices
from autocompress.exploration.latency_limit.latency_filter import LatencyFilter
from autocompress.space.search_space import Choice
from autocompress.space.severity import severity
from tests.exploration.conftest import Bench, record
from tests.exploration.known import RATIOS, Known, latency_filter, limits, ratio
from tests.prediction import made_up


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
def test_proposals_end_just_inside_the_limit(target: float, bench: Bench) -> None:
    made = latency_filter(bench, target=f"{target}x", pruning={"ratios": [n / 16 for n in range(15)], "round_to": 1})
    rng = random.Random(1)
    found = []
    for _ in range(30):
        fitted = made.fit(random_choices(made.space, rng))
        assert fitted is not None and fitted.keys() == made.space.parameters.keys()
        assert all(choice in made.space.parameters[name] for name, choice in fitted.items())
        found.append(ratio(made, fitted) / target)
    assert max(found) <= 1
    assert median(found) >= 0.95


def test_what_is_added_is_spread_evenly(bench: Bench) -> None:
    fitted = latency_filter(bench, target="0.75x").fit({})
    assert fitted is not None
    assert {severity(name, choice) for name, choice in fitted.items()} <= {0.0, 0.25, 0.5}
    assert sum(choice != 0 for choice in fitted.values()) >= 4


def test_with_room_the_most_severe_is_undone_first(bench: Bench) -> None:
    made = latency_filter(bench, target="0.7x")
    start: dict[str, Choice] = {
        "prune/c0": 0.75,
        "prune/c1": 0.25,
        "prune/c2": 0.25,
        "prune/c3": 0.75,
        "prune/c4": 0.75,
    }
    assert ratio(made, start) < 0.6
    fitted = made.fit(start)
    assert fitted is not None
    assert max(severity(n, c) for n, c in fitted.items()) < 0.75
    assert fitted["prune/c1"] == fitted["prune/c2"] == 0.25


def test_a_kind_that_makes_the_network_slower_is_not_used_and_undone(bench: Bench) -> None:
    made = latency_filter(bench, Known(int8=1.02), dtype={"choices": ["dense", "int8"]}, **RATIOS)
    fitted = made.fit({})
    assert fitted is not None and not made.space.policy(fitted).int8_layers
    fitted = made.fit(made.space.everywhere(dtype="int8"))
    assert fitted is not None and not made.space.policy(fitted).int8_layers


def test_removed_blocks_are_as_severe_as_their_order_says(bench: Bench) -> None:
    blocks = ("b1", "b0")
    assert severity("block/b0", "keep", blocks) == 0
    assert (
        severity("block/b1", "remove", blocks) < severity("block/b0", "remove") < severity("block/b0", "remove", blocks)
    )
    assert severity("dtype/c0", "int8") < severity("rank/c0", 0.5) == severity("prune/c0", 0.5)


def test_no_network_is_given_twice_until_none_is_left(bench: Bench) -> None:
    made = latency_filter(bench, target="0.75x", pruning={"ratios": [0, 0.5], "include": ["c[0-2]"]})
    known = record(1, 0.9, 9.5, policy=made.space.policy({"prune/c2": 0.5}))
    made.observe(known)
    found = [made.fit(random_choices(made.space, random.Random(n))) for n in range(12)]
    policies = [made.space.policy(choices) for choices in found if choices is not None]
    assert policies and len(set(policies)) == len(policies)
    assert known.policy not in policies
    assert found[-1] is None
    assert all(ratio(made, choices) <= 0.75 for choices in found if choices is not None)


def test_a_limit_that_nothing_reaches_gives_the_fastest_and_says_so(bench: Bench) -> None:
    made = latency_filter(bench, target="0.1x")
    fitted = made.fit({})
    assert not made.reachable and fitted is not None
    assert set(fitted.values()) == {0.75}
    assert made.fit({}) is None


def test_fitting_asks_for_a_bounded_number_of_predictions(bench: Bench) -> None:
    known = Known()
    made = latency_filter(bench, known, dtype={"choices": ["dense", "int8"]}, blocks={"remove": True}, **RATIOS)
    rng = random.Random(0)
    for _ in range(20):
        known.asked = 0
        made.fit(random_choices(made.space, rng))
        assert 0 < known.asked <= 160


def test_a_learned_machine_is_fitted_as_well() -> None:
    predictor = made_up.predictor(made_up.measure(80, seed=0))
    made = LatencyFilter(predictor, made_up.SPACE, limits("0.6x"), 0)
    assert made.can_filter
    rng = random.Random(3)
    fitted = [made.fit(random_choices(made_up.SPACE, rng)) for _ in range(12)]
    true = [made_up.latency_ms(made_up.SPACE.policy(c)) / made_up.BASE_MS for c in fitted if c is not None]
    assert len(true) >= 10
    assert sum(found <= 0.6 for found in true) >= 0.5 * len(true)
    assert 0.54 <= median(true) <= 0.62
