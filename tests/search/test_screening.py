"""Proposals are moved to the limit: on a machine whose costs are known exactly, and on one that was learned."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import optuna
import pytest

from autocompress.config import SAMPLERS, RunConfig
from autocompress.latency.predictor import LatencyPredictor, Observation, Prediction
from autocompress.policy import CompressionPolicy
from autocompress.search.pareto import Constraints
from autocompress.search.profiling import random_choices
from autocompress.search.sampler import make_sampler
from autocompress.search.screening import TRUSTED, Drawn, FittedSampler, Screen, cautious, severity
from autocompress.search.space import Choice
from tests.latency import made_up
from tests.search.conftest import BASELINE, Bench, figures, make_measurement, record
from tests.search.known import Known

RATIOS: dict[str, Any] = {"pruning": {"ratios": [0, 0.25, 0.5, 0.75]}}


def limits(target: str) -> Constraints:
    return Constraints.of(RunConfig(target_latency=target), BASELINE)


def screen(bench: Bench, known: Any = None, target: str = "0.5x", seed: int = 0, **parts: Any) -> Screen:
    space = bench.space(**(parts or RATIOS))
    return Screen(known or Known(), space, limits(target), random.Random(seed))


def ratio(made: Screen, choices: Mapping[str, Choice]) -> float:
    return Known().predict(made.space.policy(choices)).ratio


def measured(policy: CompressionPolicy, found: float, predicted: float | None = None, base: float = 11.5) -> Any:
    return record(1, 0.9, 5, policy=policy, measurement=make_measurement(found * base, base), predicted_ratio=predicted)


# -- fitting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
def test_proposals_end_just_inside_the_limit(target: float, bench: Bench) -> None:
    made = screen(bench, target=f"{target}x", pruning={"ratios": [n / 16 for n in range(15)], "round_to": 1})
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
    fitted = screen(bench, target="0.75x").fit({})
    assert fitted is not None
    assert {severity(name, choice) for name, choice in fitted.items()} <= {0.0, 0.25, 0.5}
    assert sum(choice != 0 for choice in fitted.values()) >= 4


def test_with_room_the_most_severe_is_undone_first(bench: Bench) -> None:
    made = screen(bench, target="0.7x")
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
    made = screen(bench, Known(int8=1.02), dtype={"choices": ["dense", "int8"]}, **RATIOS)
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
    made = screen(bench, target="0.75x", pruning={"ratios": [0, 0.5], "include": ["c[0-2]"]})
    made.observe(measured(made.space.policy({"prune/c2": 0.5}), 0.83))
    found = [made.fit(random_choices(made.space, random.Random(n))) for n in range(12)]
    policies = [made.space.policy(choices) for choices in found if choices is not None]
    assert policies and len(set(policies)) == len(policies)
    assert made.space.policy({"prune/c2": 0.5}) not in policies
    assert found[-1] is None
    assert all(ratio(made, choices) <= 0.75 for choices in found if choices is not None)


def test_a_limit_that_nothing_reaches_gives_the_fastest_and_says_so(bench: Bench) -> None:
    made = screen(bench, target="0.1x")
    fitted = made.fit({})
    assert not made.reachable and fitted is not None
    assert set(fitted.values()) == {0.75}
    assert made.fit({}) is None


def test_fitting_asks_for_a_bounded_number_of_predictions(bench: Bench) -> None:
    known = Known()
    made = screen(bench, known, dtype={"choices": ["dense", "int8"]}, blocks={"remove": True}, **RATIOS)
    rng = random.Random(0)
    for _ in range(20):
        known.asked = 0
        made.fit(random_choices(made.space, rng))
        assert 0 < known.asked <= 160


def test_a_learned_machine_is_fitted_as_well() -> None:
    predictor = LatencyPredictor(made_up.LAYOUT)
    predictor.observe(made_up.measure(80, seed=0).observations)
    made = Screen(predictor, made_up.SPACE, limits("0.6x"), random.Random(0))
    assert made.trusted
    rng = random.Random(3)
    fitted = [made.fit(random_choices(made_up.SPACE, rng)) for _ in range(12)]
    true = [made_up.latency_ms(made_up.SPACE.policy(c)) / made_up.BASE_MS for c in fitted if c is not None]
    assert len(true) >= 10
    assert sum(found <= 0.6 for found in true) >= 0.5 * len(true)
    assert 0.54 <= median(true) <= 0.62


# -- when predictions count -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"ready": False}, {"error": TRUSTED + 0.01}])
def test_a_predictor_that_knows_too_little_screens_nothing(change: dict[str, Any], bench: Bench) -> None:
    known = Known()
    made = screen(bench, known)
    assert made.trusted and made.impossible({})
    for name, value in change.items():
        setattr(known, name, value)
    made = screen(bench, known)
    assert not made.trusted and not made.impossible({})


def test_singular_figures_are_no_reason_to_stop(bench: Bench) -> None:
    class Singular(Known):
        def leave_one_out(self) -> Any:
            raise ValueError("singular matrix")

        def predict(self, policy: CompressionPolicy) -> Prediction:
            raise ValueError("singular matrix")

    made = screen(bench, Singular())
    assert not made.trusted and made.predict(CompressionPolicy()) is None and made.expect(CompressionPolicy()) is None


def test_a_table_that_does_not_fit_this_machine_is_found_out_and_may_come_round(bench: Bench) -> None:
    made = screen(bench)
    for number in range(8):
        assert made.trusted
        made.observe(measured(CompressionPolicy(pruning={"c0": 0.1 + number / 100}), 0.5, predicted=0.6))
    assert not made.trusted
    for number in range(8):
        made.observe(measured(CompressionPolicy(pruning={"c0": 0.5 + number / 100}), 0.5, predicted=0.51))
    assert made.trusted


def test_only_what_is_certain_is_impossible(bench: Bench) -> None:
    choices: dict[str, Choice] = {"prune/c4": 0.25}
    above = ratio(screen(bench), choices)
    assert screen(bench, Known(width=0.05), f"{above / 1.1:.4f}x").impossible(choices)
    assert not screen(bench, Known(width=0.05), f"{above / 1.02:.4f}x").impossible(choices)


def test_a_limit_in_milliseconds_follows_the_baseline_of_the_last_measurements(bench: Bench) -> None:
    made = screen(bench, target="5.75ms")
    assert made.limit == pytest.approx(0.5)
    for number in range(3):
        # The whole machine is half as fast now: the same time is a smaller ratio.
        made.observe(measured(CompressionPolicy(pruning={"c0": (number + 1) / 10}), 0.4, base=23))
    assert made.limit == pytest.approx(0.25)
    assert screen(bench, target="0.5x").limit == 0.5
    assert Screen(Known(), bench.space(), Constraints.of(RunConfig(), BASELINE), random.Random()).limit is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("off", "aim"), [(1.04, 0.96), (0.97, 1.03), (1.5, 0.93)])
def test_aim_follows_how_far_the_last_measurements_were_off(off: float, aim: float, bench: Bench) -> None:
    made = screen(bench)
    for number in range(10):
        policy = CompressionPolicy(pruning={"c0": (number + 1) / 20})
        expected = made.expect(policy)
        assert expected is not None
        made.observe(measured(policy, off * cautious(expected)))
    bottom, top = made.aim()
    assert top / 0.5 == pytest.approx(aim, abs=0.01) and 0.47 * aim < bottom < top


def test_networks_are_learned_with_their_own_noise_and_in_batches_once_many_are_known(bench: Bench) -> None:
    known = Known()
    made = screen(bench, known)
    found = replace(make_measurement(5.75), ratio_low=0.49, ratio_high=0.51)
    made.observe(record(1, 0.9, 5, measurement=found))
    assert known.learned == [Observation(record(1, 0.9, 5).policy, 0.5, pytest.approx(0.02 / 3.92))]
    known.learned = known.learned * 200
    for number in range(2, 5):
        made.observe(record(number, 0.9, 5))
    assert known.size == 200
    made.observe(record(5, 0.9, 5))
    assert known.size == 204


# -- between sampler and study ----------------------------------------------------------------------------------------


def trials(made: Screen, sampler: str, count: int) -> tuple[optuna.Study, list[tuple[dict[str, Any], Drawn]]]:
    study = optuna.create_study(direction="maximize", sampler=make_sampler(sampler, 0, count))
    fitted = study.sampler = FittedSampler(study.sampler, made)
    found = []
    for _ in range(count):
        trial = study.ask()
        choices = {n: trial.suggest_categorical(n, offered) for n, offered in made.space.parameters.items()}
        drawn = fitted.drawn(trial.number)
        assert drawn is not None and drawn.choices == choices == trial.params
        trial.set_constraint("latency", ratio(made, choices) / 0.5 - 1)
        study.tell(trial, figures(made.space.policy(choices))[0])
        found.append((choices, drawn))
    return study, found


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_may_propose_and_the_study_learns_what_was_run(sampler: str, bench: Bench) -> None:
    made = screen(bench)
    study, found = trials(made, sampler, 20)
    assert all(ratio(made, choices) <= 0.5 for choices, _ in found)
    assert sum(drawn.proposed != choices for choices, drawn in found) >= 10
    assert sum(drawn.screened_out for _, drawn in found) >= 3
    if sampler == "nsga2":
        # Fitted trials are members of their generation: without that, none would ever follow the first.
        assert {t.system_attrs.get("NSGAIISampler:generation", 0) for t in study.trials} == {0, 1, 2}


def test_one_trial_in_eight_runs_as_proposed_unless_that_cannot_meet_the_limit(bench: Bench) -> None:
    made = screen(bench, target="0.7x")
    found = trials(made, "random", 32)[1]
    as_proposed = [number for number, (choices, drawn) in enumerate(found) if drawn.proposed == choices]
    exploring = [number for number in range(32) if number % 8 == 7]
    assert set(exploring) <= set(as_proposed) and len(as_proposed) < 16
    assert min(ratio(made, found[number][0]) for number in exploring) < 0.6
    assert all(ratio(made, choices) <= 0.7 for choices, _ in found)


def test_without_trust_proposals_pass_as_they_are(bench: Bench) -> None:
    made = screen(bench, Known(error=0.5))
    found = trials(made, "random", 10)[1]
    assert all(drawn.proposed == choices and drawn.screened_out == 0 for choices, drawn in found)
    assert max(ratio(made, choices) for choices, _ in found) > 0.5


def test_what_waits_goes_first(bench: Bench) -> None:
    made = screen(bench)
    sampler = FittedSampler(make_sampler("random", 0, 10), made)
    waiting: dict[str, Choice] = dict.fromkeys(made.space.parameters, 0.25)
    sampler.waiting.append(waiting)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    trial = study.ask()
    for name, offered in made.space.parameters.items():
        trial.suggest_categorical(name, offered)
    drawn = sampler.drawn(0)
    assert drawn is not None and drawn.proposed == waiting and not sampler.waiting
    # It was counted when it was put aside.
    assert drawn.screened_out == 0
    assert sampler.drawn(1) is None


def test_with_nothing_new_inside_the_limit_nothing_is_built(bench: Bench) -> None:
    made = screen(bench, target="0.85x", pruning={"ratios": [0, 0.5], "include": ["c0", "c2"]})
    found = trials(made, "random", 12)[1]
    built = [choices for choices, drawn in found if not drawn.hopeless]
    assert built and all(ratio(made, choices) <= 0.85 for choices in built)
    assert any(drawn.hopeless for _, drawn in found)


def test_where_nothing_reaches_the_limit_the_sampler_goes_on(bench: Bench) -> None:
    found = trials(screen(bench, target="0.1x"), "random", 8)[1]
    assert not any(drawn.hopeless or drawn.screened_out for _, drawn in found)
    assert set(found[0][0].values()) == {0.75} and len({tuple(choices.values()) for choices, _ in found}) >= 5


def test_a_space_of_one_kind_for_all_layers_is_fitted_too(bench: Bench) -> None:
    made = screen(bench, uniform=True, dtype={"choices": ["dense", "int8"]}, **RATIOS)
    fitted = made.fit({})
    assert fitted is not None and set(fitted) == {"prune/*", "dtype/*"}
    assert ratio(made, fitted) == pytest.approx(0.5) or ratio(made, fitted) < 0.5
