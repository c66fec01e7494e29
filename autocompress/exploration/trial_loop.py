"""The trials of a search: ask for choices, score them, tell the result; nothing finished is ever lost.

Each finished trial is in ``study.db`` and in ``trials.jsonl`` before the next one starts. One broad ``except`` stands
here, around a trial: whatever fails costs that trial alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import Any

import optuna

from autocompress.errors import (
    AutoCompressError,
    ConfigError,
    EngineError,
    TaskError,
    UnavailableError,
    VerificationError,
)
from autocompress.evaluation.evaluator import CandidateEvaluator
from autocompress.exploration.early_rejection import cannot_win
from autocompress.exploration.knapsack.sampler import COST_ATTRIBUTE
from autocompress.exploration.latency_limit.latency_filter import LatencyFilter, explores
from autocompress.exploration.milder_choices import milder_choices
from autocompress.exploration.pareto import Constraints
from autocompress.exploration.refusals import Refusals
from autocompress.exploration.selection import most_accurate
from autocompress.exploration.study_log import first_records, note, restore, tell, tell_rejected
from autocompress.exploration.trial_source import FIRST, PROPOSED, SCREENED_OUT, Asked, TrialSource
from autocompress.measurement.protocol import Protocol
from autocompress.policy import CompressionPolicy
from autocompress.prediction.predictor import LatencyPredictor, Prediction
from autocompress.runs.records import MEASURED, TrialRecord
from autocompress.space.search_space import Choice, SearchSpace
from autocompress.tasks.validation import ProxyEstimate

# What a trial notes that was refused.
_REFUSED = "refused"
# The sampler drew networks that are already known this often in a row: the space is exhausted, or as good as.
_REPEATS = 64
# Occasions more for a trial that may be inside the limit.
_FURTHER = 2
# What these first trials tell is worth more to a sampler than the time that asking ahead saves.
_FIRST_TOLD = 3
# Trials in a row that the user's own code fails before it is the code that is at fault.
_USER_FAILURES = 3


class TrialLoop:
    """Run trials until the budget ends.

    Args:
        evaluator: Scores one policy.
        space: Turns choices into policies.
        study: Opened by `open_study`.
        constraints: Latency and size bounds.
        on_trial: Called with every finished record.
        predictor: Of latencies; learns from every trial, and screens proposals by the latency limit once it is trusted.
        seed: Of what is decided at random between proposal and trial.
        finalists: Candidates that are fine-tuned in the end; what cannot become one is not built. 0 builds all.
        ahead: Whether the next network is asked for, and made, while one is being built.
        cost: Predicts what a network costs in shares of the uncompressed one, where no predictor knows better; None
            leaves out what needs it: milder networks after ones that went too far.
        on_message: Called with what the user should know.
    """

    def __init__(
        self,
        evaluator: CandidateEvaluator,
        space: SearchSpace,
        study: optuna.Study,
        constraints: Constraints,
        on_trial: Callable[[TrialRecord], None] = lambda record: None,
        *,
        predictor: LatencyPredictor | None = None,
        seed: int = 0,
        finalists: int = 0,
        ahead: bool = True,
        cost: Callable[[CompressionPolicy], float] | None = None,
        on_message: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._cost, self._on_message = cost, on_message
        self._refusals = Refusals(space.everywhere())
        # Milder networks that were asked for by now.
        self._milder: set[CompressionPolicy] = set()
        self._longest = 0.0
        self._user_failures = 0
        self.evaluator = evaluator
        self.space = space
        self.study = study
        self.constraints = constraints
        # Fine-tuned records are left out: the study learns from figures that compare.
        self.records = {r.number: r for r in evaluator.run.history() if r.stage == "proxy"}
        self._on_trial, self._finalists, self._asks_ahead = on_trial, finalists, ahead
        restored = restore(study, first_records(evaluator.run.history()), space.parameters, constraints)
        if restored:
            on_message(f"The study lacked {restored} finished trials of the log; it has been told of them.")
        self._by_policy = {r.policy: r for r in self.records.values() if r.state != "failed"}
        self._remember_refusals()
        self._choices: dict[int, dict[str, Choice]] = {t.number: t.params for t in study.get_trials(deepcopy=False)}
        self.latency_filter: LatencyFilter | None = None
        # The next trial, or why there is none, when it was asked for while the one before was being scored.
        self._ahead: Asked | Exception | None = None
        if predictor is not None:
            self.latency_filter = LatencyFilter(predictor, space, constraints, seed)
            for record in evaluator.run.history():
                if record.measurement is not None and record.measurement.source == MEASURED:
                    self.latency_filter.observe(record)
            self.latency_filter.best = self._best()
        self._source = TrialSource(
            study, space, self._refusals, self.latency_filter, limited=constraints.latency is not None,
            known=[record.policy for record in self.records.values()],
        )  # fmt: skip

    def _best(self) -> tuple[dict[str, Choice], TrialRecord] | None:
        """Return choices and record of the best trial; None while none is inside the limits."""
        records = list(self.records.values())
        if self.latency_filter is not None:
            records = self.constraints.feasible_at_all_speeds(records, self.latency_filter.machine_speed) or records
        best = most_accurate(records, self.constraints)
        if best is None or not self.constraints.within_budget(best) or best.number not in self._choices:
            return None
        return self._choices[best.number], best

    def _remember_refusals(self) -> None:
        """Take note of what trials of earlier sessions finished, and which were refused, in their order."""
        refused = {t.number for t in self.study.get_trials(deepcopy=False) if t.user_attrs.get(_REFUSED)}
        for number, record in sorted(self.records.items()):
            if record.choices is None:
                continue
            choices = self._refusals.allowed(dict(record.choices))
            if record.state == "complete":
                self._refusals.finished(choices)
            elif number in refused:
                self._refusals.refused(choices, record.error or "")

    def replace(self, record: TrialRecord) -> None:
        """Take a trial's record as it is after another measurement."""
        self.records[record.number] = record
        if self.latency_filter is not None:
            if record.measurement is not None and record.measurement.source == MEASURED:
                self.latency_filter.observe(record)
            self.latency_filter.best = self._best()

    def finish(self) -> None:
        """From here on trials use the room that the best one leaves below the latency limit, as long as it does."""
        if self.latency_filter is not None:
            self.latency_filter.polish_best = True

    def choices_of(self, number: int) -> dict[str, Choice] | None:
        """Return what a trial chose; None for one that the study does not have."""
        return self._choices.get(number)

    def attempt(self, choices: dict[str, Choice], deadline: float = float("inf")) -> TrialRecord | None:
        """Run one trial with these choices, before the sampler's own; a network that is known is not run again.

        Args:
            choices: One of every parameter.
            deadline: `time.monotonic()` by which it must have ended.

        Returns:
            Its record; None where it failed, or there is no time for it.

        Raises:
            ConfigError, UnavailableError: See `run`.
        """
        policy = self.space.policy(choices)
        known = self._by_policy.get(policy)
        if known is None:
            if time.monotonic() + self._longest > deadline:
                return None
            self._source.queue(choices, **{FIRST: True})
            self._timed(another=False)
            known = self._by_policy.get(policy)
        return known if known is not None and known.state == "complete" else None

    def _timed(self, *, another: bool) -> bool:
        """Run one trial; note what it took, which the next one may take, too."""
        started = time.monotonic()
        learned = self._one(another=another)
        self._longest = max(0.7 * self._longest, time.monotonic() - started)
        return learned

    def enqueue_seeds(self, block_order: list[str], *, queue: bool = True) -> None:
        """Put the first policies in the queue: see `TrialSource.enqueue_seeds`."""
        self._source.enqueue_seeds(block_order, queue=queue)

    def run(
        self, n_trials: int, deadline: float, progress: Callable[[int, int], None] = lambda done, total: None, *,
        done_when: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        """Run until `n_trials` have finished (those of an earlier session count) or `time.monotonic()` is `deadline`.

        Args:
            n_trials: Trials at most.
            deadline: When the last one must have ended, going by the longest so far.
            progress: Called with the trials done and `n_trials`.
            done_when: Asked before every trial whether another one is worth while.

        Raises:
            ConfigError: Results cannot be written, or the user's data cannot be read: no other trial would do better.
            UnavailableError: The engine or the device has gone.
        """
        repeated = 0
        try:
            while (done := len(self.records)) < n_trials and repeated < _REPEATS:
                progress(done, n_trials)
                started = time.monotonic()
                if started + self._longest >= deadline or done_when():
                    break
                another = _FIRST_TOLD <= done + 1 < n_trials and started + 2 * self._longest < deadline
                repeated = 0 if self._timed(another=another) else repeated + 1
            # What was asked for ahead, and there is no time for.
            left, self._ahead = self._ahead, None
            if isinstance(left, Asked):
                self._source.keep(left)
        except optuna.exceptions.StorageInternalError as error:
            reason = error.__cause__ or error
            raise ConfigError(
                f"Cannot write {self.evaluator.run.study_file}: {reason}. What was written before is kept, and "
                "--resume goes on from it."
            ) from error
        progress(len(self.records), n_trials)

    def _ask_ahead(self) -> None:
        """Ask for the next trial, and make its network, while nothing is measured: `CandidateEvaluator.evaluate`."""
        try:
            asked = self._ahead = self._source.ask()
            if not asked.closed and asked.policy not in self._by_policy:
                self.evaluator.prepare(asked.policy, look=self._looks(asked.trial.number))
        except Exception as error:  # noqa: BLE001 - it is raised when its turn comes, not in the trial before it
            if self._ahead is None:
                self._ahead = error

    def _one(self, *, another: bool) -> bool:
        """Run one trial, and prepare `another`; return whether anything new came of it."""
        asked, self._ahead = self._ahead or self._source.ask(), None
        if isinstance(asked, Exception):
            raise asked
        if asked.closed:
            return not asked.fresh
        trial, choices, policy, number = asked.trial, asked.choices, asked.policy, asked.trial.number
        known = self._by_policy.get(policy)
        predicted = self.latency_filter.expect(policy) if self.latency_filter is not None and known is None else None
        try:
            # The same network drawn again: its figures are known, and the study learns them for these choices too.
            record = known if known is not None else self._evaluated(trial, policy, predicted, another=another)
        except Exception as error:  # the one broad except: a trial may fail, the search goes on
            if self._ends_search(error):
                raise
            self._failed(trial, choices, policy, error, predicted)
            return True
        self._user_failures = 0
        if record.state == "rejected":
            return self._rejected(trial, record, new=known is None)
        note(trial, record, self.constraints, self.latency_filter.machine_speed if self.latency_filter else None)
        if known is None:
            record = replace(record, choices=trial.params)
            self.evaluator.run.append(record)
            self.records[number] = record
            self._by_policy[policy] = record
            self._choices[number] = choices
            self._refusals.finished(choices)
            if self.latency_filter is not None:
                if record.measurement is not None and record.measurement.source == MEASURED:
                    self.latency_filter.observe(record)
                self.latency_filter.best = self._best()
        tell(self.study, trial, record)
        if known is None:
            self._on_trial(record)
            if not trial.user_attrs.get(FIRST):
                self._ask_milder(choices, record)
        return known is None

    def _ends_search(self, error: Exception) -> bool:
        """Whether an error is not its candidate's fault; resuming then fails the trial that is left running."""
        if isinstance(error, TaskError):
            # One candidate's outputs may be what the user's metric refuses; those of all of them are not.
            self._user_failures += 1
            return self._user_failures >= _USER_FAILURES
        return isinstance(error, (ConfigError, UnavailableError))

    def _ask_milder(self, choices: dict[str, Choice], record: TrialRecord) -> None:
        """Queue a milder network after one that went too far; predictions that are trusted have seen to that before."""
        latency_filter = self.latency_filter
        if (
            self._cost is None
            or (latency_filter is not None and latency_filter.can_filter)
            or record.policy in self._milder
        ):
            return
        spent = self.constraints.cost(record, latency_filter.machine_speed if latency_filter else None)
        blocks = latency_filter.blocks if latency_filter is not None else ()
        found = milder_choices(
            choices, record, self.space, self.constraints, self._cost, spent=spent, blocks=blocks
        )  # fmt: skip
        policy = None if found is None else self.space.policy(found)
        if found is not None and policy is not None and policy not in self._by_policy and policy not in self._milder:
            self._milder.add(policy)
            self.study.enqueue_trial(found, user_attrs={PROPOSED: choices})

    def _evaluated(
        self, trial: optuna.Trial, policy: CompressionPolicy, predicted: Prediction | None, *, another: bool
    ) -> TrialRecord:
        """Return the record of a network that is new; its prediction is noted before."""
        meanwhile = self._ask_ahead if another and self._asks_ahead else None
        if predicted is None:
            return self._decided(self.evaluator.evaluate(policy, trial.number, meanwhile=meanwhile))
        trial.set_user_attr("predicted", [predicted.ratio, predicted.low, predicted.high])
        hopeless = self._judge(trial.number, predicted)
        record = self.evaluator.evaluate(policy, trial.number, hopeless=hopeless, meanwhile=meanwhile)
        return self._decided(replace(record, predicted_ratio=predicted.ratio))

    def _decided(self, record: TrialRecord) -> TrialRecord:
        """Return a record measured until it is known whether it is inside the limit, where that would make it the best.

        The interval of a single occasion is wide: a network just inside the limit is not known to be.
        """
        measured = record.measurement
        if record.state != "complete" or measured is None or measured.source != MEASURED:
            return record
        inside = [r for r in self.records.values() if r.state == "complete" and self.constraints.within_budget(r)]
        best = max((r.accuracy or 0.0 for r in inside), default=0.0)
        if not self.constraints.undecided(measured) or (record.accuracy or 0.0) < best - self.constraints.tie:
            return record
        try:
            return self.evaluator.measure_again(record, Protocol.again(_FURTHER))
        except (EngineError, VerificationError) as error:
            # The trial is finished: what is lost are further occasions.
            self._on_message(f"Trial {record.number} could not be measured further: {error}")
            return record

    def _looks(self, number: int) -> bool:
        """Whether a first sight of a trial's network may decide that it is not built."""
        if self._finalists == 0 or self.latency_filter is None or not self.latency_filter.is_reliable:
            return False
        # What explores teaches the predictor, whatever its accuracy is; only a build tells the size of a file.
        return not explores(number) and self.constraints.size_bytes is None

    def _judge(self, number: int, predicted: Prediction) -> Callable[[ProxyEstimate], bool] | None:
        """Return what decides at first sight whether a trial's network is built; None where it is in any case."""
        if not self._looks(number):
            return None
        return lambda seen: cannot_win(seen, predicted, self.records.values(), self.constraints, self._finalists)

    def _rejected(self, trial: optuna.Trial, record: TrialRecord, *, new: bool) -> bool:
        """Note a network that was not built. Returns `new`."""
        if new:
            record = replace(record, choices=trial.params)
            self.evaluator.run.append(record)
            self.records[trial.number] = record
            self._by_policy[record.policy] = record
            if self.latency_filter is not None:
                self.latency_filter.taken.add(record.policy)
        tell_rejected(self.study, trial, record, self.constraints)
        if new:
            self._on_trial(record)
        return new

    def prediction(self) -> dict[str, Any] | None:
        """Return what prediction did for the search so far, earlier sessions included; None without a predictor.

        Keys: ``networks_known`` (by the predictor), ``screened_out`` (proposals that were not built because they were
        certain to be over the limit), ``rejected`` (trials not built for what was seen of their accuracy), ``fitted``
        (trials moved to the limit) and ``mape`` (mean absolute error, relative to what was measured, of the trials that
        were predicted; None for none).
        """
        if self.latency_filter is None:
            return None
        trials = self.study.get_trials(deepcopy=False)
        errors = [
            abs(record.predicted_ratio / record.measurement.ratio - 1)
            for record in self.records.values()
            if record.predicted_ratio is not None and record.measurement is not None
        ]
        return {
            "networks_known": self.latency_filter.predictor.size,
            "screened_out": sum(trial.user_attrs.get(SCREENED_OUT, 0) for trial in trials),
            "rejected": sum(record.state == "rejected" for record in self.records.values()),
            "fitted": sum(PROPOSED in trial.user_attrs and trial.number in self.records for trial in trials),
            "mape": fmean(errors) if errors else None,
        }

    def _failed(
        self, trial: optuna.Trial, choices: dict[str, Choice], policy: CompressionPolicy, error: Exception,
        predicted: Prediction | None,
    ) -> None:  # fmt: skip
        """Note a failure. The study learns that such a network is worth nothing, so that a sampler turns away."""
        record = TrialRecord(
            number=trial.number, policy=policy, state="failed", error=f"{type(error).__name__}: {error}",
            choices=trial.params,
        )  # fmt: skip
        trial.set_user_attr("error", record.error)
        self.evaluator.run.append(record)
        self.records[trial.number] = record
        refused = isinstance(error, AutoCompressError) and not isinstance(error, TaskError)
        if refused:
            ratio = 1.0 if predicted is None else predicted.ratio
            for name in self.constraints.names:
                trial.set_constraint(name, 1.0)
            trial.set_user_attr(_REFUSED, True)
            trial.set_user_attr(COST_ATTRIBUTE, ratio)
            known = [r.accuracy for r in self.records.values() if r.accuracy is not None]
            worst = min(known, default=0.0)
            self.study.tell(trial, [worst] if len(self.study.directions) == 1 else [worst, ratio])
        else:
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        self._on_trial(record)
        told = self._refusals.refused(choices, record.error or "") if refused else None
        if told is not None:
            self._on_message(told)
