"""The cache directory and how a task keeps what is dear to make. Everything in it may be deleted at any time."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from autocompress import results
from autocompress.errors import ConfigError


def cache_directory() -> Path:
    """Return ``$AUTOCOMPRESS_CACHE``, ``$XDG_CACHE_HOME/autocompress`` or ``~/.cache/autocompress``; may not exist."""
    own = os.environ.get("AUTOCOMPRESS_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "autocompress"


def store(name: str, data: bytes) -> bool:
    """Write ``<cache directory>/<name>`` atomically; warn and return False where it cannot be written."""
    path = cache_directory() / name
    try:
        results.write_bytes(path, data)
    except ConfigError as error:
        warnings.warn(
            f"{path} cannot be cached ({error.__cause__}) and will be made again next time; set AUTOCOMPRESS_CACHE to "
            "a folder that can be written.",
            stacklevel=2,
        )
        return False
    return True
