from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from autocompress.config import RecoveryConfig, RunConfig
from autocompress.errors import BuildError, CompressionError, ConfigError
from autocompress.exploration import finetune_finalists
from autocompress.exploration.latency_limit.machine_speed import MachineSpeed
from autocompress.exploration.pareto import Constraints
from autocompress.recovery.finetune import FinetuneReport
from autocompress.runs.directory import RunDirectory
from autocompress.runs.observer import Observer
from autocompress.runs.records import Measurement, TrialRecord
from autocompress.runs.time_ledger import TimeLedger
from tests.exploration.conftest import BASELINE, make_measurement, record


class FakeEvaluator:
    """Scores fine-tuned candidates with figures a test gives: accuracy by trial number and round."""

    metric_name, metric_is_share = "accuracy", True

    def __init__(self, path: Path, accuracies: dict[int, list[float]]) -> None:
        self.run, self.task, self.baseline, self.ledger = RunDirectory(path), self, BASELINE, TimeLedger()
        self.accuracies = {number: list(found) for number, found in accuracies.items()}

    @property
    def compressor(self) -> SimpleNamespace:
        return SimpleNamespace(dtype=torch.float32)

    def network(self) -> nn.Module:
        return nn.Linear(1, 1)

    def train_size(self) -> int:
        return 250

    def score(
        self, model: Any, policy: Any, number: int, folder: Path, ledger: TimeLedger, *, stage: str,
        earlier: Measurement | None,
    ) -> TrialRecord:  # fmt: skip
        # The network has the shapes of its proxy, whose occasions count as well.
        assert earlier is not None
        if not self.accuracies[number]:
            raise BuildError("no")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scored").write_text(str(self.accuracies[number][0]))
        # What says that a folder is whole.
        (folder / "record.json").write_text("{}")
        artifact = str(folder.relative_to(self.run.path))
        return record(number, self.accuracies[number].pop(0), 5, stage=stage, policy=policy, artifact=artifact)


