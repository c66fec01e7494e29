"""One search from start to finish: baseline, trials, finalists; the best so far is on disk at every moment.

Owns the order of the stages and the time each may take. What is reported and deployed afterwards is `api`'s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from autocompress import environment
from autocompress.compress.importance import DEFAULT_IMPORTANCE
from autocompress.config import RunConfig
from autocompress.engines import engine_class
from autocompress.engines.artifact import read_artifact
from autocompress.errors import ConfigError, EngineError, ExportError, VerificationError, WorkerLostError
from autocompress.evaluation.evaluator import CandidateEvaluator
from autocompress.exploration.choice_path import Choices
from autocompress.exploration.constraints import counting
from autocompress.exploration.explain import Reason, explain
from autocompress.exploration.finetune_finalists import Recovery
from autocompress.exploration.first_candidates import FirstCandidates
from autocompress.exploration.foreknowledge import Foreknowledge, predicted_ratio
from autocompress.exploration.pareto import Constraints, best_record, finalists, is_lossless, write_front
from autocompress.exploration.requantize_finalists import Requantization
from autocompress.exploration.samplers import FORESIGHTED
from autocompress.exploration.study import open_study
from autocompress.exploration.time_plan import TimePlan
from autocompress.exploration.trial_loop import TrialLoop
from autocompress.files import replace_folder
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.fingerprint import device_fingerprint
from autocompress.measurement.protocol import Protocol
from autocompress.prediction.predictor import LatencyPredictor
from autocompress.prediction.profile import open_ahead, open_frozen, open_predictor
from autocompress.prediction.staircase import drop_dominated_choices
from autocompress.recovery.distillation import taught_by
from autocompress.runs.deadline import Deadline, timestamp
from autocompress.runs.directory import RunDirectory
from autocompress.runs.observer import Observer
from autocompress.runs.records import TrialRecord
from autocompress.runs.scratch import sweep_run
from autocompress.runs.summaries import OFFERED_NAME, read_offered
from autocompress.runs.trust import Trust, code_of
from autocompress.space import rank_choices
from autocompress.space.search_space import SearchSpace, bind, configured_space
from autocompress.tasks import Task
from autocompress.tasks.seeding import seed_everything

# Of trials and of their time, for networks like the best that use the room it leaves below the latency limit.
_LAST_SHARE = 0.12
# Trials that are run although nothing more can be won: a front is there to be looked at.
_LEAST_TRIALS = 8
# How often a choice is made anew because what was chosen turned out to be slower than its trial had measured.
_CONFIRMATIONS = 4
# Seconds that the end may take beyond --timeout before it is given up, at least.
_OVERTIME_S = 10.0
# Seconds between two occasions of the best network, at least: of two seconds each they take 3 % of the time.
_APART_S = 60.0
# Half-width of the interval of a file against its copy from which the machine is called busy.
_BUSY_PERCENT = 8.0
# How often networks go on to a limit that none is inside, and for which share of the time that is left each.
_REACHES, _REACH_SHARE = 2, 0.3


@dataclass
class SearchSession:
    """The state of one search.

    Attributes:
        task: Model, data and metric.
        config: What to search for.
        run: Where everything goes.
        worker: Builds, runs and measures engines.
        observer: Is told of progress.
        started: `time.monotonic()` when the user's clock began.
        predictor: Of the latency; None opens one with what a table of this device knows. It learns from the trials.
    """

    task: Task
    config: RunConfig
    run: RunDirectory
    worker: EngineWorker
    observer: Observer
    started: float
    predictor: LatencyPredictor | None = None
    plan: TimePlan | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        seed_everything(self.config.seed)
        sweep_run(self.run.path)
        space = configured_space(self.config)
        if self.task.tokens is not None:
            self.task.tokens.write(self.run.path)
        self.observer.stage("Reading the model")
        self.evaluator = CandidateEvaluator(self.task, self.config, self.run, self.worker, space.importance)
        for group, note in self.evaluator.scores.notes.items():
            self.observer.warn(f"Importance {space.importance!r} of group {group!r}: {note}.")
        if self.config.recovery.enabled:
            taught_by(self.task.network(), self.evaluator.base, self.task, self.config.recovery)
        self._space_file = space
        self.reasons: list[Reason] = []
        # What failed and is missing from the result, a sentence each; and what ended the search before its time.
        self.lost: list[str] = []
        self.failure: Exception | None = None
        self.interrupted: KeyboardInterrupt | None = None
        # Trials that the standard protocol measured.
        self._confirmed: set[int] = set()

    @property
    def deadline(self) -> float | None:
        """`time.monotonic()` at which search and recovery must have ended, or None."""
        if self.plan is not None and self.config.timeout_seconds is not None:
            return self.plan.deadline
        seconds = self.config.working_seconds
        return None if seconds is None else self.started + seconds

    @property
    def verified_by(self) -> Deadline:
        """When test data and verification must have ended.

        They have what was kept back for them even after a search that overran, and once more of it, as nobody
        wants to lose a night's result for some seconds.
        """
        if self.config.timeout_seconds is None:
            return Deadline()
        reserve = max(_OVERTIME_S, self.plan.reserve if self.plan is not None else 0.0)
        return max(Deadline.after(self.config.timeout_seconds, self.started), Deadline.after(0)).keeping(-reserve)

    def execute(self) -> TrialRecord:
        """Run every stage; return the best record, the baseline's where nothing is better."""
        self.run.write(
            "env.json",
            {**environment.describe(), "device": device_fingerprint(gpu=engine_class(self.config.engine).uses_gpu)},
        )
        if self.evaluator.device_absent or self.config.deterministic:
            self._steer_by_table()
        baseline = self._baseline()
        self.observer.baseline(baseline)
        self._say_of_baseline(baseline)
        self.constraints = Constraints.of(self.config, baseline)
        self.plan = self._plan(baseline)
        self.worker.limits.deadline = Deadline(math.inf if self.deadline is None else self.deadline)
        self.observer.warn(self.plan.describe())
        with self.evaluator.ledger.charge("profile"):
            # Found once, by running the uncompressed model.
            _ = self.task.divergence_name
        steered, data = self.task.divergence_name, self.evaluator.data.describe()
        self.observer.warn(f"Steered by {steered}; {data}")
        if self.predictor is None:
            self.predictor = self._open_predictor(baseline.policy.dense_dtype)
        space = self._space(baseline)
        self._found = Foreknowledge(self.task, self.evaluator, self.config, self.plan, self.observer)
        knowledge = self._found.gather(space, baseline, self.predictor, self.constraints)
        study = open_study(self.run, self.config, self._identity(space), knowledge, self.observer.warn)
        # Only now: a resumed run keeps its run file until the settings are known to fit.
        self.run.write_config(self.config)
        self.loop = TrialLoop(
            self.evaluator, space, study, self.constraints, self._finished,
            predictor=self.predictor, seed=self.config.seed, finalists=self.config.recovery.candidates,
            ahead=self.config.sampler in FORESIGHTED, cost=self._found.knowns.cost, on_message=self.observer.warn,
        )  # fmt: skip
        self._best = self._resumed_best(baseline)
        begun, until = time.monotonic(), self.plan.candidates_until()
        if self.config.first_candidates:
            self._try_first(space, until)
        order = self._found.block_order(space) if self._space_file.blocks.remove else []
        # The knapsack sampler's own first proposals know more than these.
        self.loop.enqueue_seeds(order, queue=knowledge is None)
        self.observer.stage("Searching")

        def progress(done: int, total: int) -> None:
            elapsed = (time.monotonic() - begun) / (until - begun) if until != float("inf") else 0.0
            self.observer.progress(max(done / total, elapsed), f"{done} trials")

        self._search(space, begun, until, progress)
        self._improve_finalists(baseline)
        write_front(self.run)
        self.reasons = self._explain(space, baseline)
        return self._best if self._best is not None else baseline

    def _improve_finalists(self, baseline: TrialRecord) -> None:
        """Fine-tune the best candidates, or correct their ranges where training is switched off."""
        recovery = self.config.recovery
        if recovery.enabled and not self._settled():

            def choose() -> list[TrialRecord]:
                records = list(self.loop.records.values())
                machine_speed = self.constraints.machine_speed(self.run.history())
                return finalists(records, self.constraints, baseline, recovery.candidates, machine_speed)

            chosen = self._confirm(choose)
            tuning = Recovery(
                self.evaluator, recovery, self.constraints, self.observer, self._improve, self.config.quantization,
                self.config.timeout, from_checkpoints=not self.config.deterministic,
            )  # fmt: skip
            tuning.run(chosen, self.deadline)
            self.lost += tuning.lost
        elif not recovery.enabled and self.constraints.max_drop is not None and not self._settled():
            mending = Requantization(
                self.evaluator, self.constraints.max_drop, self.observer, self._improve, self.config.quantization
            )
            records = list(self.loop.records.values())
            machine_speed = self.constraints.machine_speed(self.run.history())
            chosen = finalists(records, self.constraints, baseline, recovery.candidates, machine_speed)
            mending.run(chosen, recovery.candidates, self.deadline)

    def best_so_far(self) -> TrialRecord | None:
        """Return the best record of a search that an error ended, with front and ``best/`` on disk.

        None where not even the baseline was measured.
        """
        try:
            baseline = self.evaluator.baseline
        except ConfigError:
            return None
        self.constraints = Constraints.of(self.config, baseline)
        best = self._resumed_best(baseline)
        write_front(self.run)
        return best

    def prediction(self) -> dict[str, Any] | None:
        """Return what prediction did: see `TrialLoop.prediction`; None also where the search ended before trials."""
        loop: TrialLoop | None = getattr(self, "loop", None)
        return None if loop is None else loop.prediction()

    def _search(self, space: SearchSpace, begun: float, until: float, progress: Callable[[int, int], None]) -> None:
        """Run the trials; the last ones use the room that the best, measured once more, leaves below its limit.

        Fine-tuning cannot make a network faster: where none is inside the limit, part of its time goes to reaching it.
        """

        def confirm() -> None:
            self.observer.stage("Measuring the best again")
            self._confirm(lambda: [self._best] if self._best is not None else [])

        trials = self.config.n_trials

        def settled() -> bool:
            enough = len(self.loop.records) >= _LEAST_TRIALS
            return self.config.stop_early and enough and self._settled()

        if self.constraints.latency is not None:
            first = trials - round(_LAST_SHARE * trials)
            self.loop.run(first, begun + (1 - _LAST_SHARE) * (until - begun), progress, done_when=settled)
            confirm()
            if not self.config.stop_early and self.deadline is not None and self._settled():
                # Nothing is left to fine-tune: its time is the trials'.
                until = self.deadline
                self.loop.run(first, begun + (1 - _LAST_SHARE) * (until - begun), progress)
                confirm()
            if len(self.loop.records) < trials and time.monotonic() < until and not settled():
                self.observer.stage("Searching near the best")
            self.loop.finish()
        self.loop.run(trials, until, progress, done_when=settled)
        confirm()
        for _ in range(_REACHES):
            now = time.monotonic()
            rest = math.inf if self.deadline is None else self.deadline - now
            if not self._reach(space, now + _REACH_SHARE * rest):
                break
            confirm()

    def _steer_by_table(self) -> None:
        """Take latencies from a table: of a device that is not here, or of this one, which never answers the same."""
        evaluator = self.evaluator
        opened = open_ahead if evaluator.device_absent else open_frozen
        with evaluator.ledger.charge("profile"):
            forecast = opened(evaluator.graphs, self.config, evaluator.engine_version)
        evaluator.forecast, self.predictor = forecast, forecast.predictor
        self.observer.warn(
            f"{evaluator.engine} for {evaluator.device}: engines are built, not run. Latency is PREDICTED from "
            f"{self.config.table}, accuracy is that of the same graphs in ONNX Runtime."
            if evaluator.device_absent
            else "Deterministic: latency is PREDICTED from the latency table, nothing is measured. 'autocompress "
            f"measure {self.run.path}' measures what was found."
        )

    def _open_predictor(self, dense_dtype: str) -> LatencyPredictor | None:
        """Return a predictor with what a table knows; None where none is wanted, or the structure cannot be read."""
        evaluator = self.evaluator
        try:
            with evaluator.ledger.charge("profile"):
                return open_predictor(
                    evaluator.graphs, self.config, evaluator.engine_version, dense_dtype, self.observer
                )
        except ExportError as error:
            self.observer.warn(f"Latency is not predicted, every candidate is built: {error}")
            return None

    def _space(self, baseline: TrialRecord) -> SearchSpace:
        """Return the space, narrowed to what a latency table says can pay; on resuming, as it was narrowed at first."""
        evaluator = self.evaluator
        space = bind(
            self._space_file, evaluator.base, evaluator.inventory, baseline.policy.dense_dtype, evaluator.capabilities
        )
        self._say_skipped(space)
        if self.run.study_file.exists():
            offered = read_offered(self.run)
            return space if offered is None else space.narrowed(offered)
        # What does not pay on another device may well do so here.
        if self.predictor is None or self.config.allow_foreign_table:
            return space
        with self.evaluator.ledger.charge("profile"):
            allowed_choices = drop_dominated_choices(self.predictor, space)
        if not allowed_choices:
            return space
        before, after = (sum(map(len, s.every.values())) for s in (space, space.narrowed(allowed_choices)))
        self.observer.stage(f"The latency table says that {before - after} of {before} choices save nothing: left out")
        self.run.write(OFFERED_NAME, allowed_choices)
        return space.narrowed(allowed_choices)

    def _say_skipped(self, space: SearchSpace) -> None:
        """Name the layers that a factorization was asked for and does not fit, the usual one excepted."""
        for method in self._space_file.rank.methods:
            names = {n: why for n, why in space.skipped.items() if n.endswith(f" ({method})")}
            if names and method != rank_choices.DEFAULT:
                layers = ", ".join(name.removeprefix("rank/").partition(" ")[0] for name in names)
                self.observer.warn(
                    f"{method} is not offered for {layers}: {'; or '.join(sorted(set(names.values())))}."
                )

    def _plan(self, baseline: TrialRecord) -> TimePlan:
        config, evaluator = self.config, self.evaluator
        recovery = config.recovery
        return TimePlan.of(
            self.started, config.timeout_seconds, baseline.seconds, dtypes=evaluator.dtypes,
            compress=evaluator.compress_seconds, test_share=evaluator.test_share(),
            recovery_share=recovery.share if recovery.enabled else 0.0, occasions=config.occasions,
        )  # fmt: skip

    def _try_first(self, space: SearchSpace, until: float) -> None:
        """Run the trials that come before the sampler's."""
        self.observer.stage("Trying what a good engineer tries first")
        self._first_candidates(space, until).run()

    def _first_candidates(self, space: SearchSpace, until: float) -> FirstCandidates:
        trials = self.config.n_trials

        def attempt(choices: Choices) -> TrialRecord | None:
            return self.loop.attempt(choices, until) if len(self.loop.records) < trials else None

        return FirstCandidates(attempt, space, self.constraints, self._found.knowns, self.observer.warn)

    def _reach(self, space: SearchSpace, until: float) -> bool:
        """Where no network is inside the limit, go on from the closest one; return whether anything was tried."""
        limits, records = self.constraints, counting(self.loop.records.values())
        if limits.latency is None or not self.config.first_candidates or any(map(limits.within_budget, records)):
            return False
        known = [(limits.cost(r), r.number, c) for r in records if (c := self.loop.choices_of(r.number)) is not None]
        if not known:
            return False
        cost, _, choices = min(known, key=lambda entry: entry[:2])
        before = len(self.loop.records)
        self.observer.stage("Going on to the limit")
        self._first_candidates(space, until).reach(dict(choices), cost)
        return len(self.loop.records) > before

    def _explain(self, space: SearchSpace, baseline: TrialRecord) -> list[Reason]:
        """Return why the result is what it is, as far as predictions and sensitivities tell."""
        best = self._best
        choices = None if best is None or best.stage == "baseline" else self.loop.choices_of(best.number)
        if choices is None:
            return []
        predictor, latency = self.predictor, None
        if predictor is not None and predictor.ready and baseline.latency_ms is not None:
            ratio, whole = predicted_ratio(predictor), baseline.latency_ms
            latency = lambda policy: ratio(policy) * whole  # noqa: E731 - typed by what takes it
        with self.evaluator.ledger.charge("profile"):
            try:
                layout = self.evaluator.graphs.layout
            except ExportError:
                layout = None
            return explain(choices, space, latency, self._found.losses, layout)

    def _say_of_baseline(self, baseline: TrialRecord) -> None:
        """Say how far the uncompressed network differs from its own copy, and what of it cannot be compressed."""
        if (left_alone := self.evaluator.left_alone()) is not None:
            self.observer.warn(left_alone)
        measured = baseline.measurement
        if measured is None or not measured.occasions:
            return
        half = 100 * (measured.aa_high - measured.aa_low) / 2
        busy = "This machine is busy: the" if half > _BUSY_PERCENT else "The"
        self.observer.warn(
            f"{busy} uncompressed network against a copy of itself: {measured.aa_ratio:.3f}x, ±{half:.0f} % "
            f"({len(measured.occasions)} occasions)."
        )

    def _settled(self) -> bool:
        """Whether the best so far meets the bounds of latency and size and loses nothing: nothing more can be won."""
        limits, best, baseline = self.constraints, self._best, self.evaluator.baseline
        if not limits.bounded or best is None or best.stage == "baseline":
            return False
        return limits.within_budget(best) and is_lossless(best, baseline)

    def _confirm(self, choose: Callable[[], list[TrialRecord]]) -> list[TrialRecord]:
        """Return what is chosen when all of it has been measured by the standard protocol.

        A trial's measuring is short, and what comes out best of many is so partly by luck. What turns out to be over
        the limit gives way to the next.
        """
        measured = self.constraints.latency is not None and self.evaluator.forecast is None
        for _ in range(_CONFIRMATIONS if measured else 0):
            fresh = [r for r in choose() if r.stage == "proxy" and r.number not in self._confirmed]
            if not fresh:
                break
            for record in fresh:
                if self.deadline is not None and time.monotonic() > self.deadline:
                    return choose()
                self._confirmed.add(record.number)
                again = self._measured_again(record)
                if again is None:
                    continue
                self.run.append(again)
                self.loop.replace(again)
                if self._best is record:
                    # What its trial measured counts no more.
                    self._best = None
                self._improve(again)
        return choose()

    def _baseline(self) -> TrialRecord:
        self.observer.stage("Measuring the baseline")
        stored = self.run.baseline / "record.json"
        if stored.exists():
            record = TrialRecord.read(stored)
            file = read_artifact(self.run.baseline, Trust(code=frozenset(code_of(self.config))))
            self.evaluator.reopen_baseline(record, file)
            return record
        try:
            return self.evaluator.open_baseline(self.observer.warn)
        except EngineError as error:
            told = f"The uncompressed model cannot be measured on {self.config.engine}: {error}"
            if isinstance(error, WorkerLostError):
                told += (
                    f" `autocompress doctor` tests {self.config.engine} by itself; try another --engine, fewer "
                    "--threads, a smaller --batch-size, or another --set dense_dtype."
                )
            raise type(error)(told) from error

    def _identity(self, space: SearchSpace) -> dict[str, Any]:
        config = self.config
        return {
            **{f"task.{k}": v for k, v in self.task.fingerprint().items()},
            "engine": f"{config.engine} {self.evaluator.engine_version}",
            "threads": config.threads,
            "batch_size": config.batch_size,
            "space": space.hash,
            "seed": config.seed,
            # Omit defaults, so that older runs resume.
            **({} if space.file.importance == DEFAULT_IMPORTANCE else {"importance": space.file.importance}),
            **{f"quantization.{k}": v for k, v in config.quantization.model_dump(exclude_defaults=True).items()},
        }

    def _finished(self, record: TrialRecord) -> None:
        if record.state == "complete":
            self._improve(record)
        self._another_occasion()
        write_front(self.run)
        # Candidates' weights and graphs come and go among what stays: without this the process grows by the holes.
        environment.release_memory()
        self.observer.trial(record)

    def _another_occasion(self) -> None:
        """Measure the best once more where that was long ago: its occasions are to be spread over the whole run."""
        best = self._best
        if best is None or best.stage == "baseline" or best.measurement is None or self.evaluator.forecast is not None:
            return
        occasions = best.measurement.occasions
        if not occasions or timestamp() - occasions[-1].at < _APART_S:
            return
        again = self._measured_again(best, Protocol.again(1))
        if again is None:
            return
        self.run.append(again)
        if again.stage == "proxy":
            self.loop.replace(again)
        self._best = None
        self._improve(again)

    def _measured_again(self, record: TrialRecord, protocol: Protocol | None = None) -> TrialRecord | None:
        """Return a record with further occasions; None where its engine is lost now, which costs only those."""
        try:
            return self.evaluator.measure_again(record, protocol) if protocol else self.evaluator.measure_again(record)
        except (EngineError, VerificationError) as error:
            self.observer.warn(f"Trial {record.number} could not be measured again; its trial's figures stand: {error}")
            return None

    def _resumed_best(self, baseline: TrialRecord) -> TrialRecord | None:
        """Return the best record of an earlier session, and make sure that ``best/`` holds it.

        It may not: the process died between recording a trial and copying it, or the limits have changed since.
        """
        stored = self.run.best / "record.json"
        held = TrialRecord.read(stored) if stored.exists() else None
        known = [r for r in self.run.records().values() if r.artifact is not None]
        best = best_record([*([held] if held else []), *known], self.constraints, baseline)
        if best is not held and best.artifact is not None:
            replace_folder(self.run.path / best.artifact, self.run.best)
        return best

    def _improve(self, record: TrialRecord) -> None:
        """Put what is best, now that this record is known, in ``best/``."""
        assert record.artifact is not None
        held = [] if self._best is None or self._best.stage == "baseline" else [self._best]
        contenders = [record, *held] if held and held[0].number == record.number else [*held, record]
        # All of them: what is as good as the most accurate depends on which one that is.
        numbers = {r.number for r in contenders}
        contenders += [r for r in self.run.records().values() if r.artifact is not None and r.number not in numbers]
        best = best_record(contenders, self.constraints, self.evaluator.baseline)
        if best is not self._best and best.artifact is not None:
            self._best = best
            replace_folder(self.run.path / best.artifact, self.run.best)
