"""The Python face, on a finished run and on new ones, with real engines on a tiny model."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import autocompress
from autocompress import api
from autocompress.api import settings
from autocompress.deploy import summary
from autocompress.errors import ConfigError, StudyMismatchError, VerificationError
from autocompress.evaluation import evaluator
from autocompress.measurement.protocol import Protocol
from autocompress.policy import CompressionPolicy
from autocompress.runs.observer import Observer
from autocompress.runs.records import TrialRecord
from autocompress.tasks import Task
from tests.exploration import tiny

OPTIONS: dict[str, Any] = {
    "target_latency": "0.01x",
    "n_trials": 2,
    "sampler": "random",
    "space": "prune-only",
    "dense_dtype": "fp32",
    "recovery": {"enabled": False},
}


@pytest.fixture(scope="module")
def task() -> Iterator[Task]:
    """The tiny task, as a user's object."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("standard", "trial"):
            patch.setattr(Protocol, name, Protocol.__dict__[name])
        names: dict[str, Any] = {}
        exec(tiny.TASK, names)
        yield names["make"]()


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory, task: Task) -> autocompress.Run:
    """The finished run. Read only."""
    return autocompress.open_run(tiny.finished(tmp_path_factory.mktemp)[0], task)


# -- a finished run ---------------------------------------------------------------------------------------------------


def test_the_front_is_a_data_frame_of_policies(run: autocompress.Run) -> None:
    front = run.front
    assert list(front.columns) == [
        "trial", "stage", "accuracy", "latency_ms", "latency_ratio", "size_bytes", "macs", "params", "policy",
    ]  # fmt: skip
    assert len(front) >= 1 and front["latency_ms"].is_monotonic_increasing and front["accuracy"].is_monotonic_increasing
    assert all(isinstance(policy, CompressionPolicy) for policy in front["policy"])


def test_the_best_is_what_the_summary_says(run: autocompress.Run) -> None:
    assert run.best.number == run.summary["best"]["trial"] and run.best.stage == run.summary["best"]["stage"]
    assert [r.number for r in run.records] == [0, 1, 2]
    assert repr(run) == f"Run({str(run.path)!r})"


def test_the_study_is_optunas_own(run: autocompress.Run) -> None:
    finished = [t for t in run.study.trials if t.state.name == "COMPLETE"]
    assert [t.number for t in finished] == [0, 1, 2]
    # As their trials measured them; what was measured again later is the study's no more.
    proxies = {r.number: r for r in reversed(run.directory.history()) if r.stage == "proxy"}
    assert [t.values for t in finished] == [
        [r.accuracy, r.measurement.ratio] for _, r in sorted(proxies.items()) if r.measurement
    ]


@pytest.mark.parametrize("trial", [None, 1])
def test_the_model_loads_and_trains(run: autocompress.Run, task: Task, trial: int | None) -> None:
    model = run.load_model(trial)
    assert not model.training
    inputs, targets = next(task.train_batches(32, 0))
    before = task.loss(model(inputs), targets)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model.train()
    task.loss(model(inputs), targets).backward()
    optimizer.step()
    model.eval()
    after = task.loss(model(inputs), targets)
    assert torch.isfinite(after) and after != before


def test_a_trial_that_is_not_there_is_refused(run: autocompress.Run) -> None:
    with pytest.raises(ConfigError, match=r"no model of trial 77\. Finished trials: 0, 1, 2"):
        run.load_model(77)


def test_deploy_packages_the_best(run: autocompress.Run, tmp_path: Path) -> None:
    try:
        manifest = run.deploy(tmp_path / "shipped")
    except VerificationError as error:  # a network this small is no faster, and may be seen to be slower
        pytest.skip(str(error))
    assert manifest.trial == run.best.number and (tmp_path / "shipped" / manifest.file).is_file()
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        run.deploy(tmp_path / "shipped")


def test_the_report_is_written_anew(run: autocompress.Run) -> None:
    assert run.report() == run.path / "report.html"


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        autocompress.open_run(tmp_path)


# -- new runs ---------------------------------------------------------------------------------------------------------


class Listener(Observer):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def opened(self, run: Path) -> None:
        self.heard.append("opened")

    def baseline(self, record: TrialRecord) -> None:
        self.heard.append("baseline")

    def trial(self, record: TrialRecord) -> None:
        self.heard.append(f"trial {record.number}")


