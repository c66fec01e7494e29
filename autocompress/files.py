"""Files written whole: atomically, so that a crash leaves the old content or the new one. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from autocompress.documents import parse_json, read_bytes
from autocompress.errors import ConfigError

# On its way to its final name: a dot before it, and a random end behind it.
_HALF_MADE = re.compile(r"\..+\.[0-9a-f]{12}")


def half_made(path: Path) -> Path:
    """Return a name beside `path` for what is on its way there; `is_half_made` tells it from all others."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")


def is_half_made(name: str) -> bool:
    """Whether a file or folder of this name was on its way to another when its process died, unless that lives."""
    return _HALF_MADE.fullmatch(name) is not None


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: temporary file beside it, fsync, rename.

    Raises:
        ConfigError: The folder cannot be written, or the disk is full. The old content is still there.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically, as `write_text`."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = half_made(path)
        # Not `mkstemp`, whose files nobody else may read: who may is for the umask to say.
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        temporary = fresh
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise ConfigError(
            f"Cannot write {path}: {error.strerror or error}. Free some space or choose another --out; what was "
            "written before is kept, and --resume goes on from it."
        ) from error
    finally:
        # Nothing is left after an interrupt either; after the rename there is nothing to remove.
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file and have it reach the disk.

    Raises:
        ConfigError: The file cannot be written, or the disk is full.
    """
    try:
        fresh = not path.exists()
        with path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            # A line cut short by a crash must not swallow the next one.
            whole = size == 0 or file.read(1) == b"\n"
            file.write(f"{'' if whole else chr(10)}{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        if fresh:
            _sync(path.parent)
    except OSError as error:
        raise ConfigError(
            f"Cannot write {path}: {error.strerror or error}. Free some space; --resume goes on from here."
        ) from error


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON as plain data; what they mean is for `documents.validated` to say.

    Raises:
        ConfigError: The file is missing, is not JSON, or is past the bounds of `documents.parse_json`.
    """
    return parse_json(read_bytes(path), path)


def sync_folder(folder: Path) -> None:
    """Have everything in a folder, and its own entry, reach the disk.

    Raises:
        ConfigError: The disk is full or has failed.
    """
    try:
        for path in [*folder.iterdir(), folder, folder.parent]:
            if not path.is_symlink() and (path.is_file() or path.is_dir()):
                _sync(path)
    except OSError as error:
        raise ConfigError(f"Cannot write {folder}: {error.strerror or error}. Free some space.") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def settle_folder(target: Path) -> bool:
    """Put back what `replace_folder` took from `target` and died before it replaced it; return whether it did."""
    old = target.with_name(f".{target.name}.old")
    if target.exists() or not old.exists():
        return False
    old.rename(target)
    return True


def replace_folder(source: Path, target: Path) -> None:
    """Put a copy of `source` at `target`, replacing what was there in one rename, so that `target` is always whole."""
    fresh = target.with_name(f".{target.name}.new")
    old = target.with_name(f".{target.name}.old")
    try:
        settle_folder(target)
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(source, fresh, ignore=shutil.ignore_patterns("recovered*", "checkpoint-*"))
        sync_folder(fresh)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except OSError as error:
        settle_folder(target)
        raise ConfigError(f"Cannot write {target}: {error}. Free some space; --resume goes on from here.") from error
    shutil.rmtree(old, ignore_errors=True)


def check_new(to: Path) -> None:
    """Check that a directory may be written.

    Raises:
        ConfigError: It holds something.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--to {to} already exists and is not an empty directory; nothing is overwritten.")
