from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from autocompress.report.live import LiveObserver
from autocompress.runs.observer import Observer
from autocompress.runs.records import TrialRecord


def everything(observer: Observer, record: TrialRecord, failed: TrialRecord) -> None:
    observer.opened(Path("runs/x"))
    observer.stage("Searching [1/2]")
    observer.progress(0.5, "5 trials")
    observer.baseline(record)
    observer.trial(record)
    observer.trial(failed)
    observer.warn("mind [this]")


@pytest.fixture
def records(make_record: Callable[..., TrialRecord]) -> tuple[TrialRecord, TrialRecord]:
    return make_record(3, stage="recovered"), TrialRecord(4, make_record().policy, "failed", error="BuildError: [x]")


def test_an_observer_need_not_do_anything(records: tuple[TrialRecord, TrialRecord]) -> None:
    everything(Observer(), *records)


def test_plain_lines_where_there_is_no_terminal(records: tuple[TrialRecord, TrialRecord]) -> None:
    text = io.StringIO()
    with LiveObserver(Console(file=text, width=40)) as observer:
        everything(observer, *records)
        assert observer.run == Path("runs/x")
    lines = text.getvalue().splitlines()
    assert lines[:2] == ["Run directory: runs/x", "Searching [1/2]"]
    assert lines[2].startswith("baseline") and "bf16, uncompressed" in lines[2]
    assert lines[3].startswith("trial    3 val. acc.  97.00%") and lines[3].endswith("(fine-tuned)")
    assert lines[4:] == ["trial    4 failed: BuildError: [x]", "Note: mind [this]"]


def test_a_terminal_gets_a_bar(records: tuple[TrialRecord, TrialRecord]) -> None:
    text = io.StringIO()
    with LiveObserver(Console(file=text, width=100, force_terminal=True)) as observer:
        everything(observer, *records)
        observer._bars.refresh()
    assert "━" in text.getvalue() and "5 trials" in text.getvalue() and "Searching [1/2]" in text.getvalue()
