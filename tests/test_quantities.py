"""Quantities: everything that is formatted or documented parses, everything else is refused with the accepted forms."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from autocompress import quantities
from autocompress.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value", "relative"),
    [
        ("5ms", 5.0, False),
        (" 5 ms ", 5.0, False),
        ("+5ms", 5.0, False),
        ("800us", 0.8, False),
        ("800µs", 0.8, False),
        ("800μs", 0.8, False),
        ("0.02s", 20.0, False),
        ("2.s", 2000.0, False),
        (".5x", 0.5, True),
        ("1e-1x", 0.1, True),
    ],
)
def test_latency(text: str, value: float, relative: bool) -> None:
    limit = quantities.parse_latency(text)
    assert limit.value == pytest.approx(value)
    assert limit.relative is relative


@pytest.mark.parametrize(
    ("text", "value", "relative"),
    [
        ("20MB", 20e6, False),
        ("512KiB", 524288, False),
        ("1kB", 1000, False),
        ("1KB", 1000, False),
        ("2GiB", 2**31, False),
        ("100B", 100, False),
        ("0.25x", 0.25, True),
    ],
)
def test_size(text: str, value: float, relative: bool) -> None:
    assert quantities.parse_size(text) == quantities.Limit(value, relative)


@pytest.mark.parametrize(("text", "value"), [("1pp", 0.01), ("0pp", 0.0), ("0.5 pp", 0.005), ("100pp", 1.0)])
def test_drop(text: str, value: float) -> None:
    assert quantities.parse_drop(text) == pytest.approx(value)


@pytest.mark.parametrize(("text", "value"), [("90s", 90.0), ("25m", 1500.0), ("25min", 1500.0), ("1.5h", 5400.0)])
def test_duration(text: str, value: float) -> None:
    assert quantities.parse_duration(text) == value


@pytest.mark.parametrize(
    ("parse", "forms"),
    [
        (quantities.parse_latency, "'5ms', '800us' or '0.5x'"),
        (quantities.parse_size, "'20MB', '512KiB' or '0.25x'"),
        (quantities.parse_drop, "'1pp'"),
        (quantities.parse_duration, "'90s', '25m' or '1.5h'"),
    ],
)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "ms",
        "5",
        "5 parsecs",
        "five ms",
        "-5ms",
        "-1pp",
        "1e999ms",
        "nanms",
        "nanpp",
        "infx",
        "5ms5",
        "5m s",
        "1,5ms",
        None,
    ],
)
def test_refused(parse: Callable[..., Any], forms: str, text: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "the option")
    message = str(caught.value)
    assert message.startswith("the option ")
    assert repr(text) in message
    assert forms in message


@pytest.mark.parametrize("text", ["0ms", "0x", "0.0s"])
def test_nothing_runs_in_no_time(text: str) -> None:
    with pytest.raises(ConfigError, match="positive"):
        quantities.parse_latency(text)


@pytest.mark.parametrize("text", ["101pp", "1", "1%", "0.01"])
def test_a_drop_is_in_percentage_points_up_to_100(text: str) -> None:
    with pytest.raises(ConfigError, match="percentage points"):
        quantities.parse_drop(text)


def test_a_limit_resolves_against_the_baseline() -> None:
    assert quantities.Limit(0.5, relative=True).resolve(8.0) == 4.0
    assert quantities.Limit(5.0, relative=False).resolve(8.0) == 5.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0421, "42.1 µs"),
        (0.1, "0.1 ms"),
        (1.2345, "1.23 ms"),
        (99.94, "99.9 ms"),
        (123.4, "123 ms"),
        (4321.0, "4321 ms"),
    ],
)
def test_format_ms(value: float, text: str) -> None:
    assert quantities.format_ms(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (1_234_567, "1.23 MB"),
        (999.6e6, "1 GB"),
        (5e12, "5000 GB"),
    ],
)
def test_format_bytes(value: float, text: str) -> None:
    assert quantities.format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (185, "3m 05s"), (3599.7, "1h 00m"), (3720, "1h 02m")],
)
def test_format_duration(value: float, text: str) -> None:
    assert quantities.format_duration(value) == text


def test_what_is_formatted_parses_to_three_digits() -> None:
    generator = random.Random(0)
    for _ in range(2000):
        value = math.exp(generator.uniform(math.log(1e-3), math.log(1e5)))
        assert quantities.parse_latency(quantities.format_ms(value)).value == pytest.approx(value, rel=6e-3)
        size = float(round(math.exp(generator.uniform(0, math.log(1e13)))))
        assert quantities.parse_size(quantities.format_bytes(size)).value == pytest.approx(size, rel=6e-3)
        assert "e+" not in quantities.format_bytes(size) + quantities.format_ms(value)


def test_greater_values_never_read_smaller() -> None:
    sizes = sorted(math.exp(random.Random(1).uniform(0, 30)) for _ in range(500))
    read = [quantities.parse_size(quantities.format_bytes(s)).value for s in sizes]
    assert read == sorted(read)
