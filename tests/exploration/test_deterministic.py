"""A search that is steered by a latency table alone: one seed, one result, interrupted or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import autocompress
from autocompress.config import load_config
from autocompress.errors import ConfigError
from autocompress.runs.observer import Observer
from autocompress.runs.records import PREDICTED, TrialRecord
from autocompress.tasks import Task
from benchmarks.faults.steering_table import DTYPE, ENGINE, write_table
from tests.exploration import tiny

pytest.importorskip("onnxruntime")
TRIALS = 10
OPTIONS: dict[str, Any] = {
    "engine": ENGINE, "dense_dtype": DTYPE, "target_latency": "0.6x", "n_trials": TRIALS, "deterministic": True,
    "stop_early": False, "recovery": {"epochs": 0.5, "candidates": 2, "batch_size": 32},
}  # fmt: skip


@pytest.fixture(scope="module")
def task() -> Task:
    return tiny.made("wide")


@pytest.fixture(scope="module")
def table(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(task, tmp_path_factory.mktemp("tables") / "onnxruntime.csv")


class Interrupting(Observer):
    """Press Ctrl-C as soon as so many trials or fine-tunings have been told."""

    def __init__(self, after: int) -> None:
        self.left = after

    def trial(self, record: TrialRecord) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def story(run: autocompress.Run) -> list[tuple[object, ...]]:
    return [
        (r.number, r.stage, r.state, r.policy, r.accuracy, None if r.measurement is None else r.measurement.ratio)
        for r in run.directory.history()
    ]


@pytest.fixture(scope="module")
def whole(task: Task, table: Path, tmp_path_factory: pytest.TempPathFactory) -> autocompress.Run:
    return autocompress.search(task, table=str(table), out=tmp_path_factory.mktemp("runs") / "whole", **OPTIONS)


def test_nothing_is_measured_and_the_result_says_so(whole: autocompress.Run) -> None:
    assert {r.measurement.source for r in whole.records if r.measurement is not None} == {PREDICTED}
    assert whole.summary["best"]["latency_source"] == PREDICTED and not whole.summary["best"]["verified"]
    assert whole.summary["best"]["latency_ratio"] <= 0.6
    with pytest.raises(ConfigError, match="is predicted; nothing was ever run"):
        whole.deploy(whole.path.parent / "deployed")


@pytest.mark.parametrize("stops", [(1,), (3, 4), (TRIALS,)])
def test_an_interrupted_search_finds_what_an_undisturbed_one_does(
    stops: tuple[int, ...], whole: autocompress.Run, task: Task, table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for number, after in enumerate(stops):
        with pytest.raises(KeyboardInterrupt):
            autocompress.search(
                task, table=str(table), out=out, resume=number > 0, observer=Interrupting(after), **OPTIONS
            )
    again = autocompress.search(task, table=str(table), out=out, resume=True, **OPTIONS)
    assert story(again) == story(whole)
    assert again.front.drop(columns="policy").equals(whole.front.drop(columns="policy"))
    assert again.best.policy == whole.best.policy and again.best.accuracy == whole.best.accuracy


def test_what_a_table_cannot_steer_is_refused(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"none knows this model. 'autocompress profile --engine onnxruntime'"):
        autocompress.search(task, out=tmp_path / "run", **OPTIONS)
    for key, value in (("timeout", "90s"), ("table", "none"), ("sampler", "tpe")):
        with pytest.raises(ConfigError, match="deterministic"):
            load_config(overrides={"deterministic": True, key: value})
