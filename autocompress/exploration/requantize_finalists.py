"""Finalists with int8 that lose too much, corrected without training: where fine-tuning is switched off."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from autocompress.compress.reload import load_compressed
from autocompress.config import QuantizationConfig
from autocompress.errors import in_a_line
from autocompress.evaluation.evaluator import CandidateEvaluator
from autocompress.files import write_json
from autocompress.recovery.ptq_stages import best_stage, run_stages
from autocompress.runs.observer import Observer
from autocompress.runs.records import TrialRecord
from autocompress.runs.time_ledger import TimeLedger
from autocompress.tasks.base import Batch
from autocompress.tasks.reading import first_samples
from autocompress.tasks.validation import metric_of

_BATCH = 256


@dataclass
class Requantization:
    """Climb the ladder of post-training quantization with finalists of one run.

    Attributes:
        evaluator: Rebuilds and scores candidates.
        max_drop: Largest loss of the metric, a fraction.
        observer: Is told of progress.
        on_record: Called with every new record.
        quantization: How ranges of activations are set.
    """

    evaluator: CandidateEvaluator
    max_drop: float
    observer: Observer
    on_record: Callable[[TrialRecord], None] = lambda record: None
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)

    def run(self, candidates: Sequence[TrialRecord], count: int, deadline: float | None) -> list[TrialRecord]:
        """Correct those that have int8 layers and lose too much; return the new records.

        Args:
            candidates: Proxy records.
            count: How many to correct at most, the most accurate first.
            deadline: `time.monotonic()` by which everything has ended, or None.
        """
        floor = (self.evaluator.baseline.accuracy or 0.0) - self.max_drop
        missed = [r for r in candidates if r.policy.int8_layers and (r.accuracy or 0.0) < floor]
        until = float("inf") if deadline is None else deadline
        missed.sort(key=lambda record: -(record.accuracy or 0.0))
        return [
            made
            for record in missed[:count]
            if time.monotonic() < until and (made := self._one(record, floor, until)) is not None
        ]

    def _one(self, record: TrialRecord, floor: float, deadline: float) -> TrialRecord | None:
        """Correct one candidate; None when that failed, or made it no better."""
        evaluator, ledger = self.evaluator, TimeLedger()
        assert record.artifact is not None
        folder = evaluator.run.new_recovered(record.number)
        try:
            with ledger.charge("recovery"):
                model = load_compressed(evaluator.task, evaluator.run.path / record.artifact, record, self.quantization)
                rungs = run_stages(
                    model, first_samples(evaluator.calibration()), self._metric, floor, deadline=deadline,
                    stage=lambda text: self.observer.stage(f"Trial {record.number}: {text}"),
                    progress=self.observer.progress,
                )  # fmt: skip
                rung = best_stage(rungs, floor)
            found = evaluator.score(rung.model, record.policy, record.number, folder, ledger, stage="recovered")
            if (found.accuracy or 0.0) <= (record.accuracy or 0.0):
                shutil.rmtree(folder, ignore_errors=True)
                return None
            said = [{"name": r.name, "metric": r.metric, "seconds": r.seconds, "notes": r.notes} for r in rungs]
            write_json(folder / "quantize.json", {"taken": rung.name, "rungs": said})
        except Exception as error:  # noqa: BLE001 - whatever the data or the engine raises, what was found is kept
            self.observer.warn(f"Correcting trial {record.number} failed: {in_a_line(error)}")
            return None
        finally:
            evaluator.ledger.merge(ledger)
        evaluator.run.append(found)
        self.on_record(found)
        self.observer.trial(found)
        return found

    def _metric(self, model: nn.Module) -> float:
        # In bfloat16 as much would be lost as int8 loses.
        return metric_of(model, self.evaluator.task, self._validation(), torch.float32)

    def _validation(self) -> Iterator[Batch]:
        """Yield what candidates are scored on."""
        data = self.evaluator.data
        stored = np.load(data.inputs, mmap_mode="r", allow_pickle=False)
        for start in range(0, len(stored), _BATCH):
            part = slice(start, start + _BATCH)
            yield torch.from_numpy(stored[part].copy()), data.targets[part]
