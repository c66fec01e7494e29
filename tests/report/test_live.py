"""An interrupt is never lost, wherever it arrives."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable

import pytest
from rich.console import Console

from autocompress.errors import Stopped
from autocompress.report.live import LiveObserver


class Dying:
    """Is interrupted in its finalizer, where Python drops what is raised."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def observer() -> LiveObserver:
    return LiveObserver(Console(file=io.StringIO()))


@pytest.mark.parametrize("then", [lambda o: o.progress(0.5), lambda o: o.stage("Next"), lambda o: o.warn("this")])
def test_a_dropped_interrupt_is_raised_at_the_next_progress(
    then: Callable[[LiveObserver], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: dropped.append(found.exc_type))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), observer() as live:
        live.progress(0.1)
        Dying()
        assert dropped == [Stopped]
        then(live)
    assert signal.getsignal(signal.SIGINT) == before


def test_an_interrupt_is_raised_where_it_arrives() -> None:
    with pytest.raises(KeyboardInterrupt), observer():
        signal.raise_signal(signal.SIGINT)
