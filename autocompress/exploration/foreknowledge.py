"""What is found out before the first trial: what single choices lose, and what networks are predicted to cost."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from typing import Any

import torch

from autocompress.config import RunConfig
from autocompress.evaluation.evaluator import CandidateEvaluator
from autocompress.exploration.additive_costs import fitted_costs, macs_ratio, size_ratio
from autocompress.exploration.constraints import Constraints
from autocompress.exploration.first_candidates import Knowns
from autocompress.exploration.int8_sensitivity import Int8Sensitivity
from autocompress.exploration.latency_limit.latency_filter import TRUSTED
from autocompress.exploration.latency_limit.reach import Ratio, Reach, measured_reach, predicted_reach
from autocompress.exploration.samplers import SamplerPrior
from autocompress.exploration.sensitivity import SAMPLES, SensitivityPass
from autocompress.exploration.time_plan import TimePlan
from autocompress.policy import CompressionPolicy
from autocompress.prediction.predictor import LatencyPredictor
from autocompress.runs.observer import Observer
from autocompress.runs.records import TrialRecord
from autocompress.runs.time_ledger import TimeLedger
from autocompress.space.search_space import Choice, SearchSpace
from autocompress.tasks import Task

# An error of the quality that a sampler is told, at least.
_LEAST_ERROR = 1e-3
# Candidates that there is time for, at least, where the most compressed network is measured: it takes less than one.
_LEAST_CANDIDATES = 5


class Foreknowledge:
    """Finds out what first candidates and the knapsack sampler begin with.

    Args:
        task: Gives the divergence.
        evaluator: Has the uncompressed network, and makes compressed ones.
        config: Sampler, seed, how ranges are set.
        plan: How long it may take.
        observer: Is told of progress.

    Attributes:
        losses: What single choices lose; None where the sampler does not ask, or nothing could be measured.
        knowns: What first candidates are told.
    """

    knowns: Knowns

    def __init__(
        self, task: Task, evaluator: CandidateEvaluator, config: RunConfig, plan: TimePlan, observer: Observer
    ) -> None:
        self._task, self._evaluator, self._config, self._plan, self._observer = task, evaluator, config, plan, observer
        self.losses: Mapping[str, Mapping[Choice, float]] | None = None

    def gather(
        self, space: SearchSpace, baseline: TrialRecord, predictor: LatencyPredictor | None, limits: Constraints
    ) -> SamplerPrior | None:
        """Measure and predict; return what the knapsack sampler is told.

        Args:
            space: What may be chosen.
            baseline: Of the uncompressed network.
            predictor: Of latencies, if there is one.
            limits: The user's.

        Returns:
            None for the other samplers, which learn all from trials.
        """
        assert baseline.accuracy is not None
        evaluator, config, knapsack = self._evaluator, self._config, self._config.sampler == "knapsack"
        sensitivities = SensitivityPass(
            evaluator.base, evaluator.inventory, evaluator.scores, self._task, space,
            quantization=config.quantization, compressor=evaluator.compressor,
            inputs=evaluator.validation_inputs(SAMPLES),
        )  # fmt: skip
        with evaluator.ledger.charge("profile"):
            if knapsack:
                self._observer.stage("Measuring what choices cost in accuracy")
                found = sensitivities.run(self._plan.sensitivity_until, self._observer.progress)
                self.losses = found.losses or None
                if found.note is not None:
                    self._observer.warn(f"What choices cost in accuracy is not known: {found.note}.")
            ratio = self._ratio(space, baseline, predictor, limits)
            costs = fitted_costs(space, ratio, config.seed)
        until = self._plan.sensitivity_until + self._plan.sensitivity

        def divergence(policy: CompressionPolicy) -> float | None:
            with evaluator.ledger.charge("profile"):
                return sensitivities.divergence(policy) if time.monotonic() < until else None

        def int8() -> tuple[Int8Sensitivity, Mapping[str, float]] | None:
            with evaluator.ledger.charge("profile"):
                return sensitivities.int8()

        self.knowns = Knowns(costs, ratio, self.losses or {}, divergence, int8)
        if not knapsack:
            return None
        error = (baseline.accuracy * (1 - baseline.accuracy) / max(len(evaluator.data.targets), 1)) ** 0.5
        losses: Any = self.losses
        predict: Any = lambda choices: ratio(space.policy(choices))  # noqa: E731 - of the space's own choices alone
        # Not told how good the baseline is: it is tried, so that there is a result to deploy where nothing pays.
        return SamplerPrior(costs, losses, budget=limits.budget, error=max(error, _LEAST_ERROR), predict=predict)

    def _ratio(
        self, space: SearchSpace, baseline: TrialRecord, predictor: LatencyPredictor | None, limits: Constraints
    ) -> Ratio:
        """Return what predicts the cost of a network, in shares of the uncompressed one's; say what is out of reach."""
        layout = self._evaluator.graphs.layout
        if limits.latency is None and limits.size_bytes is not None:
            ratio: Ratio = size_ratio(layout, 4 if baseline.policy.dense_dtype == "fp32" else 2)
        elif predictor is not None and predictor.ready and predictor.leave_one_out().mape <= TRUSTED:
            # As it is now: the sampler learns by itself what trials say of costs.
            ratio = predicted_ratio(copy.deepcopy(predictor))
        else:
            ratio = macs_ratio(layout)
            if limits.latency is not None and self._evaluator.forecast is None:
                return self._measured(space, ratio, limits)
        self._say(predicted_reach(space, ratio), limits)
        return ratio

    def _measured(self, space: SearchSpace, ratio: Ratio, limits: Constraints) -> Ratio:
        """Return arithmetic as a prediction of latency, by what the most compressed network really takes."""
        if self._plan.candidates < _LEAST_CANDIDATES * self._plan.candidate:
            reach = predicted_reach(space, ratio)
        else:
            self._observer.stage("Measuring how far compression can go")
            reach = measured_reach(self._evaluator, self._config, space, ratio, limits.budget)
        self._say(reach, limits)
        return reach.calibrated(ratio)

    def _say(self, reach: Reach, limits: Constraints) -> None:
        if (found := reach.describe(limits.budget)) is not None:
            self._observer.warn(found)

    def block_order(self, space: SearchSpace) -> list[str]:
        """Return removable blocks, the one whose removal changes the outputs least first."""
        evaluator = self._evaluator
        blocks = [name for name in evaluator.inventory.blocks if f"block/{name}" in space.parameters]
        if self.losses is not None:
            known = self.losses
            return sorted(blocks, key=lambda name: known[f"block/{name}"]["remove"])
        losses = dict.fromkeys(blocks, math.inf)
        until = time.monotonic() + self._plan.sensitivity
        inputs = evaluator.validation_inputs(SAMPLES)
        if blocks:
            self._observer.stage("Ordering the blocks")
        with evaluator.ledger.charge("profile"), torch.no_grad():
            reference = evaluator.base(inputs)
            for name in blocks:
                if time.monotonic() >= until:
                    break
                model = evaluator.compress(CompressionPolicy(removed_blocks=(name,)), TimeLedger())
                losses[name] = float(self._task.divergence(model(inputs), reference))
        return sorted(losses, key=losses.__getitem__)


def predicted_ratio(predictor: LatencyPredictor) -> Ratio:
    """Return what a predictor says of a network, in shares of the uncompressed one."""
    return lambda policy: predictor.predict(policy).ratio
