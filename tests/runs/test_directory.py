"""The run directory: made, taken up again, read back; nothing finished is lost to a crash or a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autocompress.config import RunConfig, load_config
from autocompress.engines.artifact import content_hash, read_artifact, write_artifact
from autocompress.engines.base import EngineFile, EngineOptions
from autocompress.errors import ConfigError
from autocompress.files import read_json, replace_folder
from autocompress.runs.directory import RunDirectory
from autocompress.runs.records import TrialRecord


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(tmp_path / "run", resume=False)
    made.write_config(RunConfig())
    return made


def test_create_then_resume_then_open(run: RunDirectory) -> None:
    assert RunDirectory.create(run.path, resume=True).path == run.path
    assert RunDirectory.open(str(run.path)).config() == RunConfig()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert not list(RunDirectory.create(tmp_path, resume=False).path.iterdir())


def test_a_run_is_not_overwritten(run: RunDirectory) -> None:
    with pytest.raises(ConfigError, match=r"is not empty.*--resume"):
        RunDirectory.create(run.path, resume=False)


def test_places_that_hold_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunDirectory.create(tmp_path / "file", resume=False)
    with pytest.raises(ConfigError, match="cannot be written"):
        RunDirectory.create(tmp_path / "file" / "run", resume=False)
    with pytest.raises(ConfigError, match="holds no run"):
        RunDirectory.create(tmp_path, resume=True)
    with pytest.raises(ConfigError, match="there is no run in"):
        RunDirectory.create(tmp_path / "none", resume=True)
    with pytest.raises(ConfigError, match="holds no run"):
        RunDirectory.open(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ConfigError, match="cannot be written: Permission denied"):
            RunDirectory.create(tmp_path / "run", resume=False)
    finally:
        tmp_path.chmod(0o700)


def test_the_config_round_trips(run: RunDirectory) -> None:
    config = load_config(overrides={"target_latency": "0.5x", "task.data": "a: b"})
    run.write_config(config)
    assert run.config() == config


@pytest.mark.parametrize("text", ["seed: x", "- 1", "a: [", "nonsense: 1"])
def test_a_damaged_config_is_named(run: RunDirectory, text: str) -> None:
    run.config_file.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read"):
        run.config()


def test_summaries_round_trip(run: RunDirectory) -> None:
    run.write("pareto.json", [{"a": 1}])
    assert run.read("pareto.json") == [{"a": 1}]
    with pytest.raises(ConfigError, match="does not exist"):
        run.read("summary.json")


def test_names(run: RunDirectory) -> None:
    assert run.artifact(42) == run.path / "artifacts" / "trial-00042"
    assert run.artifact(42, recovered=True) == run.artifact(42) / "recovered"
    assert {run.study_file.name, run.report_file.name, run.baseline.name, run.best.name} == {
        "study.db",
        "report.html",
        "baseline",
        "best",
    }


# -- trials ---------------------------------------------------------------------------------------------------------


def test_records_come_back_and_later_ones_replace(run: RunDirectory, make_record: Callable[..., TrialRecord]) -> None:
    assert run.records() == {}
    for record in (make_record(0), make_record(1), make_record(0, stage="recovered")):
        run.append(record)
    assert run.records() == {0: make_record(0, stage="recovered"), 1: make_record(1)}


@pytest.mark.parametrize("kept", [1, 10, 200, -1])
def test_a_line_cut_by_a_crash_costs_itself_only(
    run: RunDirectory, make_record: Callable[..., TrialRecord], kept: int
) -> None:
    run.append(make_record(0))
    whole = run.trials_file.read_bytes()
    run.append(make_record(1))
    second = run.trials_file.read_bytes()[len(whole) :]
    run.trials_file.write_bytes(whole + second.rstrip(b"\n")[:kept])
    assert run.records() == {0: make_record(0)}
    run.append(make_record(2))
    assert run.records() == {0: make_record(0), 2: make_record(2)}


def test_only_the_newline_missing_costs_nothing(run: RunDirectory, make_record: Callable[..., TrialRecord]) -> None:
    run.append(make_record(0))
    run.trials_file.write_bytes(run.trials_file.read_bytes().rstrip(b"\n"))
    run.append(make_record(1))
    assert sorted(run.records()) == [0, 1]


def test_a_full_disk_is_said(
    run: RunDirectory, make_record: Callable[..., TrialRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run.append(make_record(0))
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ConfigError, match=r"No space left on device.*--resume"):
        run.append(make_record(1))
    monkeypatch.undo()
    assert run.records()[0] == make_record(0)


# -- artefacts ------------------------------------------------------------------------------------------------------


def engine_file(folder: Path) -> EngineFile:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.xml", "model.bin", "model.onnx"):
        (folder / name).write_bytes(b"12345")
    return EngineFile("openvino", folder / "model.xml", EngineOptions("bf16", threads=2, batch_size=4))


def test_measuring_a_trial_again_does_not_hide_what_was_fine_tuned(
    run: RunDirectory, make_record: Callable[..., TrialRecord]
) -> None:
    first, again, tuned = make_record(1), make_record(1, size_bytes=7), make_record(1, stage="recovered")
    better, other = make_record(1, stage="recovered", size_bytes=5), make_record(2)
    for record, expected in ((first, first), (again, again), (tuned, tuned), (first, tuned), (better, better)):
        run.append(record)
        assert run.records() == {1: expected}
    run.append(other)
    assert run.records() == {1: better, 2: other} and len(run.history()) == 6


def test_an_artifact_round_trips(run: RunDirectory, make_record: Callable[..., TrialRecord]) -> None:
    folder, record = run.artifact(0), make_record(0)
    file = engine_file(folder)
    written = write_artifact(folder, record, file, "1.2")
    assert read_artifact(folder) == file
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in file.files()}
    assert read_json(folder / "engine.json")["sha256"] == hashes and hashes
    assert written == replace(record, sha256=content_hash(folder))
    assert TrialRecord.from_dict(read_json(folder / "record.json")) == written
    assert read_json(folder / "policy.json") == record.policy.to_dict()
    assert record.measurement is not None
    assert read_json(folder / "latency.json") == record.measurement.to_dict()


def test_a_failed_trial_has_no_latency(run: RunDirectory, make_record: Callable[..., TrialRecord]) -> None:
    folder = run.artifact(0)
    write_artifact(folder, make_record(0, measurement=None), engine_file(folder), "1.2")
    assert not (folder / "latency.json").exists()


def test_the_graph_beside_an_engine_is_not_a_part_of_it(tmp_path: Path) -> None:
    file = engine_file(tmp_path)
    assert [p.name for p in file.files()] == ["model.xml", "model.bin"]
    assert file.size_bytes == 10


def test_artifacts_that_cannot_be_read(run: RunDirectory, make_record: Callable[..., TrialRecord]) -> None:
    folder = run.artifact(0)
    with pytest.raises(ConfigError, match=r"engine\.json does not exist"):
        read_artifact(folder)
    write_artifact(folder, make_record(0), engine_file(folder), "1.2")
    (folder / "model.xml").unlink()
    with pytest.raises(ConfigError, match=r"names 'model\.xml', which is not there"):
        read_artifact(folder)
    for text in ("{}", "[]", '{"engine": "a", "file": "b", "options": {"speed": 1}}'):
        (folder / "engine.json").write_text(text)
        with pytest.raises(ConfigError, match=r"engine\.json is not what this release writes"):
            read_artifact(folder)


# -- replacing a folder ---------------------------------------------------------------------------------------------


def folder_with(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    (path / "x").write_text(text)
    return path


def test_replace_copies_without_recovered(tmp_path: Path) -> None:
    source = folder_with(tmp_path / "source", "new")
    folder_with(source / "recovered", "no")
    target = folder_with(tmp_path / "best", "old")
    (target / "stale").write_text("")
    replace_folder(source, target)
    assert [p.name for p in target.iterdir()] == ["x"]
    assert (target / "x").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "source"]


@pytest.mark.parametrize("nth", [1, 2])
def test_a_failed_replacement_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    source, target = folder_with(tmp_path / "source", "new"), folder_with(tmp_path / "best", "old")
    rename, calls = Path.rename, []

    def fail(path: Path, to: Path) -> Path:
        calls.append(path)
        if len(calls) == nth:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ConfigError, match="Cannot write"):
        replace_folder(source, target)
    assert (target / "x").read_text() == "old"


def test_a_crash_between_the_renames_is_mended(tmp_path: Path) -> None:
    folder_with(tmp_path / ".best.old", "old")
    with pytest.raises(ConfigError, match="Cannot write"):
        replace_folder(tmp_path / "no source", tmp_path / "best")
    assert (tmp_path / "best" / "x").read_text() == "old"
