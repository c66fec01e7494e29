"""The sampler in real Optuna studies: Optuna's own contract, and what it promises beyond it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, MultiObjectiveSamplerTestCase, RelativeSamplerTestCase
from optuna.trial import TrialState

from autocompress.errors import ConfigError
from autocompress.exploration.knapsack.problem import Choice, Costs, Pair, Switch
from autocompress.exploration.knapsack.sampler import COST_ATTRIBUTE, KnapsackSampler

RATIOS = (0.0, 0.25, 0.5, 0.75)
WORK = (4.0, 1.0, 2.0, 3.0, 0.5)
DEAR = (0.1, 0.02, 0.4, 0.05, 0.3)
optuna.logging.set_verbosity(optuna.logging.ERROR)


def make_costs(**changes: Any) -> Costs:
    ms: dict[str, dict[Choice, float]] = {f"prune/{i}": {r: w * (1 - r) for r in RATIOS} for i, w in enumerate(WORK)}
    ms |= {f"dtype/{i}": {"dense": 0.0, "int8": -0.2 * w} for i, w in enumerate(WORK)}
    pairs = [Pair(f"dtype/{i}", f"dtype/{i + 1}", [[0, 0.1], [0.1, 0]]) for i in range(4)]
    return Costs(ms, **{"pairs": pairs, "fixed_ms": 1.0, **changes})


LOSSES = {f"prune/{i}": {r: d * r**2 for r in RATIOS} for i, d in enumerate(DEAR)}


def figures(params: dict[str, Any]) -> tuple[float, float]:
    """Return quality and cost, the cost in another unit than the predicted one."""
    lost = sum(d * params[f"prune/{i}"] ** 2 + 0.01 * (params[f"dtype/{i}"] == "int8") for i, d in enumerate(DEAR))
    types = [params[f"dtype/{i}"] == "int8" for i in range(5)]
    cost = 1.0 + sum(w * (1 - params[f"prune/{i}"] - 0.2 * t) for i, (w, t) in enumerate(zip(WORK, types, strict=True)))
    cost += 0.1 * sum(a != b for a, b in pairwise(types))
    return 0.9 - 0.8 * lost, max(0.02 * cost, 0.001)


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    params: dict[str, Any] = {f"prune/{i}": trial.suggest_categorical(f"prune/{i}", RATIOS) for i in range(5)}
    return params | {f"dtype/{i}": trial.suggest_categorical(f"dtype/{i}", ("dense", "int8")) for i in range(5)}


def front(trial: optuna.Trial) -> tuple[float, float]:
    return figures(suggest(trial))


def bounded(trial: optuna.Trial) -> float:
    quality, cost = figures(suggest(trial))
    trial.set_constraint("latency", cost / 0.12 - 1)
    trial.set_user_attr(COST_ATTRIBUTE, cost)
    return quality


def front_study(sampler: BaseSampler, **where: Any) -> optuna.Study:
    return optuna.create_study(directions=["maximize", "minimize"], sampler=sampler, **where)


def drawn(study: optuna.Study) -> list[dict[str, Any]]:
    return [t.params for t in study.trials]


class TestContract(BasicSamplerTestCase, MultiObjectiveSamplerTestCase):
    """What Optuna asks of every sampler, here with parameters that the costs do not name."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: KnapsackSampler(make_costs(), seed=0)


