"""Quantities as people write them: ``"5ms"``, ``"0.5x"``, ``"20MB"``, ``"1pp"``, ``"25m"``.

Owns parsing and formatting only. Every parser raises `ConfigError` with the value and the accepted forms.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from autocompress.errors import ConfigError

_QUANTITY = re.compile(r"^\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([A-Za-zµμ%]*)\s*$")
_MS = {"ms": 1.0, "us": 1e-3, "µs": 1e-3, "μs": 1e-3, "s": 1e3}
# Decimal prefixes are SI, binary ones IEC, as storage vendors and `ls` disagree about "MB".
_BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Limit:
    """An upper bound, absolute or relative to the baseline.

    Attributes:
        value: Bound in the quantity's unit (ms, bytes), or the ratio to the baseline when `relative`.
        relative: Whether `value` is a ratio to the baseline.
    """

    value: float
    relative: bool

    def resolve(self, baseline: float) -> float:
        """Return the absolute bound for a baseline in the same unit."""
        return self.value * baseline if self.relative else self.value


def _split(text: str, what: str, forms: str) -> tuple[float, str]:
    match = _QUANTITY.match(str(text))
    if match is None:
        raise ConfigError(f"{what} {text!r} is not a quantity. Write it as {forms}.")
    number = float(match.group(1))
    if not math.isfinite(number) or number <= 0:
        raise ConfigError(f"{what} {text!r} must be a positive number. Write it as {forms}.")
    return number, match.group(2)


def _scaled(text: str, what: str, units: dict[str, float], forms: str) -> float:
    number, unit = _split(text, what, forms)
    if unit not in units:
        said = "has no unit" if not unit else f"has the unknown unit {unit!r}"
        raise ConfigError(f"{what} {text!r} {said}. Write it as {forms}.")
    value = number * units[unit]
    # The number is finite, and yet its unit may take it past what a float holds, or below it.
    if not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{what} {text!r} is {'larger' if value else 'smaller'} than any that can be met.")
    return value


def parse_latency(text: str, what: str = "target latency") -> Limit:
    """Parse ``"5ms"``, ``"800us"``, ``"0.02s"`` or ``"0.5x"`` (of the dense baseline)."""
    forms = "'5ms', '800us' or '0.5x' (of the uncompressed model)"
    number, unit = _split(text, what, forms)
    if unit == "x":
        return Limit(number, relative=True)
    return Limit(_scaled(text, what, _MS, forms), relative=False)


def parse_size(text: str, what: str = "maximum size") -> Limit:
    """Parse ``"20MB"``, ``"512KiB"`` or ``"0.25x"`` (of the dense baseline) into bytes."""
    forms = "'20MB', '512KiB' or '0.25x' (of the uncompressed model)"
    number, unit = _split(text, what, forms)
    if unit == "x":
        return Limit(number, relative=True)
    return Limit(_scaled(text, what, {k: float(v) for k, v in _BYTES.items()}, forms), relative=False)


def parse_drop(text: str, what: str = "maximum drop") -> float:
    """Parse ``"1pp"`` (percentage points) into a fraction, ``0.01``. Zero is allowed: ``"0pp"``."""
    forms = "'1pp' (percentage points of the metric)"
    match = _QUANTITY.match(str(text))
    if match is None or match.group(2) != "pp" or not 0 <= float(match.group(1)) <= 100:
        raise ConfigError(f"{what} {text!r} cannot be used. Write it as {forms}.")
    return float(match.group(1)) / 100


def parse_duration(text: str, what: str = "timeout") -> float:
    """Parse ``"90s"``, ``"25m"`` or ``"1.5h"`` into seconds."""
    return _scaled(text, what, _SECONDS, "'90s', '25m' or '1.5h'")


def format_ms(milliseconds: float) -> str:
    """Format a latency with three significant digits and its unit."""
    if milliseconds < 0.1:
        return f"{milliseconds * 1e3:.3g} µs"
    return f"{milliseconds:.3g} ms" if milliseconds < 100 else f"{milliseconds:.0f} ms"


def format_bytes(count: float) -> str:
    """Format a size in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        # From 999.5 kB on, three digits are those of 1 MB.
        if count >= 0.9995 * scale:
            return f"{count / scale:.3g} {unit}" if count < 999.5 * scale else f"{count / scale:.0f} {unit}"
    return f"{count:.0f} B"


def format_duration(seconds: float) -> str:
    """Format a duration: ``"42s"``, ``"3m 05s"``, ``"1h 02m"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
