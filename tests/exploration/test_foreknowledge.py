"""A search with the knapsack sampler on a real engine: what it is told, and what it makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import autocompress
from autocompress.exploration.knapsack.sampler import COST_ATTRIBUTE
from autocompress.exploration.sensitivity import Sensitivity, SensitivityPass
from autocompress.measurement.protocol import Protocol
from autocompress.runs.observer import Observer
from autocompress.tasks import Task
from tests.exploration import tiny

OPTIONS: dict[str, Any] = {
    "sampler": "knapsack", "space": "prune-only", "dense_dtype": "fp32", "recovery": {"enabled": False}, "n_trials": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def task() -> Iterator[Task]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("standard", "trial"):
            patch.setattr(Protocol, name, Protocol.__dict__[name])
        yield tiny.made("wide")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))


def test_the_front_without_a_limit(task: Task, tmp_path: Path) -> None:
    run = autocompress.search(task, out=tmp_path / "run", **OPTIONS)
    done = [r for r in run.records if r.state == "complete"]
    assert len(done) == 6 and len({r.policy for r in done}) == 6
    # Its own proposals from the first on, not the uniform ones.
    assert not any(trial.system_attrs.get("fixed_params") for trial in run.study.trials)


@pytest.mark.parametrize("limit", [{"target_latency": "0.7x"}, {"max_size": "0.5x"}])
def test_a_limit_is_its_budget(limit: dict[str, str], task: Task, tmp_path: Path) -> None:
    run = autocompress.search(task, out=tmp_path / "run", **OPTIONS, **limit)
    bound = float(next(iter(limit.values())).removesuffix("x"))
    costs = [t.user_attrs[COST_ATTRIBUTE] for t in run.study.trials if t.state.name == "COMPLETE"]
    assert len(costs) == 6 and min(costs) <= bound
    # A resumed search goes on with what it was told.
    again = autocompress.search(task, out=run.path, resume=True, **{**OPTIONS, "n_trials": 8}, **limit)
    assert len(again.records) == 8


def test_a_model_that_says_nothing_is_searched_all_the_same(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Listener(Observer):
        def warn(self, text: str) -> None:
            told.append(text)

    nothing = Sensitivity({}, 0, 0, 64, 0.0, "no choice moves the model's outputs")
    monkeypatch.setattr(SensitivityPass, "run", lambda *_, **__: nothing)
    run = autocompress.search(task, out=tmp_path / "run", observer=Listener(), **{**OPTIONS, "n_trials": 3})
    assert len(run.records) == 3 and any("is not known: no choice moves" in text for text in told)
