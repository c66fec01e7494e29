"""Tests of who owns a run directory: one at a time, whatever becomes of it."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from autocompress.errors import ConfigError
from autocompress.runs.lock import LOCK_NAME, OWNER_NAME, RunInUseError, owned

# Owns a directory from the moment that the file beside it appears; says whether it got it, and keeps it for a while.
_TAKE = """
import pathlib, sys, time
from autocompress.runs.lock import RunInUseError, owned
folder, go = map(pathlib.Path, sys.argv[1:3])
while not go.exists():
    time.sleep(0.001)
try:
    with owned(folder):
        print("owned", flush=True)
        time.sleep(float(sys.argv[3]))
except RunInUseError as error:
    print("refused", flush=True)
"""


def _start(folder: Path, go: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _TAKE, str(folder), str(go), str(seconds)], stdout=subprocess.PIPE, text=True
    )


def test_of_two_starts_at_once_one_owns_the_directory(tmp_path: Path) -> None:
    for attempt in range(3):
        folder, go = tmp_path / f"run-{attempt}", tmp_path / f"go-{attempt}"
        both = [_start(folder, go, 1.0) for _ in range(2)]
        time.sleep(0.5)
        go.touch()
        assert sorted(str(one.communicate()[0]).strip() for one in both) == ["owned", "refused"]


def test_the_owner_is_named_and_a_killed_one_gives_way(tmp_path: Path) -> None:
    folder, go = tmp_path / "run", tmp_path / "go"
    go.touch()
    other = _start(folder, go, 600.0)
    assert other.stdout is not None and other.stdout.readline().strip() == "owned"
    with pytest.raises(RunInUseError, match=rf"in use by process {other.pid} on .*, since .*--out"), owned(folder):
        pass
    os.kill(other.pid, signal.SIGKILL)
    other.communicate()
    with owned(folder) as died:
        assert died is not None and died.pid == other.pid
    with owned(folder) as died:
        assert died is None


def test_the_same_process_owns_a_directory_once(tmp_path: Path) -> None:
    with owned(tmp_path), pytest.raises(RunInUseError), owned(tmp_path):
        pass
    assert not (tmp_path / OWNER_NAME).exists()


@pytest.mark.parametrize(("silent_s", "lives"), [(5, True), (300, False)])
def test_an_owner_on_another_machine_lives_while_its_heart_beats(tmp_path: Path, silent_s: int, *, lives: bool) -> None:
    owner = tmp_path / OWNER_NAME
    owner.write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": 1.0}))
    os.utime(owner, (time.time() - silent_s,) * 2)
    if lives:
        with pytest.raises(RunInUseError, match="process 7 on elsewhere"), owned(tmp_path):
            pass
        assert "elsewhere" in owner.read_text()
    else:
        with owned(tmp_path) as died:
            assert died is not None and died.host == "elsewhere"


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()])
def test_where_the_file_system_knows_no_locks_the_owner_that_lives_is_seen(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", fails)
    with owned(tmp_path) as died:
        assert died is None
        with pytest.raises(RunInUseError, match=f"process {os.getpid()} on"), owned(tmp_path):
            pass
        assert (tmp_path / OWNER_NAME).exists()
    (tmp_path / OWNER_NAME).write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1, "started": 1.0}))
    with owned(tmp_path) as died:
        assert died is not None and died.pid == 2**22 + 1


@pytest.mark.parametrize(
    "text", ["", "null", "[1]", '{"host": 1}', "\xff", '{"host": "x", "pid": 1, "started": "nan"}']
)
def test_a_damaged_owner_is_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / OWNER_NAME).write_text(text, encoding="latin-1")
    with owned(tmp_path) as died:
        assert died is None


def test_a_directory_that_was_made_for_nothing_is_removed_and_one_that_was_there_stays(tmp_path: Path) -> None:
    with owned(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    with owned(tmp_path / "there"):
        pass
    assert (tmp_path / "there").is_dir()
    with owned(tmp_path / "used"):
        (tmp_path / "used" / "result").touch()
    assert sorted(p.name for p in (tmp_path / "used").iterdir()) == [LOCK_NAME, "result"]


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"), owned(tmp_path / "file"):
        pass
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"), owned(tmp_path / "file" / "run"):
        pass
