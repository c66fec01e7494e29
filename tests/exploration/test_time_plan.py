"""Seconds of a run, shared out: the end is kept back, and what there is is not shared out twice."""

from __future__ import annotations

import math
from typing import Any

import pytest

from autocompress.exploration.time_plan import TimePlan

SECONDS = {"export": 4.0, "build": 6.0, "verify": 2.0, "proxy": 3.0, "measure": 8.0}


def make(monkeypatch: pytest.MonkeyPatch, timeout: float | None, **changes: Any) -> TimePlan:
    monkeypatch.setattr("autocompress.exploration.time_plan.time.monotonic", lambda: 1030.0)
    values: dict[str, Any] = {"dtypes": 2, "compress": 2.0, "test_share": 1.0, "recovery_share": 0.65, "occasions": 3}
    return TimePlan.of(1000.0, timeout, SECONDS, **{**values, **changes})


@pytest.mark.parametrize("timeout", [120.0, 240.0, 600.0, 3600.0])
def test_stages_add_up_to_the_timeout(timeout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make(monkeypatch, timeout)
    tuning = plan.deadline - plan.candidates_until()
    assert 30 + plan.sensitivity + plan.candidates + tuning + plan.reserve == pytest.approx(timeout)
    assert plan.made < plan.sensitivity_until < plan.candidates_until() <= plan.deadline < 1000 + timeout
    assert f"Plan for {timeout:.0f} s" in plan.describe()


def test_a_candidate_takes_what_the_stations_of_one_dtype_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(monkeypatch, 600.0).candidate == pytest.approx(2.0 + 2 + 3 + 1 + 3 + 2)


def test_large_test_data_are_kept_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = make(monkeypatch, 600.0), make(monkeypatch, 600.0, test_share=20.0)
    assert large.reserve - small.reserve == pytest.approx(1.2 * 2 * 3.0 * 19)
    # However large they are, half of the time is left.
    assert make(monkeypatch, 600.0, test_share=1e4).reserve == 300


def test_a_short_run_still_has_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make(monkeypatch, 120.0)
    assert plan.candidates >= 0.69 * (plan.deadline - plan.made - plan.sensitivity)
    assert make(monkeypatch, 600.0, recovery_share=0.0).candidates_until() == make(monkeypatch, 600.0).deadline


def test_time_that_is_gone_leaves_nothing_to_share_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make(monkeypatch, 20.0)
    assert plan.sensitivity == plan.candidates == 0 and "about 0" in plan.describe()


def test_without_a_timeout_nothing_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make(monkeypatch, None)
    assert plan.deadline == plan.sensitivity_until == plan.candidates_until() == math.inf
    assert "No --timeout" in plan.describe()
