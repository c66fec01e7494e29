"""How a task keeps what is dear to make. Everything in it may be deleted at any time."""

from __future__ import annotations

import warnings

from autocompress.environment import cache_directory
from autocompress.errors import ConfigError
from autocompress.files import write_bytes


def store(name: str, data: bytes) -> bool:
    """Write ``<cache directory>/<name>`` atomically; warn and return False where it cannot be written."""
    path = cache_directory() / name
    try:
        write_bytes(path, data)
    except ConfigError as error:
        warnings.warn(
            f"{path} cannot be cached ({error.__cause__}) and will be made again next time; set AUTOCOMPRESS_CACHE to "
            "a folder that can be written.",
            stacklevel=2,
        )
        return False
    return True
