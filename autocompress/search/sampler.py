"""Optuna samplers by name, always named and seeded: defaults change between Optuna's releases."""

from __future__ import annotations

import warnings

import optuna

from autocompress.config import SAMPLERS
from autocompress.errors import ConfigError, nearest


def make_sampler(name: str, seed: int, n_trials: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of this name.

    Raises:
        ConfigError: No such sampler.
    """
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
