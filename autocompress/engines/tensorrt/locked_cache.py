"""A cache file shared by processes: read and replaced under a lock, with a checksum so that damage is noticed.

Used for what TensorRT can make again (timing and runtime caches). A damaged file is dropped and said, never fatal.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from autocompress.errors import ConfigError
from autocompress.files import write_bytes

_DIGEST = hashlib.sha256().digest_size


class LockedCache:
    """One cache file. `tell` gets a sentence when something is wrong with it."""

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self.path = path
        self._tell = tell

    def read(self) -> bytes:
        """Return the cached bytes; empty when there are none or they are damaged."""
        with self._locked():
            return self._read()

    def update(self, merge: Callable[[bytes], bytes]) -> None:
        """Replace the content by `merge(content)`, with no other process between reading and writing."""
        with self._locked():
            data = merge(self._read())
            if data:
                write_bytes(self.path, hashlib.sha256(data).digest() + data)

    def drop(self, why: str) -> None:
        """Remove the file, saying why; it is made anew."""
        self.path.unlink(missing_ok=True)
        self._tell(f"The cache {self.path} {why}; it is made anew.")

    def _read(self) -> bytes:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            self._tell(f"The cache {self.path} cannot be read ({error.strerror or error}); going on without it.")
            return b""
        digest, body = data[:_DIGEST], data[_DIGEST:]
        if hashlib.sha256(body).digest() != digest:
            self.drop("is damaged")
            return b""
        return body

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self.path.with_name(f"{self.path.name}.lock")
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("ab")
        except OSError as error:
            raise ConfigError(
                f"Cannot write the cache {self.path}: {error.strerror or error}. Set AUTOCOMPRESS_CACHE to a folder "
                "that can be written, or engine_options.timing_cache to off."
            ) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def file_name(*parts: str) -> str:
    """Return a file name made of `parts`, letters and digits alone between dashes."""
    return "-".join(re.sub(r"[^a-z0-9.]+", "-", part.lower()).strip("-") for part in parts)
