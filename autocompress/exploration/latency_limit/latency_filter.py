"""Predicted latency in the search: what cannot meet the limit is not built, and what is built lands just inside it.

A network that is well inside its latency limit has been compressed more than it had to be, one that is over it is of no
use: both cost a build. `LatencyFilter` moves a sampler's proposals to just inside the limit, by predictions that take a
millisecond; `LatencyLimitedSampler` puts it between any Optuna sampler and its study, so that the study learns of what
was measured. An unreliable predictor changes nothing. Owns no figures: those that count are measured.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from autocompress.exploration.latency_limit.local_search import Choices, LocalSearch
from autocompress.exploration.latency_limit.machine_speed import MachineSpeed
from autocompress.exploration.pareto import Constraints
from autocompress.policy import CompressionPolicy
from autocompress.prediction.layer_times import LayerTime
from autocompress.prediction.predictor import LatencyPredictor, Observation, Prediction
from autocompress.runs.records import Measurement, TrialRecord
from autocompress.space.search_space import Choice, SearchSpace

# Mean absolute error up to which predictions are worth acting on: of networks left out one by one, and of the last ones
# predicted in this run, which shows a table that does not fit this machine.
TRUSTED = 0.08
_RECENT = 8
# Networks are fitted by this many standard deviations above what is predicted: the mean alone would lead to where
# predictions are too low by mistake.
_CAUTION = 0.3
# Share of fitted networks that are to come out inside the limit. The others are near misses, and teach the predictor.
_INSIDE = 0.75
# Upper ends of measured intervals over predictions: what is assumed of them, how many of the last ones are kept, from
# how many on they count alone, and between which bounds what follows from them is believed.
_ASSUMED = (0.98, 1.0, 1.02, 1.03)
_LAST, _ENOUGH = 16, 8
_LEAST_MISS, _MOST_MISS = 0.95, 1.25
# Known networks' ratios are learned anew where what the machine's pace is thought to do to them moved by more.
_STALE = 0.003
# What is this far below the aim, as a share of the limit, is near enough.
_NEAR = 0.02
# What is to be gained by using what the best network left of the limit, and what is left when it has been used.
_WORTH, _LEAVE = 0.03, 0.01
# Every how many trials the best network's room is used.
_IMPROVE_EVERY = 3
# Every how many trials one is not fitted, so that predictor and sampler see other places too.
_EXPLORE_EVERY = 8
# Proposals drawn for one trial before the last one is taken as it is.
_DRAWS = 3


def explores(number: int) -> bool:
    """Whether a trial runs as it was proposed, unless that cannot meet the limit."""
    return number % _EXPLORE_EVERY == _EXPLORE_EVERY - 1


def improves(number: int) -> bool:
    """Whether a trial starts from the best network so far, if that leaves room below the limit."""
    return number % _IMPROVE_EVERY == 1 and not explores(number)


def cautious(prediction: Prediction) -> float:
    """Return a ratio that most networks of this prediction stay below."""
    return prediction.ratio + _CAUTION * (prediction.high - prediction.ratio) / 1.96


class LatencyFilter:
    """Judge and change proposals by their predicted latency.

    Args:
        predictor: Of this model on this engine; learns on. It may be empty.
        space: What may be chosen.
        constraints: Whose latency limit counts; without one, nothing is screened.
        seed: Of what decides between moves that are equally good.

    Attributes:
        taken: Networks that have been measured or are about to be, which `fit` does not return.
        blocks: Those that may be removed, the one whose removal changes least first, as far as that is known.
        best: Choices and record of the best network so far; None while none is inside the limit.
        finishing: Whether every trial starts from it, as long as it leaves room below the limit.
        reachable: Whether some network is predicted to meet the limit, as far as the last `fit` saw.
    """

    def __init__(
        self, predictor: LatencyPredictor, space: SearchSpace, constraints: Constraints, seed: int = 0
    ) -> None:
        self.predictor = predictor
        self.space = space
        self._seed, self._rng = seed, random.Random(seed)
        self.taken: set[CompressionPolicy] = set()
        self.blocks: Sequence[str] = ()
        self.best: tuple[Choices, TrialRecord] | None = None
        self.polish_best = False
        self.reachable = True
        self._constraints = constraints
        self._seen: list[TrialRecord] = []
        self._machine_speed = 0, constraints.machine_speed(())
        # What the predictor was told, and what ratios were multiplied by then; what it has not been told yet.
        self._told: dict[CompressionPolicy, tuple[Measurement, float]] = {}
        self._new: dict[CompressionPolicy, TrialRecord] = {}
        self._expected: dict[CompressionPolicy, float] = {}
        self._misses: deque[tuple[Measurement, float]] = deque(maxlen=_LAST)
        self._errors: deque[tuple[Measurement, float]] = deque(maxlen=_RECENT)
        self._left_out: tuple[int, float] = (-1, 1.0)

    def reseed(self, number: int) -> None:
        """Begin drawing for a trial."""
        self._rng.seed(f"{self._seed} {number}")

    # -- learning -----------------------------------------------------------------------------------------------------

    def observe(self, record: TrialRecord) -> None:
        """Learn a measured network, and how far its prediction was off."""
        found = record.measurement
        assert found is not None
        self.taken.add(record.policy)
        self._seen.append(record)
        self._new[record.policy] = record
        if record.predicted_ratio is not None:
            self._errors.append((found, record.predicted_ratio))
        expected = self._expected.pop(record.policy, None)
        if expected is not None:
            self._misses.append((found, expected))
        # Learning is cubic in what is known: one more network out of hundreds can wait for the next few.
        if 64 * len(self._new) >= self.predictor.size:
            self._learn()

    @property
    def machine_speed(self) -> MachineSpeed:
        """The machine's, going by what was measured so far. Ratios are learned, and predicted, at its usual one."""
        if self._machine_speed[0] != len(self._seen):
            self._machine_speed = len(self._seen), self._constraints.machine_speed(self._seen)
        return self._machine_speed[1]

    def _learn(self) -> None:
        """Tell the predictor what is new, and what is known otherwise than it was told."""
        machine_speed, observations, times = self.machine_speed, [], []
        fresh = {policy: record.measurement for policy, record in self._new.items()}
        known = {policy: found for policy, (found, _) in self._told.items()}
        for policy, found in {**known, **fresh}.items():
            assert found is not None
            level = machine_speed.normalise(found)
            if policy not in fresh and abs(level / self._told[policy][1] - 1) <= _STALE:
                continue
            # A network that is measured again was profiled beside its first measurement.
            if policy in fresh and policy not in known:
                times += self._layer_times(self._new[policy], level)
            self._told[policy] = found, level
            ratios = (level * ratio for ratio in found.quiet)
            observations.append(Observation.of(policy, *ratios))
        self.predictor.observe(observations)
        self.predictor.observe_layers(times)
        self._new = {}

    def _layer_times(self, record: TrialRecord, level: float) -> list[LayerTime]:
        assert record.measurement is not None
        scale, taken = level / record.measurement.baseline_ms, record.layer_ms
        units = [unit for unit in self.predictor.layout.units(record.policy) if unit.layer in taken] if taken else []
        network = record.policy.hash
        return [LayerTime(unit, scale * taken[unit.layer], taken[unit.layer], network) for unit in units]

    # -- judging ------------------------------------------------------------------------------------------------------

    @property
    def limit(self) -> float | None:
        """The ratio to the baseline, at the usual pace, that meets the latency limit at every pace of the machine."""
        latency = self._constraints.latency
        return None if latency is None else self.machine_speed.limit(latency)

    @property
    def can_filter(self) -> bool:
        """Whether there is a limit, and predictions are good enough to act on."""
        return self.limit is not None and self.is_reliable

    @property
    def is_reliable(self) -> bool:
        """Whether predictions are good enough to act on."""
        if not self.predictor.ready:
            return False
        errors = [
            abs(predicted / (self.machine_speed.normalise(found) * found.ratio) - 1)
            for found, predicted in self._errors
        ]
        if len(errors) == _RECENT and fmean(errors) > TRUSTED:
            return False
        return self._error() <= TRUSTED

    def _error(self) -> float:
        """Return the mean absolute error of networks left out one by one."""
        if self._left_out[0] != self.predictor.size:
            try:
                found = self.predictor.leave_one_out().mape
            except ValueError:  # singular, as with networks that are all alike
                found = 1.0
            self._left_out = (self.predictor.size, found)
        return self._left_out[1]

    def expect(self, policy: CompressionPolicy) -> Prediction | None:
        """Return the prediction of a network that will be measured next; its measurement shows how to aim."""
        found = self.predict(policy)
        if found is not None:
            self._expected = {policy: cautious(found)}
        return found

    def predict(self, policy: CompressionPolicy) -> Prediction | None:
        """Return the prediction, or None while too little is known."""
        if not self.predictor.ready:
            return None
        try:
            return self.predictor.predict(policy)
        except ValueError:
            return None

    def _ratio(self, policy: CompressionPolicy) -> float:
        """Return the ratio to fit by."""
        found = self.predict(policy)
        return float("inf") if found is None else cautious(found)

    def impossible(self, choices: Mapping[str, Choice]) -> bool:
        """Whether the whole predicted interval lies above the limit; never when predictions are not trusted."""
        if not self.can_filter:
            return False
        found, limit = self.predict(self.space.policy(choices)), self.limit
        return found is not None and limit is not None and found.low > limit

    def target_ratio(self) -> tuple[float, float]:
        """Return the lowest and the highest cautiously predicted ratio that is just inside the limit."""
        assert self.limit is not None
        known = [self.machine_speed.normalise(found) * found.ratio_high / expected for found, expected in self._misses]
        known += _ASSUMED if len(known) < _ENOUGH else ()
        miss = min(max(float(np.quantile(known, _INSIDE)), _LEAST_MISS), _MOST_MISS)
        return self.limit * (1 / miss - _NEAR), self.limit / miss

    # -- fitting ------------------------------------------------------------------------------------------------------

    def fit(self, choices: Mapping[str, Choice]) -> Choices | None:
        """Return choices near these whose predicted latency is just inside the limit; None when none is new.

        What saves nothing is undone, the most severe choices first; what has to be added is spread evenly. `can_filter`
        must hold. Where no network reaches the limit, the fastest is returned and `reachable` turns false.
        """
        limit = self.limit
        assert limit is not None
        bottom, top = self.target_ratio()
        search = LocalSearch(choices, self.space, self._ratio, self._rng, self.blocks)
        self.reachable = True
        if search.ratio > top:
            search.compress(top)
            fastest = self.predict(self.space.policy(search.choices))
            self.reachable = fastest is not None and fastest.low <= limit
        elif search.ratio < bottom:
            search.relax(top)
        return self._settled(search, bottom, top)

    def _settled(self, search: LocalSearch, bottom: float, top: float) -> Choices | None:
        """Bring a fitting as near to `top` as it gets; return its choices, or None when they are not new."""
        search.polish(bottom, top)
        search.swap(bottom, top)
        search.perturb(bottom, top, self.taken)
        policy = self.space.policy(search.choices)
        if policy in self.taken:
            return None
        self.taken.add(policy)
        return search.choices

    def improve(self) -> Choices | None:
        """Return choices like the best network's that use what it left of the limit; None where that is too little.

        Predictions of networks that are alike are equally wrong, so they are corrected by what was measured of the best
        one. `can_filter` must hold.
        """
        limit = self.limit
        if limit is None or self.best is None:
            return None
        choices, record = self.best
        expected, measured = self.predict(record.policy), record.measurement
        if expected is None or measured is None:
            return None
        taken = self.machine_speed.normalise(measured) * measured.ratio_high
        if taken > limit * (1 - _WORTH):
            return None
        off = taken / expected.ratio

        def corrected(policy: CompressionPolicy) -> float:
            found = self.predict(policy)
            return float("inf") if found is None else found.ratio * off

        top = limit * (1 - _LEAVE)
        bottom = top - _NEAR * limit
        search = LocalSearch(choices, self.space, corrected, self._rng, self.blocks)
        search.relax(top)
        return self._settled(search, bottom, top)