class TestRelative(RelativeSamplerTestCase):
    """Likewise of samplers that propose parameters together."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: KnapsackSampler(make_costs(), seed=0)


def test_a_seed_fixes_what_is_drawn() -> None:
    def run(seed: int) -> list[dict[str, Any]]:
        study = front_study(KnapsackSampler(make_costs(), seed=seed))
        study.optimize(front, n_trials=14)
        return drawn(study)

    assert run(3) == run(3) != run(4)


def test_an_interrupted_study_goes_on_as_it_would_have(tmp_path: Path) -> None:
    whole = front_study(KnapsackSampler(make_costs(), LOSSES, seed=1))
    whole.optimize(front, n_trials=20)
    where = {"storage": f"sqlite:///{tmp_path}/study.db", "study_name": "s", "load_if_exists": True}
    for upto in (3, 11, 20):
        study = front_study(KnapsackSampler(make_costs(), LOSSES, seed=1), **where)
        study.optimize(front, n_trials=upto - len(study.trials))
    assert drawn(study) == drawn(whole)


def test_nothing_is_tried_twice_until_everything_has_been() -> None:
    costs = Costs({"a": {0: 2.0, 1: 1.0, 2: 0.5}, "b": {"x": 2.0, "y": 1.0}})
    study = front_study(KnapsackSampler(costs, seed=0))

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        a, b = trial.suggest_categorical("a", (0, 1, 2)), trial.suggest_categorical("b", ("x", "y"))
        return 1 - 0.1 * a - 0.05 * (b == "y"), 4 - a - (b == "y")

    study.optimize(objective, n_trials=9)
    first = {tuple(p.values()) for p in drawn(study)[:6]}
    assert len(first) == 6
    assert len(study.trials) == 9


def test_a_switched_off_parameter_makes_no_new_proposal() -> None:
    costs = Costs(
        {"block": {"keep": 0.0, "remove": 0.0}, "a": {0: 2.0, 1: 1.5, 2: 1.0}}, free=[Switch("block", "remove", ("a",))]
    )
    study = front_study(KnapsackSampler(costs, seed=0))

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        kept = trial.suggest_categorical("block", ("keep", "remove")) == "keep"
        a = trial.suggest_categorical("a", (0, 1, 2))
        return (0.9 - 0.1 * a, 3.0 - 0.5 * a) if kept else (0.5, 1.0)

    study.optimize(objective, n_trials=4)
    assert sorted((p["block"], p["a"]) for p in drawn(study)) == [("keep", 0), ("keep", 1), ("keep", 2), ("remove", 0)]


def test_what_others_are_trying_is_not_proposed_again(tmp_path: Path) -> None:
    where = {"storage": f"sqlite:///{tmp_path}/study.db", "study_name": "s", "load_if_exists": True}
    studies = [front_study(KnapsackSampler(make_costs(), LOSSES, seed=5), **where) for _ in range(3)]
    running = []
    for round_number in range(4):
        for study in studies:
            trial = study.ask()
            running.append((study, trial, front(trial)))
        if round_number % 2:
            for study, trial, values in running:
                study.tell(trial, values)
            running = []
    tried = [tuple(p.items()) for p in drawn(studies[0])]
    assert len(set(tried)) == len(tried) == 12


def test_threads_share_one_sampler() -> None:
    study = front_study(KnapsackSampler(make_costs(), LOSSES, seed=5))
    study.optimize(front, n_trials=16, n_jobs=4)
    tried = {tuple(p.items()) for p in drawn(study)}
    assert len(tried) == 16


def test_a_failed_trial_is_neither_learned_from_nor_repeated() -> None:
    study = front_study(KnapsackSampler(make_costs(), LOSSES, seed=0))

    def fails(trial: optuna.Trial) -> tuple[float, float]:
        found = front(trial)
        if trial.number % 3 == 1:
            raise RuntimeError("the runtime refused it")
        return (float("nan"), 1.0) if trial.number % 3 == 2 else found

    study.optimize(fails, n_trials=15, catch=(RuntimeError,))
    assert sum(t.state == TrialState.FAIL for t in study.trials) == 10
    assert len({tuple(p.items()) for p in drawn(study)}) == 15


def test_enqueued_trials_come_first_and_are_learned_from() -> None:
    study = front_study(KnapsackSampler(make_costs(), LOSSES, seed=0))
    wanted = {n: next(iter(row)) for n, row in make_costs().ms.items()}
    study.enqueue_trial(wanted)
    study.enqueue_trial({"prune/0": 0.75})
    study.optimize(front, n_trials=8)
    assert drawn(study)[0] == wanted
    assert drawn(study)[1]["prune/0"] == 0.75
    assert wanted not in drawn(study)[1:]


def test_one_objective_finds_the_best_within_the_budget() -> None:
    study = optuna.create_study(direction="maximize", sampler=KnapsackSampler(make_costs(), budget=0.12, seed=0))
    study.optimize(bounded, n_trials=25)
    inside = [t.value for t in study.trials if all(v <= 0 for v in t.constraints.values())]
    assert len(inside) >= 8
    assert max(inside) > 0.9 - 0.8 * 0.13


@pytest.mark.parametrize("rest", [0.3, 0.6])
def test_a_constant_that_predictions_know_nothing_of_is_learned(rest: float) -> None:
    """As arithmetic knows nothing of a recurrence: what is proposed must not stay above the budget for it."""
    whole = figures({f"prune/{i}": 0.0 for i in range(5)} | {f"dtype/{i}": "dense" for i in range(5)})[1]
    budget = rest + 0.5 * (1 - rest)

    def bounded(trial: optuna.Trial) -> float:
        quality, cost = figures(suggest(trial))
        trial.set_user_attr(COST_ATTRIBUTE, rest + (1 - rest) * cost / whole)
        return quality

    costs = []
    for seed in range(4):
        study = optuna.create_study(
            direction="maximize", sampler=KnapsackSampler(make_costs(), budget=budget, seed=seed)
        )
        study.optimize(bounded, 16)
        costs += [t.user_attrs[COST_ATTRIBUTE] / budget for t in study.trials[6:]]
    assert np.mean(np.array(costs) <= 1.0) >= 0.6 and np.median(costs) > 0.9


def test_a_lower_is_better_quality_and_a_missing_cost() -> None:
    study = optuna.create_study(direction="minimize", sampler=KnapsackSampler(make_costs(), LOSSES, budget=6.0, seed=0))
    study.optimize(lambda trial: 1 - figures(suggest(trial))[0], n_trials=10)
    costs = [figures(t.params)[1] / 0.02 for t in study.trials[1:]]
    # Without a measurement the predicted cost counts.
    assert max(costs) <= 6.0 + 1e-6


@pytest.mark.parametrize("lower", [False, True])
def test_a_known_reference_is_not_tried_and_means_the_same(lower: bool) -> None:
    # Quality is worth nothing at 0: told as an error, at 1.
    told = {"floor": 1.0, "reference": 0.1} if lower else {"floor": 0.0, "reference": 0.9}
    directions = ["minimize" if lower else "maximize", "minimize"]
    study = optuna.create_study(directions=directions, sampler=KnapsackSampler(make_costs(), LOSSES, seed=0, **told))

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        quality, cost = front(trial)
        return (1 - quality if lower else quality), cost

    study.optimize(objective, n_trials=8)
    nothing = {name: offered[0] for name, offered in make_costs().choices.items()}
    assert nothing not in drawn(study)
    planner = study.sampler._planner
    assert planner.share(np.array([0.9, 0.45, 0.0]) - lower) == pytest.approx([0.0, 0.5, 1.0])


def test_twenty_trials_stand_above_a_hundred_at_random() -> None:
    def area(study: optuna.Study) -> float:
        points = sorted(((t.values[1], t.values[0]) for t in study.trials), key=lambda p: p[0])
        total, best, last = 0.0, 0.0, 0.0
        for cost, quality in points:
            total, last = total + (cost - last) * best, cost
            best = max(best, quality)
        return total + (0.25 - last) * best

    for seed in range(3):
        ours = front_study(KnapsackSampler(make_costs(), LOSSES, seed=seed, floor=0.0))
        theirs = front_study(optuna.samplers.RandomSampler(seed))
        ours.optimize(front, n_trials=20)
        theirs.optimize(front, n_trials=100)
        assert area(ours) > area(theirs)


class Widths:
    """Layers whose costs are products of widths, of which sums know only what each saves from the whole network.

    Nor do sums know what a change of width costs by itself.
    """

    names = tuple(f"prune/{i}" for i in range(8))
    dear = tuple(0.02 + 0.03 * i for i in range(8))

    def cost(self, choices: Mapping[str, Any]) -> float:
        left = [1.0, *(1 - choices[name] for name in self.names), 1.0]
        return float(sum(a * b + 0.2 * (a != b) for a, b in pairwise(left))) / 9

    def sums(self) -> Costs:
        whole = dict.fromkeys(self.names, 0.0)
        saved = {n: {r: self.cost(whole) - self.cost({**whole, n: r}) for r in RATIOS} for n in self.names}
        # As fitted to mild networks: the strongest of all would save more than there is, so all save less.
        return Costs({n: {r: 0.2 - 0.6 * s for r, s in found.items()} for n, found in saved.items()})

    def front(self, trial: optuna.Trial) -> tuple[float, float]:
        params = {name: trial.suggest_categorical(name, RATIOS) for name in self.names}
        lost = sum(d * params[name] ** 2 for d, name in zip(self.dear, self.names, strict=True))
        return 0.9 - 0.8 * lost, self.cost(params)


def test_what_is_known_of_costs_beyond_sums_is_used() -> None:
    widths = Widths()
    asked: list[Mapping[str, Choice]] = []

    def predict(choices: Mapping[str, Choice]) -> float:
        asked.append(choices)
        return widths.cost(choices)

    def area(sampler: BaseSampler) -> float:
        study = front_study(sampler)
        study.optimize(widths.front, 20)
        points = np.array([t.values for t in study.trials])
        # Of quality above 0, cost below 1.
        steps = np.linspace(0, 1, 501)
        return float(np.mean([max([q for q, c in points if c <= step], default=0.0) for step in steps]))

    gains = []
    for seed in range(5):
        alone = area(KnapsackSampler(widths.sums(), seed=seed))
        gains.append(area(KnapsackSampler(widths.sums(), seed=seed, predict=predict)) - alone)
    assert sum(gain > 0 for gain in gains) >= 4 and np.mean(gains) > 0.005
    assert all(set(choices) == set(widths.names) for choices in asked)
    # A few hundred for a proposal at most, those of before remembered.
    assert len(asked) < 5 * 20 * 300


def test_a_budget_is_met_by_what_is_predicted_and_not_by_sums() -> None:
    widths = Widths()

    def bounded(trial: optuna.Trial) -> float:
        quality, cost = widths.front(trial)
        trial.set_constraint("latency", cost / 0.3 - 1)
        trial.set_user_attr(COST_ATTRIBUTE, cost)
        return quality

    study = optuna.create_study(
        direction="maximize", sampler=KnapsackSampler(widths.sums(), budget=0.3, seed=0, predict=widths.cost)
    )
    study.optimize(bounded, 12)
    costs = [t.user_attrs[COST_ATTRIBUTE] for t in study.trials[1:]]
    assert sum(cost <= 0.3 for cost in costs) >= 10 and np.median(costs) > 0.25


def test_a_sampler_that_predicts_can_be_sent_to_another_process() -> None:
    sampler = KnapsackSampler(Widths().sums(), seed=0, predict=Widths().cost)
    here, there = front_study(sampler), front_study(pickle.loads(pickle.dumps(sampler)))
    for study in (here, there):
        study.optimize(Widths().front, 10)
    assert drawn(here) == drawn(there)


def test_nothing_promises_more_than_another_while_no_trial_has_a_cost() -> None:
    # Equal parameters without a reference in common: there is none to begin with.
    costs = Costs(
        {"a": {0: 3.0, 1: 2.0}, "b": {1: 2.0, 2: 1.0}, "c": {i: float(i) for i in range(12)}}, equal=[("a", "b")]
    )
    study = front_study(KnapsackSampler(costs, seed=0))

    def broken(trial: optuna.Trial) -> tuple[float, float]:
        for name, offered in costs.choices.items():
            trial.suggest_categorical(name, offered)
        raise RuntimeError("nothing runs here")

    study.optimize(broken, 12, catch=RuntimeError)
    assert len({tuple(params.values()) for params in drawn(study)}) == 12


def test_what_cannot_be_predicted_is_worth_its_sum() -> None:
    widths = Widths()

    def sometimes(choices: Mapping[str, Choice]) -> float:
        return np.nan if choices["prune/0"] == 0.5 else np.inf if choices["prune/1"] == 0.5 else widths.cost(choices)

    study = front_study(KnapsackSampler(widths.sums(), seed=0, predict=sometimes))
    study.optimize(widths.front, 15)
    assert len({tuple(params.values()) for params in drawn(study)}) == 15
    # One of which nothing is known is told by sums alone.
    alone, unknown = (
        front_study(KnapsackSampler(widths.sums(), seed=0, predict=predict)) for predict in (None, lambda _: np.nan)
    )
    alone.optimize(widths.front, 15)
    unknown.optimize(widths.front, 15)
    assert drawn(alone)[:7] == drawn(unknown)[:7]


def test_a_copy_is_a_sampler_of_its_own() -> None:
    sampler = KnapsackSampler(make_costs(), seed=0)
    study = front_study(sampler)
    study.optimize(front, n_trials=3)
    other = copy.deepcopy(sampler)
    elsewhere = front_study(other)
    elsewhere.optimize(front, n_trials=3)
    assert drawn(elsewhere) == drawn(study)


def test_a_study_it_cannot_serve_is_refused() -> None:
    sampler = KnapsackSampler(make_costs(), seed=0)
    with pytest.raises(ValueError, match="3 objectives"):
        optuna.create_study(directions=["maximize"] * 3, sampler=sampler).optimize(lambda t: (1, 1, bounded(t)), 1)
    with pytest.raises(ValueError, match="minimize it"):
        optuna.create_study(directions=["maximize"] * 2, sampler=sampler).optimize(front, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"budget": 0.0}, "budget is 0.0"),
        ({"thompson_scale": 2.0}, "thompson_scale is 2.0"),
        ({"losses": {"prune/9": {0.0: 1.0}}}, "'prune/9'"),
        ({"losses": {"prune/0": {0.3: 1.0}}}, "no choice 0.3"),
        ({"costs": Costs({})}, "nothing to allocate"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        KnapsackSampler(**{"costs": make_costs(), **arguments})


def test_a_thousand_trials_do_not_stop_it() -> None:
    study = front_study(KnapsackSampler(make_costs(), LOSSES, seed=0))
    distributions = {n: optuna.distributions.CategoricalDistribution(list(row)) for n, row in make_costs().ms.items()}
    rng = np.random.default_rng(0)
    for _ in range(1000):
        params = {n: d.choices[rng.integers(len(d.choices))] for n, d in distributions.items()}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, values=figures(params)))  # type: ignore[arg-type]
    known = {tuple(p.items()) for p in drawn(study)}
    study.optimize(front, n_trials=5)
    assert not known & {tuple(p.items()) for p in drawn(study)[1000:]}
