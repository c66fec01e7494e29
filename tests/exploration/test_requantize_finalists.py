"""Finalists with int8 corrected without training: who, and what becomes of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autocompress.compress import CompressionContext, apply_policy, rewrite
from autocompress.compress.quantization import calibrate, quantized_layers
from autocompress.errors import BuildError
from autocompress.exploration.requantize_finalists import Requantization
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.runs.directory import RunDirectory
from autocompress.runs.observer import Observer
from autocompress.runs.records import TrialRecord
from autocompress.runs.time_ledger import TimeLedger
from autocompress.tasks import Task
from autocompress.tasks.validation import metric_of, write_validation
from tests.exploration import tiny
from tests.exploration.conftest import BASELINE, record

INT8 = CompressionPolicy(layers=dict.fromkeys(("0", "3", "8"), LayerPolicy("int8")))


class Told(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.finished: list[int] = []

    def warn(self, text: str) -> None:
        self.said.append(text)

    def trial(self, record: TrialRecord) -> None:
        self.finished.append(record.number)


class Bench:
    """A run of the tiny task with three candidates on disk: int8, int8 that is good enough, and dense."""

    def __init__(self, path: Path, task: Task) -> None:
        self.task, self.observer, self.improved = task, Told(), list[TrialRecord]()
        self.scored: list[nn.Module] = []
        run = RunDirectory(path)
        whole = metric_of(task.model(), task, task.validation(64), torch.float32)
        self.baseline = replace(BASELINE, accuracy=whole)
        self.evaluator: Any = SimpleNamespace(
            task=task, run=run, baseline=self.baseline, ledger=TimeLedger(), calibration=self.calibration,
            data=write_validation(task, path / "validation.npy", 5000, 8), score=self.score,
        )  # fmt: skip
        self.candidates = [
            self.stored(1, 0.4, INT8), self.stored(2, whole, INT8), self.stored(3, 0.4, CompressionPolicy()),
            self.stored(4, 0.5, INT8),
        ]  # fmt: skip

    def calibration(self) -> Iterator[Tensor]:
        return self.task.calibration(64)

    def stored(self, number: int, accuracy: float, policy: CompressionPolicy) -> TrialRecord:
        folder = self.evaluator.run.artifact(number)
        folder.mkdir(parents=True)
        model = apply_policy(rewrite(self.task.model()), policy, CompressionContext(self.task.example_inputs(2)))
        calibrate(model, self.calibration())
        save_file(model.state_dict(), folder / "weights.safetensors")
        artifact = str(folder.relative_to(self.evaluator.run.path))
        return record(number, accuracy, 5, policy=policy, artifact=artifact)

    def score(
        self, model: nn.Module, policy: Any, number: int, folder: Path, ledger: TimeLedger, *, stage: str
    ) -> TrialRecord:
        self.scored.append(model)
        folder.mkdir(parents=True)
        save_file(model.state_dict(), folder / "weights.safetensors")
        accuracy = metric_of(model, self.task, self.task.validation(64), torch.float32)
        return record(
            number, accuracy, 5, stage=stage, policy=policy, artifact=str(folder.relative_to(self.evaluator.run.path))
        )

    def run(self, max_drop: float = 0.05, count: int = 3, deadline: float | None = None) -> list[TrialRecord]:
        made = Requantization(self.evaluator, max_drop, self.observer, self.improved.append)
        return made.run(self.candidates, count, deadline)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, tiny.made("make"))


def test_those_with_int8_that_lose_too_much_are_corrected_the_best_first(bench: Bench) -> None:
    found = bench.run()
    assert [r.number for r in found] == [4, 1] == bench.observer.finished
    assert all(r.stage == "recovered" and (r.accuracy or 0) > (bench.baseline.accuracy or 0) - 0.05 for r in found)
    assert bench.improved == found == bench.evaluator.run.history()
    assert bench.evaluator.ledger.seconds["recovery"] > 0
    folder = bench.evaluator.run.artifact(4, recovered=True)
    said = json.loads((folder / "quantize.json").read_text())
    assert said["taken"] == "bias_correction" == said["rungs"][0]["name"]
    # What was stored is int8 still, and is not what the trial stored.
    assert len(list(quantized_layers(bench.scored[0]))) == 3
    before, after = (load_file(bench.evaluator.run.artifact(4, recovered=r) / "weights.safetensors") for r in (0, 1))
    assert before.keys() == after.keys() and not torch.equal(before["8.bias"], after["8.bias"])


def test_as_many_as_were_asked_for_and_none_after_the_deadline(bench: Bench) -> None:
    assert bench.run(deadline=time.monotonic() - 1) == []
    assert [r.number for r in bench.run(count=1)] == [4]


def test_one_that_is_no_better_leaves_nothing_behind(bench: Bench) -> None:
    score = bench.evaluator.score
    bench.evaluator.score = lambda *given, **options: replace(score(*given, **options), accuracy=0.45)
    assert [r.number for r in bench.run()] == [1] == bench.observer.finished
    assert not bench.evaluator.run.artifact(4, recovered=True).exists() and not bench.observer.said


def test_a_candidate_that_fails_is_named_and_the_others_go_on(bench: Bench) -> None:
    score = bench.evaluator.score

    def refuses(model: nn.Module, policy: Any, number: int, *rest: Any, **options: Any) -> TrialRecord:
        if number == 4:
            raise BuildError("no")
        return score(model, policy, number, *rest, **options)  # type: ignore[no-any-return]

    bench.evaluator.score = refuses
    assert [r.number for r in bench.run()] == [1]
    assert bench.observer.said == ["Correcting trial 4 failed: no"]
