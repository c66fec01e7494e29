"""The file of a latency table as text: reading it into cells, and adding lines that survive a crash.

Must know nothing of what rows mean beyond the columns that all of them share.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from autocompress.documents import read_bytes, reading
from autocompress.errors import ConfigError
from autocompress.prediction.table_rows import COLUMNS, SHARED

_MIXED = {
    "engine": "engines", "engine_version": "engine versions", "threads": "numbers of threads",
    "batch_size": "batch sizes", "device": "devices", "device_name": "devices", "device_hash": "devices",
}  # fmt: skip


# A row takes some 300 bytes; of more rows than this no table is fitted.
_MOST_BYTES = 2**30


def read_cells(path: Path) -> tuple[list[dict[str, str]], bool]:
    """Return a table's rows, column to text, and whether lines can be added to the file as it is.

    The first row is line 2 of the file. A last line that a crash cut short is left out.

    Raises:
        ConfigError: The file is missing, not CSV, lacks columns or rows, or mixes devices or engines.
    """
    import pandas as pd

    try:
        if not path.exists():
            raise ConfigError(f"Latency table {path} does not exist. Make one with 'autocompress profile'.")
        data = read_bytes(path, most=_MOST_BYTES)
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith("Latency") else f"Latency table {error}") from error
    # Spreadsheets save it with a byte order mark and their own line ends.
    plain = data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n")
    tidy = plain == data and data.endswith(b"\n")
    head, _, last = plain.rpartition(b"\n")
    # Appending was interrupted, unless the line ends as the one before.
    if head and last and last.rpartition(b",")[2] != head.rpartition(b",")[2]:
        plain = head + b"\n"
    if not plain.strip():
        raise ConfigError(f"Latency table {path} is empty. Make one with 'autocompress profile'.")
    try:
        text = plain.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"Latency table {path} is not CSV: it is not text.") from error
    with reading(f"Latency table {path} is not CSV:", also=(csv.Error,)):
        frame = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False, na_filter=False)
    if missing := [column for column in COLUMNS if column not in frame.columns]:
        raise ConfigError(f"Latency table {path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}.")
    if not isinstance(frame.index, pd.RangeIndex):
        # pandas takes the first cells of rows that are longer than the header for an index.
        raise ConfigError(f"Latency table {path} is not CSV: row 2 has more cells than the header.")
    if frame.empty:
        raise ConfigError(f"Latency table {path} has a header but no rows. Make one with 'autocompress profile'.")
    columns = {column: frame[column].astype(object).to_list() for column in COLUMNS}
    _check_shared(path, columns)
    # pandas takes five times as long for this.
    rows = [dict(zip(columns, texts, strict=True)) for texts in zip(*columns.values(), strict=True)]
    return rows, tidy and list(frame.columns) == list(COLUMNS)


def _check_shared(path: Path, columns: Mapping[str, Sequence[str]]) -> None:
    for column in reversed(SHARED):  # the device first: it says most
        values = columns[column]
        if len(set(values)) == 1 and values[0].strip():
            continue
        for line, value in enumerate(values, 2):
            if not value.strip():
                raise ConfigError(f"Latency table {path}, row {line}: {column} is empty.")
            if value != values[0]:
                raise ConfigError(
                    f"Latency table {path} mixes {_MIXED[column]}: {column} is {values[0]!r} in row 2 and {value!r} "
                    f"in row {line}. Keep one file for each."
                )


def append_text(path: Path, text: str) -> None:
    """Append to a file and force it to disk.

    Raises:
        ConfigError: There is no room; the file is what it was.
    """
    try:
        with path.open("ab", buffering=0) as file:
            end, left = file.seek(0, os.SEEK_END), memoryview(text.encode())
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except BaseException:  # also Ctrl-C
                with suppress(OSError):
                    file.truncate(end)
                raise
    except OSError as error:
        raise ConfigError(not_written(path, error)) from error


def not_written(path: Path, error: BaseException) -> str:
    """Say that a table cannot be written, and what to do."""
    said = getattr(error, "strerror", None) or error
    return (
        f"Latency table {path} cannot be written: {said}. Free some space, or name another folder with --tables; what "
        "was written before is kept, and profiling goes on from it."
    )
