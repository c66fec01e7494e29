"""Fine-tuning of the finalists: a short round for each, then the rest of the time for the one that came out best.

Owns how the time is shared out (successive halving, Jamieson & Talwalkar, 2016, in two rounds; where the whole front is
wanted, by `promotion`), and that a candidate which training did not better is discarded: the record of before stays.
`recovery.finetune` owns the training.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from autocompress.compress.reload import load_compressed
from autocompress.config import QuantizationConfig, RecoveryConfig
from autocompress.errors import in_a_line
from autocompress.evaluation.evaluator import CandidateEvaluator
from autocompress.exploration.finished_trainings import FinishedTrainings
from autocompress.exploration.pareto import Constraints
from autocompress.exploration.promotion import Promotion
from autocompress.exploration.selection import most_accurate
from autocompress.recovery.budget import Budget, epochs_within
from autocompress.recovery.distillation import Teacher
from autocompress.recovery.finetune import finetune
from autocompress.runs.observer import Observer
from autocompress.runs.records import TrialRecord
from autocompress.runs.time_ledger import TimeLedger
from autocompress.tasks.seeding import seed_everything

# Share of the time (or of the epochs) that each finalist gets in the first of two rounds.
_FIRST_ROUND = 0.12
# Building, checking and measuring a fine-tuned candidate, and the minimum worth training for.
_SECONDS_TO_SCORE = 6.0
_SHORTEST = 2.0


@dataclass
class Recovery:
    """Fine-tune finalists of one run.

    Attributes:
        evaluator: Rebuilds and scores candidates.
        config: Rates, epochs, temperature.
        constraints: Decide which finalist goes on.
        observer: Is told of progress.
        on_record: Called with every new record.
        quantization: How ranges of activations are set.
        time_limit: What the user gave the run, as they wrote it: part of what makes a training the same.
        from_checkpoints: Whether a training that was cut off goes on from its last checkpoint, not quite as it would
            have: the optimizer's momentum starts anew.
        lost: What failed, a sentence each.
    """

    evaluator: CandidateEvaluator
    config: RecoveryConfig
    constraints: Constraints
    observer: Observer
    on_record: Callable[[TrialRecord], None] = lambda record: None
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    time_limit: str | None = None
    from_checkpoints: bool = True

    def __post_init__(self) -> None:
        self._finished = FinishedTrainings(self.evaluator.run)
        self.lost: list[str] = []
        self._teacher = Teacher(self.evaluator.task.network(), self.evaluator.compressor.dtype)
        self._failed: set[int] = set()

    def run(self, candidates: Sequence[TrialRecord], deadline: float | None) -> list[TrialRecord]:
        """Fine-tune and return the new records, in the order they finished.

        Args:
            candidates: Proxy records, most promising first; without a limit the front, of which as many as the
                configuration says are taken.
            deadline: `time.monotonic()` by which everything has ended, or None to train `config.whole_epochs`.
        """
        goal = self.constraints.latency is not None or self.constraints.size_bytes is not None
        if not goal or len(candidates) == 1:
            return self._front(candidates, deadline)
        first = [
            r
            for index, c in enumerate(candidates)
            if (r := self._one(c, 1, epochs=_FIRST_ROUND, deadline=deadline, left=1 / _FIRST_ROUND - index))
        ]
        # Where a short training bettered none, a long one may.
        left = first or [candidate for candidate in candidates if candidate.number not in self._failed]
        if not left:
            return []
        last = self._one(self._winner(left), 2, epochs=1.0, deadline=deadline, left=1)
        return [*first, last] if last else first

    def _front(self, candidates: Sequence[TrialRecord], deadline: float | None) -> list[TrialRecord]:
        """Fine-tune as many as were asked for to the end, each time the one that the front gains most from."""
        promotion = Promotion(self.evaluator.baseline, candidates)
        waiting, found = list(candidates), []
        rounds = min(self.config.candidates, len(waiting))
        for index in range(rounds):
            chosen = promotion.next(waiting)
            waiting.remove(chosen)
            made = self._one(chosen, 1, epochs=1.0, deadline=deadline, left=rounds - index)
            if made is not None:
                found.append(made)
                promotion.learn(chosen, made)
        return found

    def _winner(self, records: Sequence[TrialRecord]) -> TrialRecord:
        """Return who trains on: the best, or of those as good as it the one with the most multiply-accumulates left."""
        inside = self.constraints.feasible_at_all_speeds(
            records, self.constraints.machine_speed(self.evaluator.run.history())
        )
        best = most_accurate(inside or records, self.constraints)
        assert best is not None
        ties = [r for r in inside if (r.accuracy or 0.0) >= (best.accuracy or 0.0) - self.constraints.tie]
        return max(ties, key=lambda r: r.macs or 0, default=best)

    def _one(
        self, record: TrialRecord, round_number: int, *, epochs: float, deadline: float | None, left: float
    ) -> TrialRecord | None:
        """Fine-tune one candidate with 1/`left` of the time that is left; None when it failed or time is up.

        A training that an earlier session of the run has finished is not run again.
        """
        ledger, run = TimeLedger(), self.evaluator.run
        key = self._key(record, round_number, epochs)
        if (finished := self._finished.get(key)) is not None:
            return finished.record
        seconds = float("inf")
        if deadline is not None:
            seconds = (deadline - time.monotonic()) / max(1.0, left) - _SECONDS_TO_SCORE
            if seconds < _SHORTEST:
                return None
        self.observer.stage(f"Fine-tuning trial {record.number}" + (" to the end" if round_number == 2 else ""))
        assert record.artifact is not None
        folder, checkpoint = None, run.artifact(record.number) / f"checkpoint-{key[:16]}.safetensors"
        try:
            with ledger.charge("recovery"):
                # What was drawn before decides nothing: a run that was interrupted draws the same.
                seed_everything(int(key[:8], 16))
                folder_before = run.path / record.artifact
                model = load_compressed(self.evaluator.task, folder_before, record, self.quantization)
                report = finetune(
                    model, self._teacher, self.evaluator.task, self.config,
                    Budget(self._epochs(seconds) * epochs, seconds),
                    checkpoint=checkpoint if self.from_checkpoints else None, progress=self.observer.progress,
                    first_epoch=round_number - 1, on_message=self.observer.warn,
                )  # fmt: skip
            if not report.improved:
                self._discard(record, report.before, report.metric, key)
                checkpoint.unlink(missing_ok=True)
                return None
            folder = run.new_recovered(record.number)
            found = self.evaluator.score(
                model, record.policy, record.number, folder, ledger, stage="recovered", earlier=record.measurement
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - whatever the data or the engine raises, what was found is kept
            said = f"Fine-tuning of trial {record.number} failed: {in_a_line(error)}"
            self.observer.warn(said)
            self.lost.append(said)
            self._failed.add(record.number)
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            return None
        finally:
            self.evaluator.ledger.merge(ledger)
        if (found.accuracy or 0.0) <= (record.accuracy or 0.0):
            shutil.rmtree(folder, ignore_errors=True)
            self._discard(record, record.accuracy, found.accuracy, key)
            checkpoint.unlink(missing_ok=True)
            return None
        run.append(found)
        self._finished.add(key, found)
        checkpoint.unlink(missing_ok=True)
        self.on_record(found)
        self.observer.trial(found)
        return found

    def _epochs(self, seconds: float) -> float:
        """Return the epochs of a whole training; where the time ends it, few samples are seen more often."""
        size = self.evaluator.task.train_size()
        return self.config.whole_epochs if math.isinf(seconds) else epochs_within(size, self.config)

    def _key(self, record: TrialRecord, round_number: int, epochs: float) -> str:
        """Return what makes a training the same as one of an earlier session."""
        settings = {
            "trial": record.number, "artifact": record.artifact, "sha256": record.sha256, "round": round_number,
            "epochs": epochs, "time_limit": self.time_limit, "recovery": self.config.model_dump(),
            "quantization": self.quantization.model_dump(),
        }  # fmt: skip
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def _discard(self, record: TrialRecord, before: float | None, after: float | None, key: str) -> None:
        """Say that training bettered nothing; the record of before stays."""
        task = self.evaluator.task
        said = [_written(value, share=task.metric_is_share) for value in (before, after)]
        self.observer.warn(
            f"Fine-tuning of trial {record.number} is discarded: {task.metric_name} {said[1]} is not better than "
            f"{said[0]} before it."
        )
        self._finished.add(key, None)


def _written(value: float | None, *, share: bool) -> str:
    return "unknown" if value is None else f"{value:.2%}" if share else f"{value:.4f}"
