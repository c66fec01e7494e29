"""A real search on a real engine whose predictor is trained from the run's own measurements."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autocompress import api, pipeline
from autocompress.deploy import summary
from autocompress.latency import predictor
from autocompress.search import screening
from autocompress.tasks import Task
from tests.search import tiny

OPTIONS: dict[str, Any] = {
    "target_latency": "0.8x",
    "sampler": "random",
    "space": "prune-only",
    "dense_dtype": "fp32",
    "recovery": {"enabled": False},
    "table": "none",
}
KNOWN = 8


@pytest.fixture(scope="module")
def task() -> Iterator[Task]:
    """A task whose model has two groups of seven widths."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (api, pipeline, summary):
            patch.setattr(module, "Protocol", module.Protocol)  # type: ignore[attr-defined]
        names: dict[str, Any] = {}
        exec(tiny.TASK, names)
        yield names["wide"]()


def test_a_search_learns_to_predict_from_its_own_trials(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Few networks are enough for a chain of two layers, and a test's short measurements are rough.
    monkeypatch.setattr(predictor, "LEAST_NETWORKS", KNOWN)
    monkeypatch.setattr(screening, "TRUSTED", 10.0)
    run = api.search(task, n_trials=KNOWN + 2, out=tmp_path / "run", **OPTIONS)
    first = run.summary["prediction"]
    assert first["networks_known"] >= KNOWN and first["mape"] is not None and 0 <= first["mape"] < 1
    run = api.search(task, n_trials=KNOWN + 8, out=tmp_path / "run", resume=True, **OPTIONS)
    found, records = run.summary["prediction"], run.records
    assert len(records) == KNOWN + 8 and found["networks_known"] > first["networks_known"]
    # The uncompressed network is known without measuring it, so the first predicted trial may be the one before.
    predicted = [r for r in records if r.predicted_ratio is not None]
    assert {r.number for r in predicted} >= {r.number for r in records[KNOWN:]}
    assert not any(r.predicted_ratio is not None for r in records[: KNOWN - 2])
    fitted = [t for t in run.study.trials if "proposed" in t.user_attrs and t.state.name == "COMPLETE"]
    assert found["fitted"] == len(fitted) >= 3
    for trial in fitted:
        ratio, low, high = trial.user_attrs["predicted"]
        assert low <= ratio <= high and ratio <= 0.8 * 1.06
    assert {r.policy for r in records} == {r.policy for r in set(records)} and len({r.policy for r in records}) == len(
        records
    )
