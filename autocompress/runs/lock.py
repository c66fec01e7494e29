"""One owner of a run directory at a time.

The operating system's lock on ``.lock`` tells processes of one machine apart and ends with its process, however that
dies. ``.owner.json`` tells who holds it, and its time of modification, renewed every few seconds, tells machines apart
that share the directory over a network whose locks hold on one machine only, or that knows no locks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
from filelock import FileLock, Timeout
from pydantic import Field

from autocompress.documents import Count, validated
from autocompress.errors import ConfigError
from autocompress.files import is_half_made, read_json, write_json
from autocompress.runs.deadline import timestamp

LOCK_NAME, OWNER_NAME = ".lock", ".owner.json"
# Seconds between two signs of life, and after how many without one the owner on another machine has died.
_HEARTBEAT_S, _DEAD_S = 15.0, 60.0
# What file systems without locks answer.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


# Seconds since 1970 that a calendar has.
_Moment = Annotated[float, Field(ge=0, lt=2**33)]


@dataclass(frozen=True)
class Owner:
    """The process that a run directory belongs to.

    Attributes:
        host: Name of its machine.
        pid: Number of its process there.
        started: When it took the directory, in s since 1970.
    """

    host: str
    pid: Count
    started: _Moment

    @classmethod
    def here(cls) -> Owner:
        """Return this process."""
        return cls(socket.gethostname(), os.getpid(), timestamp())

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host}, since {since}"


class RunInUseError(ConfigError):
    """Another process owns the run directory."""


@contextmanager
def owned(folder: Path) -> Iterator[Owner | None]:
    """Own a run directory, which is made where there is none; one that was made and stays empty is removed again.

    Yields:
        The owner that died without giving it back, or None.

    Raises:
        RunInUseError: Another process owns it.
        ConfigError: It cannot be made or written.
    """
    made = not folder.exists()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file; give a directory.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_NAME, timeout=0, thread_local=False)
        locked = _acquire(lock, folder)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written: {error.strerror or error}.") from error
    stop, taken = threading.Event(), False
    try:
        before = _left_by(folder, locked=locked)
        write_json(folder / OWNER_NAME, asdict(Owner.here()))
        taken = True
        threading.Thread(target=_beat, args=(folder / OWNER_NAME, stop), daemon=True, name="heartbeat").start()
        yield before
    finally:
        stop.set()
        with contextlib.suppress(OSError):
            if taken and _is_own(folder):
                (folder / OWNER_NAME).unlink(missing_ok=True)
        if made and _holds_nothing(folder):
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def is_lock(path: Path) -> bool:
    """Whether a file of a run directory says who owns it, or was about to when its process died; not what was found."""
    return path.name in (LOCK_NAME, OWNER_NAME) or is_half_made(path.name)


def _acquire(lock: FileLock, folder: Path) -> bool:
    """Lock a directory; return whether its file system knows locks."""
    try:
        lock.acquire()
    except Timeout as error:
        raise RunInUseError(_in_use(folder, _owner(folder))) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        return False
    if not (folder / LOCK_NAME).exists():
        # Its last owner removed it between our opening and our locking it: what is locked is no file of the directory.
        lock.release()
        raise RunInUseError(_in_use(folder, None))
    return True


def _left_by(folder: Path, *, locked: bool) -> Owner | None:
    """Return the owner that died without giving the directory back.

    Raises:
        RunInUseError: It lives: on another machine, or here where nothing is `locked`.
    """
    owner, own = _owner(folder), folder / OWNER_NAME
    if owner is None:
        return None
    # Both times are the file system's: the clocks of two machines differ.
    probe = folder / LOCK_NAME
    probe.touch()
    silent_s = probe.stat().st_mtime - own.stat().st_mtime
    here = owner.host == socket.gethostname()
    lives = psutil.pid_exists(owner.pid) and not locked if here else silent_s < _DEAD_S
    if lives:
        raise RunInUseError(_in_use(folder, owner))
    return owner


def _owner(folder: Path) -> Owner | None:
    path = folder / OWNER_NAME
    try:
        return validated(Owner, read_json(path), path)
    except ConfigError:
        return None


def _is_own(folder: Path) -> bool:
    owner = _owner(folder)
    return owner is not None and (owner.host, owner.pid) == (socket.gethostname(), os.getpid())


def _in_use(folder: Path, owner: Owner | None) -> str:
    by = "another process" if owner is None else str(owner)
    return f"{folder} is in use by {by}. Wait until it ends, stop it, or give another --out."


def _holds_nothing(folder: Path) -> bool:
    try:
        return all(is_lock(path) for path in folder.iterdir())
    except OSError:
        return False


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(_HEARTBEAT_S):
        with contextlib.suppress(OSError):
            os.utime(path)
