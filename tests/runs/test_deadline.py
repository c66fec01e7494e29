"""Deadlines, and durations that no setting of a clock moves."""

from __future__ import annotations

import ast
import math
import time
from pathlib import Path

import pytest

from autocompress.runs import deadline as module
from autocompress.runs.deadline import Deadline, timestamp

PACKAGE = Path(__file__).parents[2] / "autocompress"


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    return clock


def test_what_is_left(now: list[float]) -> None:
    whole = Deadline.after(60, started=990)
    assert whole.left() == 50 and not whole.passed()
    assert whole.share(0.5).left() == 25
    assert whole.within(10).left() == 10 and whole.within(100) == whole
    assert whole.keeping(20).left() == 30
    now[0] = 1060
    assert whole.left() == 0 and whole.passed() and whole.share(0.5).passed()


def test_no_limit_is_none_after_any_of_it() -> None:
    never = Deadline.after(None)
    assert never.left() == never.share(0.5).left() == never.share(0).left() == never.keeping(9).left() == math.inf
    assert not never.finite and never.within(5).finite


def test_a_clock_that_is_set_moves_no_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    before, whole = timestamp(), Deadline.after(60)
    assert before == pytest.approx(time.time(), abs=60)
    for jump in (-1e6, 1e6):
        monkeypatch.setattr(module.time, "time", lambda jump=jump: 1.7e9 + jump)
        assert 0 <= timestamp() - before < 10
        assert 50 < whole.left() <= 60


def test_no_duration_is_taken_from_the_wall_clock() -> None:
    """Only `timestamp` reads it, once."""
    readers = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("time", "time_ns")
        and isinstance(node.value, ast.Name) and node.value.id == "time"
    }  # fmt: skip
    assert readers == {"runs/deadline.py"}
