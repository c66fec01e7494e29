"""Temporary folders of killed processes: removed by the next one, and nobody else's ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autocompress.files import half_made
from autocompress.runs import scratch
from autocompress.runs.scratch import ScratchFolder, sweep, sweep_run

ROOT = Path(__file__).parents[2]
HOLD = "import sys\nfrom autocompress.runs.scratch import ScratchFolder\nheld = ScratchFolder('test')\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "_swept", set())
    return tmp_path


def other(place: Path) -> subprocess.Popen[str]:
    """Start a process that holds a folder in the same place."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{HOLD}print(held.path, flush=True)\nsys.stdin.read()"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(place)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline()
    return process


def test_a_folder_goes_with_its_object(place: Path) -> None:
    with ScratchFolder("test") as folder:
        assert folder.parent == place and folder.is_dir()
    assert not list(place.iterdir())


def test_the_next_process_removes_what_a_killed_one_left(place: Path) -> None:
    killed, living = other(place), other(place)
    killed.kill()
    killed.communicate()
    assert len(list(place.iterdir())) == 2
    # The first folder of a process sweeps.
    with ScratchFolder("test"):
        assert len(list(place.iterdir())) == 2
    assert len(list(place.iterdir())) == 1
    living.communicate()
    assert not list(place.iterdir())


def test_what_is_not_ours_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "autocompress-worker-ofbefore").mkdir()
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "owner.lock").touch()
    (place / "autocompress-link").symlink_to(elsewhere)
    (place / "autocompress-file").touch()
    with ScratchFolder("test"):
        assert sweep(place) == 0
    foreign = place / "autocompress-foreign"
    foreign.mkdir()
    (foreign / "owner.lock").touch()
    with monkeypatch.context() as patch:
        patch.setattr(scratch.os, "getuid", lambda: foreign.stat().st_uid + 1)
        assert sweep(place) == 0
    assert sweep(place) == 1
    assert {path.name for path in place.iterdir()} == {
        "autocompress-worker-ofbefore", "elsewhere", "autocompress-link", "autocompress-file",
    }  # fmt: skip


def test_what_was_half_made_leaves_a_run(tmp_path: Path) -> None:
    trial = tmp_path / "artifacts" / "trial-00001"
    half = [
        tmp_path / ".copy-abcd1234", trial / ".build-x_y12345", trial / ".model.onnx.abcd1234",
        tmp_path / ".summary.json.abcd_234", trial / "recovered" / ".samples.npz.new.npz", tmp_path / ".reach-aaaaaaaa",
        half_made(trial / "model.onnx"), half_made(tmp_path / "a name"),
    ]  # fmt: skip
    kept = [
        tmp_path / ".best.old", tmp_path / ".best.new", tmp_path / "best", tmp_path / "study.db", trial / "model.onnx",
        tmp_path / ".notes", tmp_path / ".gitignore", trial / ".build-mine",
    ]  # fmt: skip
    for path in (*half, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if "copy" in path.name or "build" in path.name or "reach" in path.name else path.touch()
    assert sweep_run(tmp_path) == len(half)
    assert all(path.exists() for path in kept) and not any(path.exists() for path in half)


def test_what_a_process_leaves_that_is_killed_while_it_writes_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "artifacts" / "trial-00001" / "weights.safetensors"
    code = (
        "import os, sys, pathlib\nfrom autocompress import files\nos.fsync = lambda handle: os._exit(9)\n"
        "files.write_bytes(pathlib.Path(sys.argv[1]), b'half')\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(target)], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert killed.returncode == 9 and len(list(target.parent.iterdir())) == 1
    assert sweep_run(tmp_path) == 1 and not list(target.parent.iterdir())


def test_a_best_that_was_being_replaced_is_put_back(tmp_path: Path) -> None:
    (tmp_path / ".best.old").mkdir()
    (tmp_path / ".best.old" / "record.json").touch()
    assert sweep_run(tmp_path) == 1 and (tmp_path / "best" / "record.json").exists()
    assert sweep_run(tmp_path) == 0
