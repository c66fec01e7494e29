"""The rows of a latency table and the columns that they fill. A row checks itself, so no bad one is written or read.

Must import neither pandas nor a runtime: the file is `table`'s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Self

from autocompress.documents import parse_json, shown
from autocompress.errors import ConfigError, nearest
from autocompress.policy import CompressionPolicy, LayerPolicy

OPS = ("conv", "pointwise", "depthwise", "grouped", "linear")
OK, UNSUPPORTED = "ok", "unsupported"
DEVICE, NETWORK, LAYER = "device", "network", "layer"
# What all rows of a file share; the device's hash ends every line, so that a line cut short shows.
SHARED = ("engine", "engine_version", "threads", "batch_size", "device", "device_name", "device_hash")
# Columns of the file with what pandas keeps them as, which knows "nothing here" for numbers too.
COLUMNS: Mapping[str, str] = {
    "kind": "str", "network": "str", "name": "str",
    "layer": "str", "op": "str", "in_channels": "Int64", "out_channels": "Int64", "kernel": "str",
    "positions": "Int64", "ranks": "str", "dtype": "str", "dense_dtype": "str",
    "inputs_int8": "Float64", "outputs_int8": "Float64", "macs": "Int64",
    "latency_ms": "Float64", "spread_ms": "Float64", "baseline_ms": "Float64",
    "ratio": "Float64", "ratio_low": "Float64", "ratio_high": "Float64", "n": "Int64",
    "noisy": "boolean", "held_out": "boolean", "status": "str", "error": "str", "policy": "str",
    "measured_at": "str", "fingerprint": "str",
    "engine": "str", "engine_version": "str", "threads": "Int64", "batch_size": "Int64",
    "device": "str", "device_name": "str", "device_hash": "str",
}  # fmt: skip
# Far more than any measurement knows, and far less than what a float prints.
_DIGITS = 7
_MOST_DIGITS = 18
# A runtime's message can hold a whole graph.
_ERROR_LENGTH = 500


@dataclass(frozen=True)
class NetworkRow:
    """One whole network, built under a policy and measured. Figures are kept to seven digits.

    Attributes:
        network: Hash of the model's layout.
        name: Readable, as ``"cifar10 resnet20"``.
        policy: What was done to the model.
        ratio, ratio_low, ratio_high: Latency over the uncompressed network's of the same interleaved run, and its
            95 % interval.
        latency_ms, baseline_ms: Medians of that run.
        mad_ms: Median absolute deviation of the latency.
        n: Timed iterations.
        noisy: As in `runs.records.Measurement`.
        macs: Of one sample.
        held_out: Drawn at random and never used to fit: the table's own error comes from these.
        status: ``"ok"``, or ``"unsupported"`` when the engine refused; all figures but `macs` are then NaN and 0.
        error: The runtime's words when unsupported, on one line.
        measured_at: ISO date and time; `LatencyTable.append` fills it. Two rows that differ only here are equal.

    Raises:
        ConfigError: A figure that no measurement gives.
    """

    network: str
    name: str
    policy: CompressionPolicy
    ratio: float
    ratio_low: float
    ratio_high: float
    latency_ms: float
    baseline_ms: float
    mad_ms: float
    n: int
    noisy: bool
    macs: int
    held_out: bool = False
    status: str = OK
    error: str = ""
    measured_at: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.status not in (OK, UNSUPPORTED):
            raise ConfigError(f"status is {self.status!r}.{nearest(self.status, (OK, UNSUPPORTED))}")
        _named(network=self.network, name=self.name)
        _whole(0, macs=self.macs)
        _date(self.measured_at)
        figures = {name: getattr(self, name) for name in ("ratio", "ratio_low", "ratio_high", "latency_ms")}
        figures["baseline_ms"] = self.baseline_ms
        if self.status == UNSUPPORTED:
            _set(self, **dict.fromkeys([*figures, "mad_ms"], math.nan), n=0, noisy=False)
        else:
            _positive(**figures)
            _not_negative(spread_ms=self.mad_ms)
            _whole(1, n=self.n)
            if self.ratio_low > self.ratio_high:
                raise ConfigError(f"ratio_low is {self.ratio_low}, above the ratio_high of {self.ratio_high}.")
            _set(self, **{name: _rounded(value) for name, value in {**figures, "mad_ms": self.mad_ms}.items()})
            _set(self, n=int(self.n), noisy=bool(self.noisy))
        _set(self, macs=int(self.macs), held_out=bool(self.held_out), error=_line(self.error)[:_ERROR_LENGTH])

    @classmethod
    def unsupported(
        cls, network: str, name: str, policy: CompressionPolicy, error: str, macs: int, *, held_out: bool = False
    ) -> Self:
        """Return the row of a network that the engine refused."""
        nan = math.nan
        return cls(network, name, policy, nan, nan, nan, nan, nan, nan, 0, False, macs, held_out, UNSUPPORTED, error)

    @property
    def ok(self) -> bool:
        """Whether there are figures."""
        return self.status == OK

    def cells(self) -> dict[str, Any]:
        """Return the columns that this row fills."""
        figures = {
            "latency_ms": self.latency_ms, "spread_ms": self.mad_ms, "baseline_ms": self.baseline_ms,
            "ratio": self.ratio, "ratio_low": self.ratio_low, "ratio_high": self.ratio_high, "n": self.n,
            "noisy": self.noisy,
        }  # fmt: skip
        return {
            "kind": NETWORK, "network": self.network, "name": self.name, "dense_dtype": self.policy.dense_dtype,
            "macs": self.macs, **(figures if self.ok else {}), "held_out": self.held_out, "status": self.status,
            "error": self.error, "policy": policy_text(self.policy), "measured_at": self.measured_at,
        }  # fmt: skip

    @classmethod
    def read(cls, cells: Cells) -> Self:
        """Make a row of what a file says.

        Raises:
            ConfigError: A cell is missing, damaged or out of range; the message names its column.
        """
        policy = read_policy(cells.text("policy"))
        network, name, macs = cells.text("network"), cells.text("name"), cells.whole("macs")
        held_out, measured_at = cells.flag("held_out"), cells.text("measured_at")
        if cells.text("status") == UNSUPPORTED:
            row = cls.unsupported(network, name, policy, cells.text("error"), macs, held_out=held_out)
            return replace(row, measured_at=measured_at)
        return cls(
            network, name, policy, cells.number("ratio"), cells.number("ratio_low"), cells.number("ratio_high"),
            cells.number("latency_ms"), cells.number("baseline_ms"), cells.number("spread_ms"), cells.whole("n"),
            cells.flag("noisy"), macs, held_out, cells.text("status"), cells.text("error"), measured_at,
        )  # fmt: skip


@dataclass(frozen=True)
class LayerRow:
    """One layer inside a measured network, from the engine's own profiler. Figures are kept to seven digits.

    Attributes:
        network, name: As in `NetworkRow`.
        layer: Its name in the model.
        op: As `model.channel_groups.Layer.kind`.
        in_channels, out_channels: What pruning left.
        kernel: ``"3x3"``; empty for linear layers.
        positions: Output pixels or tokens of one sample.
        ranks: As `compress.shapes.LayerShape`.
        dtype: ``"int8"``, or the dense dtype it ran in.
        inputs_int8, outputs_int8: Share of int8 among the layers that made its input, and among what reads its result.
        macs: Of one sample.
        time_ms: Its share of the network's latency, with whatever the engine fused into it.
        baseline_ms: Latency of the whole uncompressed network in the same run, as in `NetworkRow`.
        spread_ms: Of `time_ms`; 0 where the profiler tells one figure alone.
        n: Inferences that the time was taken from.
        policy: Hash of the policy that made the network; the network's own row has all of it.
        dense_dtype: What the network's other layers ran in; that of `dtype` unless int8.
        measured_at: As in `NetworkRow`.

    Raises:
        ConfigError: A figure that no measurement gives.
    """

    network: str
    name: str
    layer: str
    op: str
    in_channels: int
    out_channels: int
    kernel: str
    positions: int
    ranks: tuple[int, ...]
    dtype: str
    inputs_int8: float
    outputs_int8: float
    macs: int
    time_ms: float
    baseline_ms: float
    spread_ms: float
    n: int
    policy: str
    dense_dtype: str = ""
    measured_at: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _named(network=self.network, name=self.name, layer=self.layer, dtype=self.dtype, policy=self.policy)
        if self.op not in OPS:
            raise ConfigError(f"op is {self.op!r}.{nearest(self.op, OPS)}")
        counts = {name: getattr(self, name) for name in ("in_channels", "out_channels", "positions", "n")}
        _whole(1, **counts)
        _whole(0, macs=self.macs)
        for rank in self.ranks:
            _whole(1, ranks=rank)
        for name in ("inputs_int8", "outputs_int8"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is a share, in [0, 1].")
        _positive(latency_ms=self.time_ms, baseline_ms=self.baseline_ms)
        _not_negative(spread_ms=self.spread_ms)
        _date(self.measured_at)
        figures = ("time_ms", "baseline_ms", "spread_ms", "inputs_int8", "outputs_int8")
        _set(self, **{name: _rounded(getattr(self, name)) for name in figures})
        _set(self, **{name: int(value) for name, value in counts.items()}, macs=int(self.macs))
        _set(self, ranks=tuple(int(rank) for rank in self.ranks))
        if not self.dense_dtype and self.dtype != "int8":
            _set(self, dense_dtype=self.dtype)

    def cells(self) -> dict[str, Any]:
        """Return the columns that this row fills."""
        return {
            "kind": LAYER, "network": self.network, "name": self.name, "layer": self.layer, "op": self.op,
            "in_channels": self.in_channels, "out_channels": self.out_channels, "kernel": self.kernel,
            "positions": self.positions, "ranks": "x".join(map(str, self.ranks)), "dtype": self.dtype,
            "dense_dtype": self.dense_dtype, "inputs_int8": self.inputs_int8, "outputs_int8": self.outputs_int8,
            "macs": self.macs, "latency_ms": self.time_ms, "spread_ms": self.spread_ms,
            "baseline_ms": self.baseline_ms, "n": self.n, "policy": self.policy, "measured_at": self.measured_at,
        }  # fmt: skip

    @classmethod
    def read(cls, cells: Cells) -> Self:
        """Make a row of what a file says.

        Raises:
            ConfigError: A cell is missing, damaged or out of range; the message names its column.
        """
        return cls(
            cells.text("network"), cells.text("name"), cells.text("layer"), cells.text("op"),
            cells.whole("in_channels"), cells.whole("out_channels"), cells.text("kernel"), cells.whole("positions"),
            cells.wholes("ranks"), cells.text("dtype"), cells.number("inputs_int8"), cells.number("outputs_int8"),
            cells.whole("macs"), cells.number("latency_ms"), cells.number("baseline_ms"), cells.number("spread_ms"),
            cells.whole("n"), cells.text("policy"), cells.text("dense_dtype"), cells.text("measured_at"),
        )  # fmt: skip


class Cells:
    """One line of the file as text by column. Every method raises `ConfigError` naming the column."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def text(self, column: str) -> str:
        """Return a cell as it is; may be empty."""
        return self._texts[column]

    def number(self, column: str) -> float:
        """Return a finite number."""
        try:
            value = float(self._texts[column])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ConfigError(f"{column} is {self._texts[column]!r}; it must be a number.")
        return value

    def whole(self, column: str) -> int:
        """Return a whole number."""
        return _int(self._texts[column], f"{column} is {shown(self._texts[column])}; it must be a whole number.")

    def wholes(self, column: str) -> tuple[int, ...]:
        """Return whole numbers joined by ``x``; none of an empty cell."""
        text = self._texts[column]
        said = f"{column} is {shown(text)}; it must be whole numbers joined by 'x', as '16x24', or empty."
        return tuple(_int(part, said) for part in text.split("x") if text)

    def flag(self, column: str) -> bool:
        """Return True or False."""
        found = {"true": True, "false": False}.get(self._texts[column].lower())
        if found is None:
            raise ConfigError(f"{column} is {self._texts[column]!r}; it must be True or False.")
        return found


