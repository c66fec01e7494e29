from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.measurement.fakes import Clock, StillWatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    fake = SimpleNamespace(perf_counter=clock.perf_counter, perf_counter_ns=clock.perf_counter_ns)
    monkeypatch.setattr("autocompress.measurement.timers.time", fake)
    monkeypatch.setattr("autocompress.measurement.measure.Watch", StillWatch)
    monkeypatch.setattr(StillWatch, "disturbances", ())
    return clock
