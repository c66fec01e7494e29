"""`autocompress measure`: a run's engines measured here, on a real run of OpenVINO."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import autocompress
from autocompress.cli import main
from autocompress.deploy.remeasure import measure_run
from autocompress.errors import BuildError, ConfigError, NoFeasibleTrialError
from autocompress.files import write_json
from autocompress.measurement.measure import Protocol
from autocompress.runs.directory import RunDirectory
from autocompress.runs.records import ELSEWHERE, MEASURED, TrialRecord
from tests.exploration import tiny

BRIEF = Protocol(warm_up_s=0.01, min_iterations=20, min_seconds=0.05, max_seconds=0.1, rounds=5)


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> RunDirectory:
    """A copy of a finished run."""
    shutil.copytree(tiny.finished(tmp_path_factory.mktemp)[0], tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def complete(run: RunDirectory) -> dict[int, TrialRecord]:
    return {n: r for n, r in run.records().items() if r.state == "complete"}


def elsewhere(run: RunDirectory) -> None:
    """Say that the run was measured on another processor."""
    document = run.read("env.json")
    document["device"] = {**document["device"], "cpu": "Another CPU", "hash": "0" * 16}
    run.write("env.json", document)


def test_on_the_same_machine_the_front_is_measured_again(run: RunDirectory) -> None:
    before = complete(run)
    told: list[tuple[float, str]] = []
    found = measure_run(run, protocol=BRIEF, progress=lambda share, text: told.append((share, text)))
    assert found[0].record.stage == "baseline" and all(one.error is None and not one.rebuilt for one in found)
    assert [text for _, text in told] == ["the baseline", *(f"trial {one.record.number}" for one in found[1:])]
    after = complete(run)
    assert after.keys() == before.keys()
    for one in found[1:]:
        assert one.before == before[one.record.number].measurement != one.record.measurement
        assert after[one.record.number] == one.record
    # The others were measured here as well, and still count.
    assert all(r.measurement is not None and r.measurement.source == MEASURED for r in after.values())
    summary = run.read("summary.json")
    assert summary["best"]["verified"] is True and summary["best"]["trial"] in after


def test_what_another_machine_measured_counts_no_more(run: RunDirectory) -> None:
    elsewhere(run)
    number = next(iter(complete(run)))
    (_, one) = measure_run(run, [number], protocol=BRIEF)
    after = complete(run)
    for other, record in after.items():
        assert record.measurement is not None
        assert record.measurement.source == (MEASURED if other == number else ELSEWHERE)
    assert run.read("pareto.json")["front"] == [number] and run.read("best/record.json")["number"] == number
    assert run.read("env.json")["device"]["cpu"] != "Another CPU"
    assert one.record.measurement is not None
    assert run.read("summary.json")["best"]["latency_ms"] == one.record.measurement.latency_ms
    assert len(autocompress.open_run(run.path).front) == 1
    # From here on this machine's figures are the run's.
    again = measure_run(run, [number], protocol=BRIEF)
    assert again[1].before == one.record.measurement


def test_an_engine_file_that_does_not_open_here_is_built_again(run: RunDirectory) -> None:
    number, record = next(iter(complete(run).items()))
    assert record.artifact is not None
    (run.path / record.artifact / "model.xml").write_text("from another version")
    (_, one) = measure_run(run, [number], protocol=BRIEF)
    assert one.rebuilt and one.error is None
    assert "<net" in (run.path / record.artifact / "model.xml").read_text()
    # Its hashes are those of what was measured, so that it can be deployed.
    autocompress.open_run(run.path).deploy(run.path.parent / "out", number)


def test_a_trial_that_cannot_be_measured_is_named_and_the_others_go_on(run: RunDirectory) -> None:
    (broken, first), *others = complete(run).items()
    assert first.artifact is not None and others
    for name in ("model.xml", "model.onnx"):
        (run.path / first.artifact / name).write_text("damaged")
    found = measure_run(run, [broken, others[0][0]], protocol=BRIEF)
    assert found[1].error is not None and "BuildError" in found[1].error and found[2].error is None
    with pytest.raises(NoFeasibleTrialError, match=f"trial {broken}: BuildError"):
        measure_run(run, [broken], protocol=BRIEF)
    for name in ("model.xml", "model.onnx"):
        (run.baseline / name).write_text("damaged")
    with pytest.raises(BuildError):
        measure_run(run, protocol=BRIEF)


def test_what_cannot_be_asked_for(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no finished trial 77. Finished trials: "):
        measure_run(run, [77])
    run.trials_file.unlink()
    with pytest.raises(ConfigError, match="nothing to measure yet"):
        measure_run(run)
    with pytest.raises(ConfigError, match="holds no run"):
        autocompress.measure(tmp_path / "nowhere")


def test_the_command(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    number = next(iter(complete(run)))
    words = ["measure", str(run.path), "--trial", str(number), "--seconds", "0.1"]
    shown = CliRunner().invoke(main, words)
    assert shown.exit_code == 0, shown.output
    assert "Measured here" in shown.stdout and "base" in shown.stdout and "Pareto front" in shown.stdout
    rows: list[dict[str, Any]] = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert [row["trial"] for row in rows] == [None, number] and rows[1]["error"] is None
    assert rows[1]["measured"]["source"] == MEASURED and rows[1]["measured"]["ratio"] > 0


def test_a_predicted_figure_is_shown_as_such(run: RunDirectory) -> None:
    for number, record in complete(run).items():
        assert record.measurement is not None and record.artifact is not None
        guessed = TrialRecord.from_dict(
            {**record.to_dict(), "measurement": {**record.measurement.to_dict(), "source": "predicted"}}
        )
        run.append(guessed)
        write_json(run.path / record.artifact / "record.json", guessed.to_dict())
        last = number
    words = ["measure", str(run.path), "--trial", str(last), "--seconds", "0.1"]
    shown = CliRunner().invoke(main, words)
    assert "≈" in shown.stdout and "had been predicted" in shown.stdout
    # Only what was measured is on the front now.
    assert run.read("pareto.json")["front"] == [last]