def _int(text: str, said: str) -> int:
    # A column of the file holds 64 bits.
    if len(text) > _MOST_DIGITS:
        raise ConfigError(said)
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(said) from error


def policy_text(policy: CompressionPolicy) -> str:
    """Return the canonical JSON of what a policy changes, without spaces: ``{"version":1}`` for none."""
    data = {key: value for key, value in policy.to_dict().items() if value}
    if policy.dense_dtype == CompressionPolicy.dense_dtype:
        del data["dense_dtype"]
    if policy.layers:
        data["layers"] = {
            name: {key: value for key, value in layer.items() if value != getattr(LayerPolicy, key)}
            for name, layer in data["layers"].items()
        }
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def read_policy(text: str) -> CompressionPolicy:
    """Read what `policy_text` wrote.

    Raises:
        ConfigError: It is not JSON, or not a policy.
    """
    try:
        data = parse_json(text, "it")
    except ConfigError as error:
        raise ConfigError(f"policy is {_line(text)[:80]!r}, which is not JSON: {error}") from error
    try:
        return CompressionPolicy.from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"policy: {error}") from error


def _named(**values: str) -> None:
    for column, value in values.items():
        if not value.strip():
            raise ConfigError(f"{column} is empty.")


def _positive(**values: float) -> None:
    for column, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{column} is {value}; it must be a positive number.")


def _not_negative(**values: float) -> None:
    for column, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{column} is {value}; it must be 0 or a positive number.")


def _whole(least: int, **values: int) -> None:
    for column, value in values.items():
        if not math.isfinite(value) or value < least or value != int(value):
            raise ConfigError(f"{column} is {value}; it must be a whole number, at least {least}.")


def _date(text: str) -> None:
    try:
        if text:
            datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"measured_at is {text!r}; it must be a date and time, as '2026-05-01T09:30:00Z'.") from error


def _rounded(value: float) -> float:
    return float(f"{float(value):.{_DIGITS}g}")


def _line(text: str) -> str:
    return " ".join(text.split())


def _set(row: object, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(row, name, value)
