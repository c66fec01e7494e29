"""Latency tables: what was measured of whole networks and their layers on one device with one engine, as one CSV file.

Owns the file (reading, checking, writing, growing while a profile runs) and where tables are found. What a row is, is
`table_rows`'. pandas is imported where it is used: the process that measures must not load it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from autocompress.documents import parse_json, reading
from autocompress.environment import cache_directory
from autocompress.errors import ConfigError, TableMismatchError
from autocompress.files import write_text
from autocompress.measurement import fingerprint
from autocompress.measurement.statistics import quiet_latency
from autocompress.prediction.table_file import append_text, not_written, read_cells
from autocompress.prediction.table_rows import COLUMNS, DEVICE, LAYER, NETWORK, Cells, LayerRow, NetworkRow

if TYPE_CHECKING:
    import pandas as pd

_T = TypeVar("_T")
_HERE = ("engine", "engine_version", "threads", "batch_size")


@dataclass
class LatencyTable:
    """What one device and engine took, for any number of networks.

    Attributes:
        device: As `fingerprint.device_fingerprint`; entries of a measurement's fingerprint beyond that are dropped.
        engine, engine_version, threads, batch_size: How it was measured.
        networks: Whole networks, in the order they were measured.
        layers: Single layers of some of them.
        path: The file that `append` adds to; None for a table in memory, which `of_network` makes and `save` ends.
        differences: What differs between where it was measured and here, when `check` was told to let it pass.
    """

    device: Mapping[str, Any]
    engine: str
    engine_version: str
    threads: int = 1
    batch_size: int = 1
    networks: list[NetworkRow] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)
    path: Path | None = None
    differences: tuple[str, ...] = ()
    # Whether lines can be added to the file as it is.
    _tidy: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        self.device = {key: value for key, value in self.device.items() if key not in _HERE}
        if missing := [key for key in ("slug", "hash") if not self.device.get(key)]:
            raise ConfigError(f"A latency table's device has no {missing[0]}; it is what device_fingerprint() returns.")

    # -- the file -----------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: Path | str) -> LatencyTable:
        """Read a table. A last line that a crash cut short is left out; the next `append` removes it from the file.

        Raises:
            ConfigError: The file is missing, not CSV, not a table, mixes devices or engines, or has a bad cell; the
                message names row (line of the file) and column.
        """
        path = Path(path)
        records, tidy = read_cells(path)
        rows: dict[str, list[tuple[int, Cells]]] = {DEVICE: [], NETWORK: [], LAYER: []}
        for line, record in enumerate(records, 2):
            if record["kind"] not in rows:
                raise ConfigError(
                    f"Latency table {path}, row {line}: kind is {record['kind']!r}; it must be {', '.join(rows)}."
                )
            rows[record["kind"]].append((line, Cells(record)))
        if not rows[DEVICE]:
            raise ConfigError(f"Latency table {path} has no row of kind 'device', which says what it was measured on.")
        device, *_ = _parsed(path, rows[DEVICE], _device)
        shared = _parsed(path, rows[DEVICE][:1], lambda cells: (cells.whole("threads"), cells.whole("batch_size")))[0]
        texts = rows[DEVICE][0][1]
        return cls(
            device, texts.text("engine"), texts.text("engine_version"), *shared,
            _parsed(path, rows[NETWORK], NetworkRow.read), _parsed(path, rows[LAYER], LayerRow.read),
            path, _tidy=tidy,
        )  # fmt: skip

    def save(self, path: Path | str) -> None:
        """Write the whole table atomically; `append` adds to this file from now on.

        Raises:
            ConfigError: The folder cannot be written, or there is no room; the old file is still there.
        """
        path = Path(path)
        try:
            write_text(path, self._text(self._device_row(), *self.networks, *self.layers))
        except ConfigError as error:
            raise ConfigError(not_written(path, error.__cause__ or error)) from error
        self.path, self._tidy = path, True

    def append(self, *rows: NetworkRow | LayerRow) -> None:
        """Add rows, forced to disk before this returns. Those of one measurement belong in one call.

        What a crash leaves is the file with or without lines of this call; networks come last, so that a network in
        the file has its layers there too.

        Raises:
            ConfigError: There is no room; file and table are as before.
            TableMismatchError: The table is another device's.
        """
        if self.differences:
            raise TableMismatchError(
                f"{self._called} is of another device and takes no rows from here: {'; '.join(self.differences)}."
            )
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        # One by one, as `replace` must know which of the two it has.
        networks = [r if r.measured_at else replace(r, measured_at=now) for r in rows if isinstance(r, NetworkRow)]
        layers = [r if r.measured_at else replace(r, measured_at=now) for r in rows if isinstance(r, LayerRow)]
        if self.path is not None and rows:
            if not (self._tidy and self.path.exists()):
                self.save(self.path)
            append_text(self.path, self._text(*layers, *networks, header=False))
        self.networks += networks
        self.layers += layers

    @classmethod
    def resume(
        cls,
        path: Path | str,
        device: Mapping[str, Any],
        engine: str,
        engine_version: str,
        *,
        threads: int = 1,
        batch_size: int = 1,
    ) -> tuple[LatencyTable, Path | None]:
        """Return the table to go on measuring, and where one that did not fit was moved.

        The one at `path` is gone on with if it is of here and now. One that does not fit any more, as after an update
        of the engine, is renamed to ``<name>.old-1.csv`` and so on, and a new one begun.

        Raises:
            ConfigError: What is at `path` is damaged, or the folder cannot be written.
        """
        path, moved = Path(path), None
        if path.exists():
            found = cls.load(path)
            try:
                found.check(device, engine, engine_version, threads, batch_size)
                return found, None
            except TableMismatchError:
                moved = _set_aside(path)
        table = cls(device, engine, engine_version, threads, batch_size)
        table.save(path)
        return table, moved

    # -- what it holds ------------------------------------------------------------------------------------------------

    @property
    def device_name(self) -> str:
        """Readable name: of the GPU where the engine runs on one, else of the processor."""
        return str((self.device.get("gpu") or {}).get("name") or self.device.get("cpu") or self.device["slug"])

    @property
    def names(self) -> dict[str, str]:
        """Readable name of every network, by its hash, in the order they were measured."""
        return {row.network: row.name for row in self.networks} | {row.network: row.name for row in self.layers}

    @property
    def foreign(self) -> bool:
        """Whether it was measured elsewhere and is used all the same; figures from it are labelled so."""
        return bool(self.differences)

    def of_network(self, network: str) -> LatencyTable:
        """Return a copy without a file that holds the rows of one network."""
        return replace(
            self,
            networks=[row for row in self.networks if row.network == network],
            layers=[row for row in self.layers if row.network == network],
            path=None,
        )

    def baseline_ms(self, network: str) -> float | None:
        """Return the uncompressed network's usual latency, what ratios are multiplied by."""
        found = [row.baseline_ms for row in self.networks if row.network == network and row.ok]
        return quiet_latency(found) if found else None

    def check(
        self,
        device: Mapping[str, Any],
        engine: str,
        engine_version: str,
        threads: int = 1,
        batch_size: int = 1,
        *,
        allow_foreign: bool = False,
    ) -> None:
        """Compare with where the table is to be used; when `allow_foreign`, only note `differences`.

        Raises:
            TableMismatchError: It was measured on something else; the message says what differs.
        """
        here = {
            **device, "engine": engine, "engine_version": engine_version, "threads": threads, "batch_size": batch_size,
        }  # fmt: skip
        there = {**self.device, **{key: getattr(self, key) for key in _HERE}}
        found = tuple(fingerprint.differences(there, here))
        if found and not allow_foreign:
            raise TableMismatchError(
                f"{self._called} was measured on something else. {'; '.join(found)}. Measure this "
                "device with 'autocompress profile', or use the table all the same with --allow-foreign-table; what "
                "it predicts is then labelled so."
            )
        self.differences = found

    def frame(self) -> pd.DataFrame:
        """Return all rows under the file's columns, but for the device's own; see `docs/latency-tables.md`.

        Numbers that a kind of row does not have are NA, texts are empty.
        """
        return self._frame([*self.networks, *self.layers])

    # -- columns ------------------------------------------------------------------------------------------------------

    @property
    def _called(self) -> str:
        return f"Latency table {self.path}" if self.path else "The latency table"

    def _device_row(self) -> Mapping[str, Any]:
        return {"kind": DEVICE, "fingerprint": json.dumps(dict(self.device), sort_keys=True, separators=(",", ":"))}

    def _frame(self, rows: Sequence[NetworkRow | LayerRow | Mapping[str, Any]]) -> pd.DataFrame:
        import pandas as pd

        shared = {
            "engine": self.engine, "engine_version": self.engine_version, "threads": self.threads,
            "batch_size": self.batch_size, "device": self.device["slug"], "device_name": self.device_name,
            "device_hash": self.device["hash"],
        }  # fmt: skip
        records = [{**(row if isinstance(row, Mapping) else row.cells()), **shared} for row in rows]
        return pd.DataFrame(
            {
                column: pd.Series([r.get(column, "" if dtype == "str" else pd.NA) for r in records], dtype=dtype)
                for column, dtype in COLUMNS.items()
            }
        )

    def _text(self, *rows: NetworkRow | LayerRow | Mapping[str, Any], header: bool = True) -> str:
        return str(self._frame(rows).to_csv(index=False, header=header, lineterminator="\n"))


