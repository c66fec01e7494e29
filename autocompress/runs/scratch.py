"""Temporary folders that a killed process cannot remove: marked by a lock, so that the next one can.

The owner holds a lock on a file in its folder; the kernel lets go of it when the owner ends, however it ends. So a
folder whose lock can be had is nobody's. Process numbers would not tell: they are used again, and containers that
share a temporary folder have numbers of their own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import weakref
from pathlib import Path
from types import TracebackType

from autocompress.files import is_half_made, settle_folder

_PREFIX, _LOCK = "autocompress-", "owner.lock"
# What a killed process leaves inside a run: half-built engines, copies, samples, and what releases of before called
# files on their way to their names.
_LEFT_FOLDERS = re.compile(r"\.(build|copy|reach)-[a-z0-9_]{8}")
_LEFT_FILES = re.compile(r"\..+\.(json|jsonl|yaml|onnx|safetensors|html|bin|xml|npy)\.[a-z0-9_]{8}|\..+\.new\.npz")
_swept: set[Path] = set()


class ScratchFolder:
    """A temporary folder that goes with this object or this process. A context manager, which gives its path.

    The first one of a process sweeps what killed processes left in the same place.

    Args:
        kind: What it is for, a word in its name.
    """

    def __init__(self, kind: str) -> None:
        place = Path(tempfile.gettempdir())
        if place not in _swept:
            _swept.add(place)
            sweep(place)
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{kind}-"))
        lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        # Without locks, as on some network file systems, nothing is ever swept.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.close = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    @property
    def alive(self) -> bool:
        """Whether it has not been removed by `close`."""
        return self.close.alive

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def sweep(place: Path) -> int:
    """Remove this user's scratch folders in `place` whose owner has ended; return how many those were."""
    removed = 0
    with contextlib.suppress(OSError):
        for folder in place.glob(f"{_PREFIX}*"):
            removed += _nobodys(folder)
    return removed


def sweep_run(run: Path) -> int:
    """Remove what a killed process left half-made in a run directory that is this process's own; return how many.

    A file without its final name was never part of the run; a ``best/`` that was being replaced is put back.
    """
    removed = int(settle_folder(run / "best"))
    for path in (*run.glob(".*"), *run.glob("*/.*"), *run.glob("artifacts/*/.*"), *run.glob("artifacts/*/*/.*")):
        with contextlib.suppress(OSError):
            if _LEFT_FOLDERS.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
                removed += 1
            elif (_LEFT_FILES.fullmatch(path.name) or is_half_made(path.name)) and path.is_file():
                path.unlink()
                removed += 1
    return removed


def _nobodys(folder: Path) -> bool:
    """Remove a folder if its lock can be had; return whether it is gone."""
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return False
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        # Not made by this module, or just being made.
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def _remove(folder: Path, lock: int, owner: int) -> None:
    if owner == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