class Warned(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


class Bench:
    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = tmp_path
        self.budgets: list[finetune_finalists.Budget] = []
        self.reports: list[FinetuneReport] = []
        self.observer = Warned()
        self.improved: list[tuple[int, float | None]] = []
        monkeypatch.setattr(
            finetune_finalists, "load_compressed", lambda task, folder, record, quantization: nn.Linear(1, 1)
        )
        monkeypatch.setattr(finetune_finalists, "finetune", self._finetune)

    def _finetune(self, model: Any, teacher: Any, task: Any, config: Any, budget: Any, **_: Any) -> FinetuneReport:
        self.budgets.append(budget)
        return self.reports.pop(0) if self.reports else FinetuneReport(1.0, 1.0, 0.1, before=0.5, metric=0.6)

    def run(
        self, accuracies: dict[int, list[float]], deadline: float | None = None, *, epochs: float | None = 10,
        resumable: bool = False, **limits: str,
    ) -> list[TrialRecord]:  # fmt: skip
        evaluator: Any = FakeEvaluator(self.path, accuracies)
        constraints = Constraints.of(RunConfig.model_validate(limits), BASELINE)
        found = finetune_finalists.Recovery(
            evaluator, RecoveryConfig(epochs=epochs), constraints, self.observer,
            lambda r: self.improved.append((r.number, r.accuracy)),
        ).run([record(number, 0.5, 5) for number in accuracies], deadline)  # fmt: skip
        assert resumable or evaluator.run.history() == found
        return found


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_the_winner_of_a_short_round_gets_the_long_one(bench: Bench) -> None:
    found = bench.run({1: [0.7], 2: [0.9, 0.94], 3: [0.8]}, target_latency="0.5x")
    assert [(r.number, r.accuracy) for r in found] == [(1, 0.7), (2, 0.9), (3, 0.8), (2, 0.94)]
    assert [b.epochs for b in bench.budgets] == pytest.approx([1.2, 1.2, 1.2, 10])


def test_no_round_overwrites_the_files_of_another(bench: Bench) -> None:
    found = bench.run({1: [0.9, 0.95], 2: [0.6]}, target_latency="0.5x")
    assert bench.improved == [(1, 0.9), (2, 0.6), (1, 0.95)]
    folder = "artifacts/trial-00001/recovered"
    assert [r.artifact for r in found if r.number == 1] == [folder, f"{folder}-2"]
    assert [(bench.path / name / "scored").read_text() for name in (folder, f"{folder}-2")] == ["0.9", "0.95"]


def test_a_resumed_run_runs_no_training_again_that_has_finished(bench: Bench) -> None:
    found = bench.run({1: [0.9, 0.95], 2: [0.5]}, target_latency="0.5x", resumable=True)
    before, bench.budgets[:] = len(bench.budgets), []
    # The evaluator would score everything worse now.
    again = bench.run({1: [0.1, 0.1], 2: [0.1]}, target_latency="0.5x", resumable=True)
    assert before == 3 and bench.budgets == []
    assert [(r.artifact, r.accuracy) for r in again] == [(r.artifact, r.accuracy) for r in found]
    # Longer trainings are others: they are run, in folders of their own.
    longer = bench.run({1: [0.97, 0.96], 2: [0.1]}, target_latency="0.5x", epochs=20, resumable=True)
    assert [(r.artifact, r.accuracy) for r in longer] == [("artifacts/trial-00001/recovered-3", 0.97)]
    assert RunDirectory(bench.path).records()[1].accuracy == 0.97


def test_a_training_whose_files_are_gone_is_run_again(bench: Bench) -> None:
    bench.run({1: [0.9]}, target_latency="0.5x", resumable=True)
    shutil.rmtree(bench.path / "artifacts")
    assert [r.accuracy for r in bench.run({1: [0.8]}, target_latency="0.5x", resumable=True)] == [0.8]


def test_what_is_not_better_than_before_is_discarded_with_a_line(bench: Bench) -> None:
    found = bench.run({1: [0.9, 0.8], 2: [0.5], 3: [0.4]}, target_latency="0.5x")
    assert [(r.number, r.accuracy) for r in found] == [(1, 0.9)]
    assert bench.improved == [(1, 0.9)]
    assert bench.observer.said == [
        "Fine-tuning of trial 2 is discarded: accuracy 50.00% is not better than 50.00% before it.",
        "Fine-tuning of trial 3 is discarded: accuracy 40.00% is not better than 50.00% before it.",
        "Fine-tuning of trial 1 is discarded: accuracy 80.00% is not better than 90.00% before it.",
    ]
    # The files are those of the record that stays.
    artifacts = bench.path / "artifacts"
    assert {str(f.relative_to(artifacts)): f.read_text() for f in artifacts.rglob("*") if f.is_file()} == {
        "trial-00001/recovered/scored": "0.9",
        "trial-00001/recovered/record.json": "{}",
    }


def test_what_training_did_not_better_is_not_even_built_and_a_long_one_may(bench: Bench) -> None:
    same = FinetuneReport(1.0, 1.0, 0.1, before=0.6, metric=0.6)
    bench.reports = [same, same]
    found = bench.run({1: [0.9], 2: []}, target_latency="0.5x")
    assert [(r.number, r.accuracy) for r in found] == [(1, 0.9)]
    assert [b.epochs for b in bench.budgets] == pytest.approx([1.2, 1.2, 10])
    assert bench.observer.said == [
        f"Fine-tuning of trial {number} is discarded: accuracy 60.00% is not better than 60.00% before it."
        for number in (1, 2)
    ]


def test_who_trains_on_stays_inside_the_limit_at_every_pace_of_the_machine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The better one was measured beside a slow baseline, and is over the limit beside a fast one.
    machine_speed = MachineSpeed(11.0, (9.6, 11.5), -1.0)
    monkeypatch.setattr(MachineSpeed, "of", lambda records, baseline_ms: machine_speed)
    taken = iter([(5.3, 11.5), (5.0, 9.6), (5.0, 9.6)])
    whole = FakeEvaluator.score

    def score(self: FakeEvaluator, *given: Any, **named: Any) -> TrialRecord:
        return replace(whole(self, *given, **named), measurement=make_measurement(*next(taken)))

    monkeypatch.setattr(FakeEvaluator, "score", score)
    found = bench.run({1: [0.9], 2: [0.8, 0.85]}, target_latency="0.53x")
    assert [(r.number, r.accuracy) for r in found] == [(1, 0.9), (2, 0.8), (2, 0.85)]


def test_one_candidate_gets_everything(bench: Bench) -> None:
    assert len(bench.run({1: [0.9]}, target_latency="0.5x")) == 1
    assert bench.budgets[0].epochs == 10 and bench.budgets[0].seconds == float("inf")


@pytest.mark.parametrize(
    # 250 samples in batches of 31 are 8 steps: 24 epochs would be over in seconds.
    ("given", "seconds", "trained"), [(None, 100.0, 5000), (None, None, 24), (3.0, 100.0, 3)]
)  # fmt: skip
def test_few_samples_are_seen_more_often_where_the_time_ends_a_training(
    given: float | None, seconds: float | None, trained: float, bench: Bench
) -> None:
    deadline = None if seconds is None else time.monotonic() + seconds
    bench.run({1: [0.9]}, deadline=deadline, epochs=given, target_latency="0.5x")
    assert [b.epochs for b in bench.budgets] == [trained]


def test_without_a_budget_all_are_trained_to_the_end_and_share_the_time(bench: Bench) -> None:
    assert len(bench.run({1: [0.9], 2: [0.8]}, deadline=time.monotonic() + 100)) == 2
    assert [b.epochs for b in bench.budgets] == [10, 10]
    # Nothing was spent by the first, so the last has all that is left.
    assert [b.seconds for b in bench.budgets] == pytest.approx([50 - 6, 100 - 6], abs=1)


def test_without_a_budget_the_front_decides_who_is_trained_and_in_which_order(bench: Bench) -> None:
    # All are as fast and begin at half of their accuracy; three of five are asked for.
    found = bench.run({n: [0.9] for n in range(1, 6)})
    assert len(found) == 3 == len(bench.budgets)


def test_what_the_deadline_leaves_no_time_for_is_not_begun(bench: Bench) -> None:
    assert bench.run({1: [0.9], 2: [0.8]}, deadline=time.monotonic() + 1, target_latency="0.5x") == []
    assert bench.budgets == []
    assert bench.run({}, target_latency="0.5x") == []


def test_a_candidate_that_fails_is_named_and_the_others_go_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench.run({1: [], 2: [0.8, 0.9]}, target_latency="0.5x")
    assert [r.number for r in found] == [2, 2]
    assert bench.observer.said == ["Fine-tuning of trial 1 failed: no"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CompressionError("diverged"), "diverged"),
        (ConfigError("sample 812 cannot be read"), "sample 812 cannot be read"),
        (KeyError("label"), "KeyError: 'label'"),
    ],
)
def test_what_ends_a_training_costs_one_candidate(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def ends(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(finetune_finalists, "finetune", ends)
    assert bench.run({1: [0.9], 2: [0.8]}, target_latency="0.5x") == []
    assert bench.observer.said == [f"Fine-tuning of trial {number} failed: {said}" for number in (1, 2)]