def table_path(
    engine: str, device: Mapping[str, Any], folder: Path | None = None, *, threads: int = 1, batch_size: int = 1
) -> Path:
    """Return where a table of this device and engine belongs; there need not be one.

    Args:
        engine: Its name.
        device: As `fingerprint.device_fingerprint`.
        folder: Of all tables; None is the one in the user's cache.
        threads, batch_size: More than 1 of either is part of the file's name.
    """
    suffix = (f"-{threads}threads" if threads > 1 else "") + (f"-batch{batch_size}" if batch_size > 1 else "")
    return (folder or cache_directory() / "latency_tables") / str(device["slug"]) / f"{engine}{suffix}.csv"


def shipped_tables() -> Path:
    """Return the folder of the tables that come with the package."""
    installed = Path(str(resources.files("autocompress"))) / "_latency_tables"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "latency_tables"


def find_table(
    engine: str,
    device: Mapping[str, Any],
    network: str,
    folder: Path | None = None,
    *,
    threads: int = 1,
    batch_size: int = 1,
    engine_version: str | None = None,
) -> Path | None:
    """Return the table of this device and engine that has rows of `network`: the user's, else a shipped one.

    Args:
        engine, device, folder, threads, batch_size: As for `table_path`.
        network: Hash of the model's layout.
        engine_version: A table of this one goes before others; after an update of the engine a shipped table may fit
            where the user's does not any more.

    Raises:
        ConfigError: A file is there but is damaged.
    """
    found: Path | None = None
    for place in (folder, shipped_tables()):
        path = table_path(engine, device, place, threads=threads, batch_size=batch_size)
        own = [row for row in read_cells(path)[0] if row["network"] == network] if path.exists() else []
        if own and engine_version in (None, own[0]["engine_version"]):
            return path
        if own and found is None:
            found = path
    return found


def _set_aside(path: Path) -> Path:
    number = 1
    while (old := path.with_name(f"{path.stem}.old-{number}.csv")).exists():
        number += 1
    try:
        return path.rename(old)
    except OSError as error:
        raise ConfigError(not_written(path, error)) from error


def _parsed(path: Path, rows: Sequence[tuple[int, Cells]], read: Callable[[Cells], _T]) -> list[_T]:
    found = []
    for line, cells in rows:
        try:
            with reading("a cell"):
                found.append(read(cells))
        except ConfigError as error:
            raise ConfigError(f"Latency table {path}, row {line}: {error}") from error
    return found


def _device(cells: Cells) -> Mapping[str, Any]:
    try:
        device = parse_json(cells.text("fingerprint"), "it")
    except ConfigError as error:
        raise ConfigError(f"fingerprint is not JSON: {error}") from error
    if not isinstance(device, dict) or (device.get("slug"), device.get("hash")) != (
        cells.text("device"), cells.text("device_hash"),
    ):  # fmt: skip
        raise ConfigError(
            f"fingerprint does not belong to the device {cells.text('device')!r} with the device_hash "
            f"{cells.text('device_hash')!r}."
        )
    return device
