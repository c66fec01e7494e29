"""An array as a ``.npy`` file that a child maps: the user's own, or a temporary one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np

from autocompress.engines.base import Array
from autocompress.errors import ConfigError


class ArrayFile:
    """A context manager that gives the path of a ``.npy`` file, absolute.

    Args:
        inputs: An array, written to `folder` meanwhile, or a file that is there.
        folder: Where temporary files go.
    """

    def __init__(self, inputs: Array | Path, folder: Path) -> None:
        self._inputs, self._folder = inputs, folder
        self._made: Path | None = None

    def __len__(self) -> int:
        """Return the samples, 0 for a file that is none; what is wrong with it the child says."""
        if not isinstance(self._inputs, Path):
            return len(self._inputs)
        try:
            return len(np.load(self._inputs, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, TypeError, EOFError):
            return 0

    def __enter__(self) -> str:
        if isinstance(self._inputs, Path):
            return str(self._inputs.absolute())
        handle, name = tempfile.mkstemp(dir=self._folder, prefix="inputs-", suffix=".npy")
        self._made = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, self._inputs, allow_pickle=False)
        except OSError as error:
            self._made.unlink(missing_ok=True)
            raise ConfigError(
                f"Cannot write inputs to {self._folder}: {error.strerror or error}. Free some space, or set TMPDIR."
            ) from error
        return name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._made is not None:
            self._made.unlink(missing_ok=True)
