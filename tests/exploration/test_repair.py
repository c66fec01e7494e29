"""Tests of looking a run over: what is damaged is named, and mended where the run holds it twice."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from autocompress import repair
from autocompress.cli import main
from autocompress.runs.directory import RunDirectory
from autocompress.runs.lock import RunInUseError, owned
from tests.exploration import tiny


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    finished, _, _ = tiny.finished(tmp_path_factory.mktemp)
    shutil.copytree(finished, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def test_a_sound_run_is_left_alone(run: RunDirectory) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert repair(run.path) == []
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert {path: content for path, content in before.items() if path.name != ".lock"} == after
    answer = CliRunner().invoke(main, ["repair", str(run.path)])
    assert answer.exit_code == 0 and "Nothing is wrong" in answer.stdout


def test_damaged_lines_are_kept_elsewhere(run: RunDirectory) -> None:
    lines = run.trials_file.read_bytes()
    run.trials_file.write_bytes(b"null\n\xff\xfe\n" + lines + b'{"number": 9')
    records = run.history()
    found = repair(run.path)
    assert len(found) == 4 and "line 1" in found[0] and found[-1].endswith("trials.jsonl.damaged: 3.")
    assert run.trials_file.read_bytes() == lines and run.history() == records
    assert len((run.path / "trials.jsonl.damaged").read_text().splitlines()) == 3


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        *((harm, name) for harm in (cut, flip, Path.unlink) for name in ("model.onnx", "weights.safetensors")),
        # A flipped bit of a figure in a text is no damage that can be seen.
        *((harm, name) for harm in (cut, Path.unlink) for name in ("engine.json", "record.json")),
    ],
)
def test_best_is_made_anew_of_what_it_is_a_copy_of(run: RunDirectory, harm: Callable[[Path], None], name: str) -> None:
    harm(run.best / name)
    (found,) = repair(run.path)
    assert found.startswith("best/ was damaged") and "is made anew of" in found
    assert repair(run.path) == []


def test_artefacts_that_cannot_be_deployed_are_named(run: RunDirectory) -> None:
    records = {r.number: r for r in run.records().values() if r.artifact is not None}
    number = max(records)
    flip(run.path / str(records[number].artifact) / "model.onnx")
    found = repair(run.path)
    assert any(text.startswith(f"Trial {number} cannot be deployed") and "has changed" in text for text in found)


def test_a_study_of_something_else_is_set_aside(run: RunDirectory) -> None:
    run.study_file.write_bytes(b"no database" * 100)
    (found,) = repair(run.path)
    assert "set aside as study.db.damaged-1" in found and not run.study_file.exists()
    (found,) = repair(run.path)
    assert found == "study.db is missing; --resume makes it anew of the log."


def test_a_run_in_use_is_not_touched(run: RunDirectory) -> None:
    with owned(run.path), pytest.raises(RunInUseError):
        repair(run.path)
