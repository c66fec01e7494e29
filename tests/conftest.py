"""Fixtures that every test may use. Imports no framework, so that the lean tests stay fast."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autocompress.measurement.protocol import Protocol
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.runs.records import Measurement, TrialRecord

# Tests that open runtimes themselves send nothing either.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

# What a terminal of 80 columns shows is read by many tests: they, and the processes they start, get that one wherever
# they run. Set before anything is imported, as rich looks when its consoles are made.
_LOOKS = ("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM")
for _name in (*_LOOKS, "LINES"):
    os.environ.pop(_name, None)
os.environ.update(COLUMNS="80", TERM="xterm-256color")


# As they are before `tests.exploration.tiny` cuts them short.
_PROTOCOLS = {name: Protocol.__dict__[name] for name in ("standard", "trial")}


@pytest.fixture
def whole_protocols(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `Protocol.standard` and `Protocol.trial` be the package's own, whatever a tiny task made of them."""
    for name, own in _PROTOCOLS.items():
        monkeypatch.setattr(Protocol, name, own)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give the whole session a cache of its own, so that no test reads or writes the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOCOMPRESS_CACHE", str(folder))
        yield folder


@pytest.fixture
def policy() -> CompressionPolicy:
    """A policy that says something of everything."""
    return CompressionPolicy(
        dense_dtype="bf16",
        pruning={"g1": 0.5, "g0": 0.25},
        layers={"conv": LayerPolicy("int8"), "fc": LayerPolicy(rank_ratio=0.5)},
        removed_blocks=("b2", "b1"),
    )


@pytest.fixture
def make_measurement() -> Callable[..., Measurement]:
    """Build a measurement from what a test cares about."""

    def make(**changes: Any) -> Measurement:
        values: dict[str, Any] = {
            "latency_ms": 1.0,
            "p90_ms": 1.1,
            "p95_ms": 1.2,
            "p99_ms": 1.3,
            "mad_ms": 0.01,
            "n": 500,
            "low_ms": 0.99,
            "high_ms": 1.01,
            "ratio": 0.5,
            "ratio_low": 0.49,
            "ratio_high": 0.51,
            "baseline_ms": 2.0,
            "noisy": False,
            "batch_size": 1,
            "threads": 1,
        }
        return Measurement(**{**values, **changes})

    return make


@pytest.fixture
def make_record(policy: CompressionPolicy, make_measurement: Callable[..., Measurement]) -> Callable[..., TrialRecord]:
    """Build a complete trial's record from what a test cares about."""

    def make(number: int = 0, **changes: Any) -> TrialRecord:
        values: dict[str, Any] = {
            "policy": policy,
            "state": "complete",
            "accuracy": 0.97,
            "measurement": make_measurement(),
            "size_bytes": 123_456,
            "macs": 1_000_000,
            "params": 10_000,
            "seconds": {"build": 0.5},
            "artifact": f"artifacts/trial-{number:05d}",
        }
        return TrialRecord(number=number, **{**values, **changes})

    return make
