"""An Optuna sampler for choices whose costs add up and whose losses nearly do.

    costs = Costs(ms={"conv1": {"keep": 1.0, "half": 0.6}, "conv2": {"keep": 2.0, "half": 1.1}})
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=KnapsackSampler(costs, seed=0))

Owns what is Optuna's: trials read and remembered, distributions, seeds, workers. What to propose is `planner`'s.
It needs numpy, scipy and Optuna, and of this package only its neighbours `problem`, `graph`, `uniform`, `relaxation`,
`allocate`, `link`, `surrogate`, `beliefs`, `planner` and the error class: nothing of models, engines or measuring.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from autocompress.errors import ConfigError
from autocompress.exploration.knapsack.choice_graph import Graph
from autocompress.exploration.knapsack.problem import Choice, Costs, Index
from autocompress.exploration.knapsack.proposals import Planner, Tuning

# User attribute from which the cost of a trial is read in a study with one objective.
COST_ATTRIBUTE = "cost"


class KnapsackSampler(optuna.samplers.BaseSampler):
    """Propose by solving a knapsack under beliefs that every trial sharpens.

    In a study with two objectives the first is the quality (either direction) and the second the cost, minimised: the
    whole front is looked for, or with `budget` its part within it. In a study with one objective that is the quality,
    `budget` is required, and a trial tells its cost by ``trial.set_user_attr("cost", ms)``; without it the predicted
    one is taken. Costs may be measured in another unit than predicted: the factor is learned. The budget is in
    the measured unit.

    Proposals depend on the seed, the number of the trial and the finished trials alone, so a study that was interrupted
    goes on as it would have. Threads and processes may share a study: what others are trying is not proposed again, and
    is taken to come out as expected. Parameters that the costs do not name are sampled independently, at random.

    Args:
        costs: What may be chosen, and what it costs. Parameters must be suggested with exactly these choices, in order.
        losses: What each choice loses, in any unit in which losses add up, or None where nothing is known.
        budget: Most that a solution may cost, or None for the whole front.
        seed: Fixes every proposal; None draws one.
        floor: Quality of a result that is worth nothing (chance level), or None to take the worst seen.
        reference: Quality where every parameter has its first choice, if it is known: then it is not tried first.
        error: Standard deviation of a measured quality.
        interactions: Pairs of parameters whose losses may interact, beside those with a pair cost.
        cost_of: Reads the measured cost of a finished trial, or None where there is none; instead of the default above.
        predict: What choices cost together, for every parameter and choice of `costs`, where more is known than sums:
            `costs` then propose, and `predict` tells which proposal is best. In the unit of `costs`, and always the
            same of the same; NaN or infinity where nothing is known. Called a few hundred times for a proposal.
        thompson_scale: Share of a posterior draw's deviation that is believed, from 0 (greedy) to 1 (Thompson).

    Raises:
        ConfigError: The costs contradict themselves.
    """

    def __init__(
        self,
        costs: Costs,
        losses: Mapping[str, Mapping[Choice, float]] | None = None,
        *,
        budget: float | None = None,
        seed: int | None = None,
        floor: float | None = None,
        reference: float | None = None,
        error: float = Tuning.error,
        interactions: Sequence[tuple[str, str]] = (),
        cost_of: Callable[[FrozenTrial], float | None] | None = None,
        predict: Callable[[Mapping[str, Choice]], float] | None = None,
        thompson_scale: float = Tuning.thompson_scale,
    ) -> None:
        if budget is not None and not budget > 0:
            raise ConfigError(f"The sampler's budget is {budget}; it must be above 0.")
        if not 0 <= thompson_scale <= 1:
            raise ConfigError(f"The sampler's thompson_scale is {thompson_scale}; it is between 0 and 1.")
        self._graph = Graph(costs)
        # Contradictions are told now, not at the first proposal.
        self._graph.weigh(self._graph.flatten(losses or {}))
        self._losses, self._budget, self._floor, self._reference = losses, budget, floor, reference
        self._tuning = Tuning(thompson_scale=thompson_scale, error=error)
        self._interactions, self._cost_of, self._predict = tuple(interactions), cost_of, predict
        self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._distributions: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(offered)
            for name, offered in zip(self._graph.names, self._graph.choices, strict=True)
        }
        self._index = [{c: k for k, c in reversed(list(enumerate(offered)))} for offered in self._graph.choices]
        self._single = np.array([len(index) == 1 for index in self._index])
        self._lock = threading.Lock()
        self._forget(None, 1.0)

    def __getstate__(self) -> dict[str, Any]:
        # Copies share no lock, and a lock cannot be copied.
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    # -- what Optuna asks ---------------------------------------------------------------------------------------------

    def reseed_rng(self) -> None:
        """Do nothing: the number of the trial is part of the seed, so workers never draw alike."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the parameters that are proposed together: all that the costs name, where there is a choice.

        One that the study has seen with other choices is left out; it is sampled independently.
        """
        self._check(study)
        done = [t for t in study.get_trials(deepcopy=False)[-32:] if t.state.is_finished() and t.distributions]
        seen = done[-1].distributions if done else {}
        return {
            name: mine
            for name, mine in self._distributions.items()
            if not mine.single() and (name not in seen or seen[name] == mine)
        }

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the proposal."""
        names = {name for name, found in search_space.items() if self._distributions.get(name) == found}
        with self._lock:
            if names:
                self._read(study, trial.number)
                rng = np.random.default_rng([self._seed, trial.number])
                pending = list(self._running.values())
                known = self._known | {row.tobytes() for row in pending}
                row = self._planner.propose(rng, self._budget, pending, known)
                self._proposed[trial.number] = row
                chosen = {name: choice for name, choice in self._graph.named(row).items() if name in names}
            else:
                chosen = {}
        return {
            name: chosen[name] if name in chosen else self.sample_independent(study, trial, name, distribution)
            for name, distribution in search_space.items()
        }

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return a random value for a parameter that the costs do not name."""
        seed = np.random.SeedSequence([self._seed, trial.number, zlib.crc32(param_name.encode())])
        plain = optuna.samplers.RandomSampler(seed=int(seed.generate_state(1)[0]))
        return plain.sample_independent(study, trial, param_name, param_distribution)

    # -- reading trials -----------------------------------------------------------------------------------------------

    def _check(self, study: optuna.Study) -> None:
        directions = study.directions
        if len(directions) > 2:
            raise ValueError(f"KnapsackSampler knows quality and cost; the study has {len(directions)} objectives.")
        if len(directions) == 2 and directions[1] != optuna.study.StudyDirection.MINIMIZE:
            raise ValueError("The second objective of a study with KnapsackSampler is the cost: minimize it.")

    def _forget(self, study: str | None, sign: float) -> None:
        self._study = study
        predict = self._predict
        ends = [None if value is None else sign * value for value in (self._floor, self._reference)]
        self._planner = Planner(
            self._graph, self._losses, floor=ends[0], reference=ends[1], tuning=self._tuning,
            interactions=self._interactions,
            exact=None if predict is None else partial(_predicted, predict, self._graph),
        )  # fmt: skip
        self._known: set[bytes] = set()
        self._finished: set[int] = set()
        self._all_finished_below = 0
        self._running: dict[int, Index] = {}
        self._proposed: dict[int, Index] = {}

    def _read(self, study: optuna.Study, number: int) -> None:
        """Learn of trials that have finished since the last proposal, and of those being tried elsewhere."""
        sign = 1.0 if study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else -1.0
        if self._study != study.study_name:
            self._forget(study.study_name, sign)
        self._running = {}
        found: list[tuple[Index, float, float]] = []
        trials = study.get_trials(deepcopy=False)
        # What is finished stays finished: only trials from the first unfinished one on are looked at again.
        start = self._all_finished_below
        gapless = True
        for trial in trials[start:]:
            if trial.state.is_finished():
                if trial.number not in self._finished:
                    self._finish(trial, sign, found)
                if gapless:
                    self._all_finished_below += 1
                    self._finished.discard(trial.number)
                continue
            gapless = False
            if trial.number != number:
                row = self._row(trial)
                if row is not None:
                    self._running[trial.number] = row
        if found:
            rows, quality, cost = zip(*found, strict=True)
            self._planner.observe(rows, quality, cost)

    def _finish(self, trial: FrozenTrial, sign: float, found: list[tuple[Index, float, float]]) -> None:
        self._finished.add(trial.number)
        row = self._row(trial)
        self._proposed.pop(trial.number, None)
        if row is None:
            return
        # A failed trial is not tried again; it tells nothing of quality or cost.
        self._known.add(row.tobytes())
        if trial.state != TrialState.COMPLETE or not math.isfinite(trial.values[0]):
            return
        found.append((row, sign * trial.values[0], self._cost(trial, row)))

    def _cost(self, trial: FrozenTrial, row: Index) -> float:
        if self._cost_of is not None:
            value = self._cost_of(trial)
        elif len(trial.values) == 2:
            value = trial.values[1]
        else:
            value = trial.user_attrs.get(COST_ATTRIBUTE)
        return float(value) if value is not None and math.isfinite(value) and value > 0 else math.nan

    def _row(self, trial: FrozenTrial) -> Index | None:
        """Return the positions of a trial's choices, -1 for what is switched off; None where it has none of ours."""
        params: Mapping[str, Any] = trial.params
        if not trial.state.is_finished():
            params = {**trial.system_attrs.get("fixed_params", {}), **params}
            # A worker has written few of its parameters, or none, when another one looks.
            if trial.number in self._proposed and not params.keys() >= set(self._graph.names):
                return self._proposed[trial.number]
        found = [
            index.get(params[name], -1) if name in params else -1
            for name, index in zip(self._graph.names, self._index, strict=True)
        ]
        row = np.array(found, np.int64)
        row[self._single] = 0
        if (row < 0).all() or (not trial.state.is_finished() and (row < 0).any()):
            return None
        settled = self._graph.apply_switches(row) if (row >= 0).all() else None
        return row if settled is None else settled


def _predicted(predict: Callable[[Mapping[str, Choice]], float], graph: Graph, row: Index) -> float:
    return predict(graph.named(row))
