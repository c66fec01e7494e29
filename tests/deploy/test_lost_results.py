"""What a search found outlives the user's code: summarised, reported and ready to deploy, whatever raises."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress import api
from autocompress.deploy import summary as summary_module
from autocompress.errors import AutoCompressError, NotANumberError, TaskError, VerificationError, WorkerLostError
from autocompress.measurement.protocol import Protocol
from autocompress.runs.observer import Observer
from autocompress.tasks import Batch, ClassificationTask

pytestmark = pytest.mark.usefixtures("_brief")


@pytest.fixture
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut timing short: what is searched here is logic."""

    def brief(protocol: type[Protocol], **_: Any) -> Protocol:
        return protocol(warm_up_s=0.01, min_iterations=20, min_seconds=0.05, max_seconds=0.1, rounds=5)

    for name in ("standard", "trial"):
        monkeypatch.setattr(Protocol, name, classmethod(brief))


class Stages(Observer):
    def __init__(self) -> None:
        self.now, self.said = "", list[str]()

    def stage(self, text: str) -> None:
        self.now = text

    def warn(self, text: str) -> None:
        self.said.append(text)


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 2
    inputs = torch.randn(count, 1, 8, 8, generator=generator) / 2
    inputs[..., :4] += (0.3 - 0.6 * targets.float()).view(-1, 1, 1, 1)
    return inputs, targets


class Failing(ClassificationTask):
    """Fails where it is told to, from a stage on."""

    def __init__(self, stages: Stages, method: str, stage: str) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2)
        )
        super().__init__(
            model.eval(), images(128, 0), images(64, 1), validation=images(64, 2), name="failing", calibration_size=64
        )
        self.stages, self.method, self.at = stages, method, stage

    def _fails(self, method: str) -> bool:
        return method == self.method and self.stages.now.startswith(self.at)

    def test(self, batch_size: int) -> Iterator[Batch]:
        if self._fails("test"):
            raise OSError("the mount is gone")
        return super().test(batch_size)

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        return float("nan") if self._fails("metric") else super().metric(outputs, targets)


def search(
    tmp_path: Path, method: str, stage: str, error: type[AutoCompressError] = TaskError, **options: Any
) -> tuple[AutoCompressError, Path, dict[str, Any]]:
    stages, out = Stages(), tmp_path / "run"
    with pytest.raises(error) as raised:
        api.search(
            Failing(stages, method, stage), out=out, engine="onnxruntime", observer=stages, space="quantize-only",
            recovery={"enabled": False}, **options,
        )  # fmt: skip
    assert raised.value.run == out
    assert f"What the search had found is kept: {out}/best" in str(raised.value)
    for kept in ("pareto.json", "report.html", "best/record.json"):
        assert (out / kept).exists()
    return raised.value, out, json.loads((out / "summary.json").read_text())


def test_test_data_that_cannot_be_read_leave_the_result_without_a_test_accuracy(tmp_path: Path) -> None:
    error, out, summary = search(tmp_path, "test", "Reading the test", n_trials=2)
    assert "test() raised OSError: the mount is gone (test_lost_results.py, line" in str(error)
    best = summary["best"]
    assert best["accuracy"] is None and summary["baseline"]["accuracy"] is None
    assert best["validation_accuracy"] is not None and best["verified"]
    assert len(summary["lost"]) == 1 and summary["lost"][0].startswith("The accuracy on test data: ")
    assert "the mount is gone" in (out / "report.html").read_text()
    api.Run(out).deploy(tmp_path / "deployed", force=True)


@pytest.mark.parametrize("error", [WorkerLostError("killed by SIGKILL"), VerificationError("computes something else")])
def test_a_result_that_fails_its_last_check_is_summarised_and_not_called_verified(
    error: AutoCompressError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(summary_module, "check_outputs", fails)
    raised, out, summary = search(tmp_path, "none", "none", type(error), n_trials=2)
    assert raised.exit_code == error.exit_code and str(error) in str(raised)
    best = summary["best"]
    assert not best["verified"] and not best["feasible"] and best["accuracy"] is not None
    assert summary["lost"] == [f"The last check of the result: {error}"]
    assert str(error) in (out / "report.html").read_text()


def test_a_signal_during_the_last_stage_leaves_a_summary(tmp_path: Path) -> None:
    class Pressed(Stages):
        def stage(self, text: str) -> None:
            super().stage(text)
            if text.startswith("Reading the test"):
                raise KeyboardInterrupt

    stages, out = Pressed(), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        api.search(
            Failing(stages, "none", "none"), out=out, engine="onnxruntime", observer=stages, space="quantize-only",
            recovery={"enabled": False}, n_trials=2,
        )  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert summary["best"]["accuracy"] is None and not summary["best"]["verified"] and summary["n_trials"] == 2
    assert len(summary["lost"]) == 1 and "interrupted" in summary["lost"][0]
    assert (out / "report.html").exists()


def test_a_metric_that_gives_nan_ends_the_search_after_three_trials_with_all_that_it_had(tmp_path: Path) -> None:
    error, _, summary = search(tmp_path, "metric", "Searching", n_trials=12, first_candidates=False)
    assert isinstance(error, NotANumberError)
    assert "metric() of 64 samples is nan" in str(error)
    assert summary["n_failed"] >= 2
    assert summary["lost"][0].startswith("The rest of the search: ")
