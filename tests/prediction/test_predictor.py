"""The predictor on a machine whose costs are known: how far it is off, whether it knows that, and how fast it is."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import kendalltau

from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.prediction.predictor import LEAST_NETWORKS, LatencyPredictor, Observation, Prediction, PredictionError
from tests.prediction.made_up import BASE_MS, LAYOUT, Measured, latency_ms, measure, predictor


def error(made: LatencyPredictor, fresh: Measured) -> PredictionError:
    predictions = [made.predict(o.policy) for o in fresh.observations]
    return PredictionError.of(predictions, [o.ratio for o in fresh.observations])


FRESH = measure(40, seed=1)


@pytest.fixture(scope="module")
def trained() -> LatencyPredictor:
    return predictor(measure(80, seed=0))


# -- how good it is ---------------------------------------------------------------------------------------------------


def test_networks_it_never_saw_are_predicted_and_ranked(trained: LatencyPredictor) -> None:
    found = error(trained, FRESH)
    assert found.n == 40 and found.mape < 0.03 and found.within_10 == 1.0, found
    assert found.tau is not None and found.tau > 0.85
    assert 0.85 <= found.covered <= 1.0
    # Intervals that cover because they are wide say nothing.
    widths = [(p.high - p.low) / p.ratio for p in (trained.predict(o.policy) for o in FRESH.observations)]
    assert np.median(widths) < 0.2


def test_it_beats_the_mean_and_multiply_accumulates_alone(trained: LatencyPredictor) -> None:
    found = error(trained, FRESH).mape
    known = measure(80, seed=0).observations
    mean = float(np.mean([o.ratio for o in known]))
    true = np.array([o.ratio for o in FRESH.observations])
    assert found < 0.2 * np.abs(mean / true - 1).mean()

    def macs(o: Observation) -> list[float]:
        return [1.0, float(sum(unit.macs for unit in LAYOUT.units(o.policy)))]

    features = np.array([macs(o) for o in known])
    fit = np.linalg.lstsq(features, np.array([o.ratio for o in known]), rcond=None)[0]
    guesses = np.array([macs(o) for o in FRESH.observations]) @ fit
    assert found < 0.5 * np.abs(guesses / true - 1).mean()


def test_leaving_one_out_tells_the_error_on_new_networks(trained: LatencyPredictor) -> None:
    own, fresh = trained.leave_one_out(), error(trained, FRESH)
    assert own.n == 80 and 0.5 * fresh.mape < own.mape < 2 * fresh.mape
    assert own.covered >= 0.85 and own.tau is not None and own.tau > 0.85


def test_leaving_one_out_is_what_a_predictor_without_it_says() -> None:
    known = measure(60, seed=5)
    own = predictor(known).leave_one_out()
    errors = []
    for index in range(0, 60, 6):
        left = known.observations[index]
        others = [i for i in range(60) if i != index]
        rest = predictor(Measured([known.observations[i] for i in others], [known.layers[i] for i in others]))
        errors.append(abs(rest.predict(left.policy).ratio / left.ratio - 1))
    assert 0.3 * own.mape < float(np.mean(errors)) < 3 * own.mape


def test_more_networks_make_it_better_and_surer() -> None:
    few, many = predictor(measure(LEAST_NETWORKS, seed=2)), predictor(measure(160, seed=2))
    assert error(many, FRESH).mape < error(few, FRESH).mape
    policies = [o.policy for o in FRESH.observations]
    assert np.mean([many.moments(p)[1] for p in policies]) < np.mean([few.moments(p)[1] for p in policies])


@pytest.mark.parametrize("name", ["spatial_svd", "cp"])
def test_a_factorization_that_it_never_saw_makes_it_unsure(trained: LatencyPredictor, name: str) -> None:
    def width(factorization: str) -> float:
        own = LayerPolicy(rank_ratio=0.25, factorization=factorization)
        found = trained.predict(CompressionPolicy("bf16", layers={"c2": own, "c3": own}))
        return (found.high - found.low) / found.ratio

    assert width(name) > 2 * width("tucker2")


def test_layers_that_are_faster_for_no_reason_that_shows_are_learned() -> None:
    fresh = measure(40, seed=1, uneven=True)
    found = np.mean([error(predictor(measure(30, seed=seed, uneven=True)), fresh).mape for seed in range(3, 6)])
    assert found < 0.04


def test_what_a_network_as_a_whole_does_to_its_layers_is_learned() -> None:
    def crowded(made: Measured) -> Measured:
        # Layers of a large network take longer than they would in a small one, and the profiler tells them so.
        observations, layers = [], []
        for o, times in zip(made.observations, made.layers, strict=True):
            factor = o.ratio**0.25
            observations.append(replace(o, ratio=o.ratio * factor))
            layers.append([replace(t, ratio=t.ratio * factor) for t in times])
        return Measured(observations, layers)

    fresh = crowded(measure(40, seed=1))
    assert error(predictor(crowded(measure(80, seed=0))), fresh).mape < 0.03


def test_two_networks_that_share_most_are_compared_better_than_each_is_known(trained: LatencyPredictor) -> None:
    policy = FRESH.observations[0].policy
    other = replace(policy, pruning={**policy.pruning, "c2": 0.5 if policy.pruning.get("c2") != 0.5 else 0.25})
    found, deviation = trained.difference(policy, other)
    means = trained.predict(policy).ratio - trained.predict(other).ratio
    assert found == pytest.approx(means, abs=1e-4)
    assert deviation <= trained.moments(policy)[1] + trained.moments(other)[1]
    true = (latency_ms(policy) - latency_ms(other)) / BASE_MS
    assert abs(found - true) < 4 * deviation + 0.01
    back = trained.difference(other, policy)
    assert back == (pytest.approx(-found, abs=1e-4), pytest.approx(deviation, rel=0.05))
    assert trained.difference(policy, policy) == (0.0, 0.0)


# -- learning ---------------------------------------------------------------------------------------------------------


def test_it_refuses_to_guess_from_too_few() -> None:
    known = measure(LEAST_NETWORKS, seed=0).observations
    made = LatencyPredictor(LAYOUT)
    made.observe(known[:-1])
    assert not made.ready and made.size == LEAST_NETWORKS - 1
    for ask in (
        lambda: made.predict(CompressionPolicy()),
        lambda: made.moments(CompressionPolicy()),
        lambda: made.difference(CompressionPolicy(), known[0].policy),
        made.leave_one_out,
    ):
        with pytest.raises(ValueError, match=f"{LEAST_NETWORKS - 1} measured networks and 0 layers' times"):
            ask()
    made.observe(known[-1:])
    assert not made.ready
    made.observe_layers(measure(LEAST_NETWORKS, seed=0).layers[0])
    assert made.ready and made.predict(CompressionPolicy("bf16")).ratio > 0


def test_a_network_measured_again_replaces_what_was_known() -> None:
    known = measure(40, seed=6)
    made = predictor(known)
    wrong = [replace(o, ratio=o.ratio * 2) for o in known.observations]
    made.predict(known.observations[0].policy)
    made.observe(wrong)
    assert made.size == 40
    only = predictor(Measured(wrong, known.layers))
    for o in FRESH.observations[:5]:
        assert made.predict(o.policy).ratio == pytest.approx(only.predict(o.policy).ratio, rel=0.02)


def test_a_bad_measurement_counts_little() -> None:
    made = measure(60, seed=7)
    known = made.observations
    bad = replace(known[0], ratio=3 * known[0].ratio)
    honest = predictor(Measured([replace(bad, deviation=bad.ratio), *known[1:]], made.layers))
    fooled = predictor(Measured([bad, *known[1:]], made.layers))
    assert error(honest, FRESH).mape < error(fooled, FRESH).mape
    assert error(honest, FRESH).mape < 0.04


def test_the_same_networks_in_the_same_order_give_the_same_figures() -> None:
    first, second = predictor(measure(40, seed=8)), predictor(measure(40, seed=8))
    assert [first.predict(o.policy) for o in FRESH.observations] == [
        second.predict(o.policy) for o in FRESH.observations
    ]


def test_asking_changes_nothing(trained: LatencyPredictor) -> None:
    policy = FRESH.observations[0].policy
    before = trained.predict(policy)
    for o in measure(20, seed=11).observations:
        trained.predict(o.policy)
    assert trained.predict(policy) == before


# -- edges ------------------------------------------------------------------------------------------------------------


def test_no_difference_between_networks_is_learned_as_none() -> None:
    known = measure(40, seed=9)
    layers = [[replace(time, ratio=0.1) for time in network[:7]] for network in known.layers]
    made = predictor(Measured([replace(o, ratio=0.7, deviation=0.0) for o in known.observations], layers))
    for o in FRESH.observations:
        found = made.predict(o.policy)
        assert found.ratio == pytest.approx(0.7, rel=0.02)
        assert math.isfinite(found.low) and found.low <= found.ratio <= found.high
    own = made.leave_one_out()
    assert own.mape < 0.02
    json.dumps(own.to_dict(), allow_nan=False)


def test_every_figure_is_a_number_and_every_ratio_positive(trained: LatencyPredictor) -> None:
    layers = {name: LayerPolicy("int8", 0.25) for name in LAYOUT.inventory.layers}
    least = CompressionPolicy("bf16", dict.fromkeys(LAYOUT.inventory.groups, 0.99), layers, ("b",))
    for policy in (CompressionPolicy("bf16"), CompressionPolicy("fp32"), least):
        found = trained.predict(policy)
        assert found.ratio > 0 and 0 <= found.low <= found.ratio <= found.high < math.inf
        assert 0 <= trained.moments(policy)[1] < math.inf
    # Far from all that was measured, nothing leads away without bound.
    assert trained.predict(least).ratio < 2 * min(o.ratio for o in FRESH.observations)
    json.dumps(trained.leave_one_out().to_dict(), allow_nan=False)


def test_one_class_of_layers_timed_and_the_others_not() -> None:
    known = measure(40, seed=10)
    made = predictor(Measured(known.observations, []))
    made.observe_layers([t for network in known.layers for t in network if t.unit.kind == "pointwise"])
    found = error(made, FRESH)
    assert found.mape < 0.1 and math.isfinite(found.mape)


def test_prediction_is_fast_enough_to_stand_in_for_a_measurement(trained: LatencyPredictor) -> None:
    policies = [o.policy for o in measure(60, seed=12).observations]
    for policy in policies:
        trained.predict(policy)
    took = []
    for policy in policies:
        begun = time.thread_time()
        trained.predict(policy)
        took.append(time.thread_time() - begun)
    assert np.median(took) < 0.003


# -- figures of error -------------------------------------------------------------------------------------------------


def test_the_error_of_known_figures() -> None:
    predictions = [Prediction(1.0, 0.9, 1.1), Prediction(2.0, 1.9, 2.1), Prediction(3.0, 2.0, 4.0)]
    found = PredictionError.of(predictions, [1.0, 2.5, 3.2])
    assert found.n == 3 and found.mape == pytest.approx((0 + 0.2 + 0.2 / 3.2) / 3)
    assert found.within_10 == pytest.approx(2 / 3) and found.covered == pytest.approx(2 / 3)
    assert found.tau == pytest.approx(kendalltau([1, 2, 3], [1, 2.5, 3.2]).statistic) == 1.0
    assert PredictionError.of(predictions[:1], [1.0]).tau is None


def test_networks_that_all_take_the_same_have_no_order() -> None:
    found = PredictionError.of([Prediction(1.0, 0.9, 1.1), Prediction(1.1, 1.0, 1.2)], [1.0, 1.0])
    assert found.tau is None
    json.dumps(found.to_dict(), allow_nan=False)
