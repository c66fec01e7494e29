from __future__ import annotations

import optuna
import pytest

from autocompress.config import SAMPLERS
from autocompress.errors import ConfigError
from autocompress.exploration.knapsack.problem import Costs
from autocompress.exploration.samplers import SamplerPrior, make_sampler


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_name_makes_its_sampler_without_a_warning(name: str) -> None:
    knowledge = SamplerPrior(Costs({"a": {0.0: 1.0, 0.5: 0.6}})) if name == "knapsack" else None
    assert make_sampler(name, 0, 100, knowledge).__class__.__name__.lower().startswith(name.replace("nsga2", "nsgaii"))


@pytest.mark.parametrize("name", ["tpe", "nsga2", "random"])
def test_a_seed_fixes_what_is_drawn(name: str) -> None:
    def draws(seed: int) -> list[float]:
        study = optuna.create_study(sampler=make_sampler(name, seed, 10))
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=5)
        return [t.params["x"] for t in study.trials]

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    assert draws(3) == draws(3) != draws(4)


@pytest.mark.parametrize(("n_trials", "population"), [(1, 8), (100, 20), (10_000, 50)])
def test_several_generations_fit_the_budget(n_trials: int, population: int) -> None:
    sampler = make_sampler("nsga2", 0, n_trials)
    assert sampler._population_size == population  # type: ignore[attr-defined]


def test_the_knapsack_needs_to_know_what_choices_cost() -> None:
    with pytest.raises(ConfigError, match="needs the cost of every choice"):
        make_sampler("knapsack", 0, 10)


def test_an_unknown_sampler_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'nsga3'.* Did you mean 'nsga2'"):
        make_sampler("nsga3", 0, 10)
