"""A real search on a real engine whose predictor is trained from the run's own measurements."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autocompress import api
from autocompress.exploration.latency_limit import latency_filter
from autocompress.measurement.protocol import Protocol
from autocompress.prediction import predictor
from autocompress.tasks import Task
from tests.exploration import tiny

OPTIONS: dict[str, Any] = {
    "target_latency": "0.8x",
    "sampler": "random",
    "space": "prune-only",
    "dense_dtype": "fp32",
    "recovery": {"enabled": False},
}
KNOWN = 6


@pytest.fixture(scope="module")
def task() -> Iterator[Task]:
    """A task whose model has two groups of seven widths."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("standard", "trial"):
            patch.setattr(Protocol, name, Protocol.__dict__[name])
        names: dict[str, Any] = {}
        exec(tiny.TASK, names)
        yield names["wide"]()


def test_a_search_learns_to_predict_from_its_own_trials(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Few networks are enough for a chain of two layers, and a test's short measurements are rough.
    monkeypatch.setattr(predictor, "LEAST_NETWORKS", KNOWN)
    monkeypatch.setattr(latency_filter, "TRUSTED", 10.0)
    run = api.search(task, n_trials=KNOWN + 6, out=tmp_path / "run", stop_early=False, **OPTIONS)
    found, records = run.summary["prediction"], run.records
    assert len(records) == len({r.policy for r in records}) == KNOWN + 6
    assert found["networks_known"] >= KNOWN + 6 and 0 <= found["mape"] < 1
    assert [r.number for r in records if r.predicted_ratio is not None] == [r.number for r in records[KNOWN:]]
    fitted = [t for t in run.study.trials if "proposed" in t.user_attrs and t.state.name == "COMPLETE"]
    assert found["fitted"] == len(fitted) >= 2
    for trial in fitted:
        ratio, low, high = trial.user_attrs["predicted"]
        assert low <= ratio <= high and low <= 0.8
        assert trial.params != trial.user_attrs["proposed"]
