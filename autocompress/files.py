"""Files written whole: atomically, so that a crash leaves the old content or the new one. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from autocompress.documents import parse_json, read_bytes
from autocompress.errors import ConfigError


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
        fresh = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        # Not `mkstemp`, whose files nobody else may read: who may is for the umask to say.
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        temporary = fresh
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
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


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON as plain data; what they mean is for `documents.validated` to say.

    Raises:
        ConfigError: The file is missing, is not JSON, or is past the bounds of `documents.parse_json`.
    """
    return parse_json(read_bytes(path), path)


def replace_folder(source: Path, target: Path) -> None:
    """Put a copy of `source` at `target`, replacing what was there in one rename, so that `target` is always whole."""
    fresh = target.with_name(f".{target.name}.new")
    old = target.with_name(f".{target.name}.old")
    try:
        if old.exists() and not target.exists():
            old.rename(target)  # the process died between the two renames below
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(source, fresh, ignore=shutil.ignore_patterns("recovered"))
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except OSError as error:
        if old.exists() and not target.exists():
            old.rename(target)
        raise ConfigError(f"Cannot write {target}: {error}. Free some space; --resume goes on from here.") from error
    shutil.rmtree(old, ignore_errors=True)


def check_new(to: Path) -> None:
    """Check that a directory may be written.

    Raises:
        ConfigError: It holds something.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--to {to} already exists and is not an empty directory; nothing is overwritten.")