def test_a_disk_that_fills_up_loses_nothing_and_the_run_resumes(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    sync, listener = os.fsync, Listener()

    class Fills(Listener):
        def trial(self, record: TrialRecord) -> None:
            super().trial(record)

            def full(handle: int) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(ConfigError, match=r"Cannot write .*No space left on device.*--resume"):
        api.search(task, out=out, observer=Fills(), **OPTIONS)
    monkeypatch.setattr(os, "fsync", sync)
    kept = autocompress.open_run(out).records
    assert [r.number for r in kept] == [0] and kept[0].state == "complete"
    assert autocompress.open_run(out).best == kept[0]

    # A mistaken resume is refused, and does not spoil the run file of the run.
    settings = (out / "config.yaml").read_text()
    with pytest.raises(StudyMismatchError, match="seed: 0 in the run, 5 now"):
        api.search(task, out=out, resume=True, seed=5)
    with pytest.raises(StudyMismatchError, match="importance: None in the run, 'apoz' now"):
        api.search(task, out=out, resume=True, importance="apoz")
    assert (out / "config.yaml").read_text() == settings

    # An unreachable target: the closest is on disk, and it is said how far off it is.
    run = api.search(task, out=out, resume=True, observer=listener)
    # The closest is measured again.
    assert replace(run.records[0], measurement=kept[0].measurement) == kept[0] and len(run.records) == 2
    assert listener.heard[:2] == ["opened", "baseline"] and len(listener.heard) == 3
    assert run.summary["best"]["feasible"] is False
    assert "% over the target of" in summary.shortfall(run.summary) and (run.path / "best/model.xml").exists()


def test_nothing_could_be_measured(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(evaluator.CandidateEvaluator, "evaluate", fails)
    run = api.search(task, out=tmp_path / "run", **OPTIONS)
    assert [r.state for r in run.records] == ["failed"] * 2 and len(run.front) == 0
    # What there was before is offered, and it is said that it is no more than that.
    best = run.summary["best"]
    assert run.best.stage == "baseline" and (best["trial"], best["stage"], best["feasible"]) == (
        None,
        "baseline",
        False,
    )
    assert best["accuracy_drop_pp"] == 0 and run.summary["reason"] == "uncompressed"
    said = summary.shortfall(run.summary)
    assert re.search(r"\(2 failed\).*RuntimeError: a bug.*holds the uncompressed model, which is what you had", said)
    assert str(tmp_path / "run") in said and "uncompressed model" in (run.path / "report.html").read_text()
    model, inputs = run.load_model(), task.example_inputs(2)
    assert torch.allclose(model(inputs), task.model()(inputs), atol=1e-4)


def test_options_and_sets_lie_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("{seed: 1, threads: 2, task: {name: cifar10, model: vgg11}}")
    config, out = settings.resolve("digits", file, None, resume=False, sets=["seed=3"], options={"threads": 4})
    assert (config.task.name, config.task.model, config.seed, config.threads) == ("digits", "vgg11", 3, 4)
    assert out.parent == Path("runs") and out.name.startswith("digits-vgg11-")


@pytest.mark.parametrize(
    ("best", "said"),
    [
        ({"latency_ms": 6.0}, "latency 6 ms is 20.0% over the target of 5 ms"),
        ({"accuracy_drop_pp": 2.5}, "2.50 pp below the baseline, 1 pp allowed"),
        ({"size_bytes": 150}, "150 bytes are more than the 100 allowed"),
        ({}, "too close to the target"),
    ],
)
def test_shortfall_says_which_limit_is_missed_and_by_how_much(best: dict[str, float], said: str) -> None:
    figures = {"trial": 3, "latency_ms": 4.0, "accuracy_drop_pp": 0.5, "size_bytes": 90, **best}
    limits = {"latency_ms": 5.0, "max_drop": 0.01, "size_bytes": 100}
    text = summary.shortfall(finished(best=figures, constraints=limits))
    assert said in text and "trial 3" in text and "runs/x/best" in text


def finished(**changes: Any) -> dict[str, Any]:
    found = {
        "best": {"trial": 3, "latency_ms": 6.0, "accuracy_drop_pp": 0.5, "size_bytes": 90},
        "constraints": {"latency_ms": 5.0, "max_drop": 0.01, "size_bytes": None},
        "run_dir": "runs/x",
        "n_trials": 40,
        "budget": {"epochs": 24.0, "seconds_left": 3.0},
        "seconds": {"total": 600.0},
    }
    return {**found, **changes}


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"epochs": 24.0, "seconds_left": 3.0}, "Give it more --timeout with --resume"),
        (
            {"epochs": 24.0, "seconds_left": 500.0},
            "It ended with its 40 trials and 24 epochs of fine-tuning, 500 s before its time was up: give it more "
            "(--n-trials or --set recovery.epochs=N) with --resume",
        ),
        ({"epochs": 24.0, "seconds_left": None}, "40 trials and 24 epochs of fine-tuning: give it more (--n-trials or"),
        ({"epochs": None, "seconds_left": None}, "It ended with its 40 trials: give it more (--n-trials) with"),
    ],
)
def test_shortfall_names_what_there_was_too_little_of(budget: dict[str, Any], said: str) -> None:
    assert said in summary.shortfall(finished(budget=budget))


def test_seconds_are_grouped_and_add_up() -> None:
    found = summary.group_seconds({"export": 1, "build": 2, "measure": 3, "apply": 4}, 20)
    assert (found["build"], found["measure"], found["recovery"]) == (3, 3, 0)
    assert sum(found.values()) - found["total"] == found["total"] == 20


def test_benchmark_refuses_what_is_no_engine(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"model\.pt"):
        api.benchmark([tmp_path / "model.pt"])


def test_a_relative_limit_in_the_summary_is_of_the_same_measurement(run: autocompress.Run) -> None:
    limits = SimpleNamespace(**run.summary["constraints"])
    assert (limits.latency_ms, limits.max_drop, limits.size_bytes) == (None, 0.2, None)


def test_search_can_be_called_again_and_beside_its_package(tmp_path: Path) -> None:
    """Importing the package puts a module in the place of the function of the same name."""
    script = (
        "import autocompress\n"
        "from autocompress.errors import ConfigError\n"
        "import autocompress.exploration.pareto\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        autocompress.search('digits', engine='none')\n"
        "    except ConfigError as error:\n"
        "        print(error)\n"
    )
    answer = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert answer.stdout.count("Unknown engine 'none'") == 2
