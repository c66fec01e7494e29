"""An ``.npy`` file of float32 rows that is written piece by piece, so that memory never holds all of it."""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from autocompress.errors import ConfigError
from autocompress.quantities import format_bytes

# Room for the longest header, whose length must not change with the number of rows.
_HEADER_BYTES = 256
_MAGIC = b"\x93NUMPY\x01\x00"


class ArrayFile:
    """Rows ``(...)`` of one shape in a file; a context manager that writes the header, or removes the file on an error.

    Plain writes, not a memory map: a full disk is then an `OSError` and not the death of the process.

    Args:
        path: The file; overwritten.

    Raises:
        ConfigError: It cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shape: tuple[int, ...] | None = None
        self._count = 0

    def __enter__(self) -> Self:
        with self._explained():
            self._file = self._path.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        whole = False
        try:
            if error is None:
                with self._explained():
                    self._file.seek(0)
                    self._file.write(self._header())
                    self._file.flush()
                whole = True
        finally:
            with contextlib.suppress(OSError):
                self._file.close()
            if not whole:
                self._path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            written = f" ({format_bytes(self._count * self._row_bytes())} so far)" if self._count else ""
            raise ConfigError(
                f"Cannot write {self._path}{written}: {error.strerror or error}. Free some space, choose another "
                "--out, or lower validation_limit."
            ) from error

    def _row_bytes(self) -> int:
        return 4 * math.prod(self._shape or (1,))

    def __len__(self) -> int:
        return self._count

    def write(self, at: int, rows: npt.NDArray[np.float32]) -> None:
        """Write rows ``(n, ...)`` from row `at` on, over what is there.

        Raises:
            ConfigError: Their shape is not that of the rows before, or the disk is full.
        """
        if self._shape is None:
            self._shape = rows.shape[1:]
        if rows.shape[1:] != self._shape:
            raise ConfigError(
                f"Samples of one data set have different shapes, {self._shape} and {rows.shape[1:]}. Give all the same."
            )
        with self._explained():
            self._file.seek(_HEADER_BYTES + at * self._row_bytes())
            self._file.write(np.ascontiguousarray(rows, dtype="<f4").data)
        self._count = max(self._count, at + len(rows))

    def _header(self) -> bytes:
        shape = (self._count, *(self._shape or ()))
        text = repr({"descr": "<f4", "fortran_order": False, "shape": shape}).encode("latin1")
        room = _HEADER_BYTES - len(_MAGIC) - 2
        return _MAGIC + struct.pack("<H", room) + text.ljust(room - 1) + b"\n"


def reorder_rows(path: Path, order: npt.NDArray[np.int64]) -> None:
    """Rearrange a file's rows in place, so that row i is what row ``order[i]`` was.

    Args:
        path: An ``.npy`` file ``(n, ...)``.
        order: A permutation of ``range(n)``.
    """
    rows = np.load(path, mmap_mode="r+", allow_pickle=False)
    done = np.zeros(len(order), dtype=bool)
    for start in range(len(order)):
        if done[start] or order[start] == start:
            continue
        kept, at = rows[start].copy(), start
        while order[at] != start:
            rows[at] = rows[order[at]]
            done[at], at = True, int(order[at])
        rows[at] = kept
        done[at] = True
    rows.flush()
