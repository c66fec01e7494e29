"""Optuna samplers by name, always named and seeded: defaults change between Optuna's releases."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import optuna

from autocompress.config import SAMPLERS
from autocompress.errors import ConfigError, nearest
from autocompress.exploration.knapsack.problem import Choice, Costs
from autocompress.exploration.knapsack.sampler import KnapsackSampler

# Those that lose nothing by proposing a trial before the last one is told: `knapsack` counts on what is running. TPE
# kept inside a limit in 35 trials of 60 where it had in 38.
FORESIGHTED = ("knapsack", "random")


@dataclass(frozen=True)
class SamplerPrior:
    """What the ``knapsack`` sampler is told of a problem; the others learn all of it from trials.

    Attributes:
        costs: What each choice costs; the parameters and choices of the study, exactly.
        losses: Sensitivities in any unit, or None.
        budget: Upper bound of the cost in the unit it is measured in, or None for the whole front.
        floor: Quality of a ruined model: the chance level, or None.
        reference: Quality of the uncompressed model, or None.
        error: Standard deviation of a measured quality.
        predict: What choices cost together, or None where no more is known than the sums of `costs`.
    """

    costs: Costs
    losses: Mapping[str, Mapping[Choice, float]] | None = None
    budget: float | None = None
    floor: float | None = None
    reference: float | None = None
    error: float = 0.002
    predict: Callable[[Mapping[str, Choice]], float] | None = None


def make_sampler(
    name: str, seed: int, n_trials: int, knowledge: SamplerPrior | None = None
) -> optuna.samplers.BaseSampler:
    """Return the sampler of this name.

    Raises:
        ConfigError: No such sampler, or ``knapsack`` without knowledge.
    """
    if name == "knapsack":
        if knowledge is None:
            raise ConfigError("The knapsack sampler needs the cost of every choice; none is known for this search.")
        return KnapsackSampler(
            knowledge.costs, knowledge.losses,
            budget=knowledge.budget, seed=seed, floor=knowledge.floor, reference=knowledge.reference,
            error=knowledge.error, predict=knowledge.predict,
        )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=10)
        if name == "nsga2":
            # Several generations must fit the budget, whatever it is.
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(8, min(50, n_trials // 5)))
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=10)
        if name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
    raise ConfigError(f"Unknown sampler {name!r}.{nearest(name, SAMPLERS)}")