@dataclass(frozen=True)
class Proposal:
    """What became of a sampler's proposal.

    Attributes:
        proposed: By the sampler.
        choices: Of the trial.
        screened_out: Proposals that were not built because their latency was certain to be over the limit.
        hopeless: Whether these choices are certain to be over the limit too, and nothing else was found.
    """

    proposed: Choices
    choices: Choices
    screened_out: int
    hopeless: bool


class LatencyLimitedSampler(optuna.samplers.BaseSampler):
    """Another sampler whose proposals go through a `LatencyFilter` before they become a trial's.

    Args:
        inner: Any sampler.
        latency_filter: What it goes through.

    Attributes:
        waiting: Proposals from elsewhere that go before the sampler's own.
    """

    def __init__(self, inner: optuna.samplers.BaseSampler, latency_filter: LatencyFilter) -> None:
        self._inner, self._latency_filter = inner, latency_filter
        self.waiting: deque[Choices] = deque()
        self._proposal: tuple[int, Proposal] | None = None

    def proposal(self, number: int) -> Proposal | None:
        """Return how the choices of a trial came about; None when its choices were queued."""
        return self._proposal[1] if self._proposal is not None and self._proposal[0] == number else None

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return every parameter: they are fitted together."""
        return {
            name: CategoricalDistribution(offered) for name, offered in self._latency_filter.space.parameters.items()
        }

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the choices of a trial."""
        if (known := self.proposal(trial.number)) is not None:
            return dict(known.choices)
        # What was drawn for earlier trials decides nothing: a run that was interrupted draws the same.
        self._latency_filter.reseed(trial.number)
        found = self._screened(study, trial, search_space)
        self._proposal = trial.number, found
        return dict(found.choices)

    def _screened(self, study: optuna.Study, trial: FrozenTrial, space: dict[str, BaseDistribution]) -> Proposal:
        latency_filter = self._latency_filter
        if (
            (latency_filter.polish_best or improves(trial.number))
            and latency_filter.can_filter
            and latency_filter.best is not None
        ):
            improved = latency_filter.improve()
            if improved is not None:
                return Proposal(latency_filter.best[0], improved, 0, hopeless=False)
        exploring = explores(trial.number)
        screened_out, impossible, proposed = 0, False, Choices()
        for attempt in range(_DRAWS):
            counted = bool(self.waiting)
            proposed = self.waiting.popleft() if self.waiting else self._propose(study, trial, space)
            if not latency_filter.can_filter:
                return Proposal(proposed, proposed, 0, hopeless=False)
            impossible = latency_filter.impossible(proposed)
            screened_out += impossible and not counted
            if exploring and not impossible and not counted:
                return Proposal(proposed, proposed, screened_out, hopeless=False)
            if exploring and attempt < _DRAWS - 1 and not counted:
                continue
            fitted = latency_filter.fit(proposed)
            if fitted is not None:
                return Proposal(proposed, fitted, screened_out if latency_filter.reachable else 0, hopeless=False)
            if not latency_filter.reachable:
                break
        # Where nothing reaches the limit, what comes closest is found by trying.
        hopeless = impossible and latency_filter.reachable
        return Proposal(proposed, proposed, screened_out if latency_filter.reachable else 0, hopeless=hopeless)

    def _propose(self, study: optuna.Study, trial: FrozenTrial, space: dict[str, BaseDistribution]) -> Choices:
        found = self._inner.sample_relative(study, trial, self._inner.infer_relative_search_space(study, trial))
        for name, distribution in space.items():
            if name not in found:
                found[name] = self._inner.sample_independent(study, trial, name, distribution)
        return {name: found[name] for name in space}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Ask the sampler; for parameters of a trial that was queued without them."""
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Tell the sampler."""
        self._inner.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Tell the sampler."""
        self._inner.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Tell the sampler."""
        self._inner.reseed_rng()
