from __future__ import annotations

import threading

import pytest

from autocompress.evaluation.background import BackgroundTask


def test_it_runs_once_in_another_thread_and_is_waited_for() -> None:
    gate, ran = threading.Event(), []

    def work() -> None:
        gate.wait(10)
        ran.append(threading.current_thread())

    with BackgroundTask(work) as background:
        background.start()
        background.start()
        assert not ran
        gate.set()
        background.join()
        assert len(ran) == 1 and ran[0] is not threading.current_thread()


def test_leaving_waits_too() -> None:
    ran = []
    with BackgroundTask(lambda: ran.append(1)) as background:
        background.start()
    assert ran == [1]


def test_what_never_began_has_ended() -> None:
    ran = []
    with BackgroundTask(lambda: ran.append(1)) as background:
        background.join()
    BackgroundTask().start()
    BackgroundTask().join()
    assert not ran


def test_what_it_raises_is_raised_where_it_is_waited_for() -> None:
    def fail() -> None:
        raise ZeroDivisionError("oops")

    with pytest.raises(ZeroDivisionError), BackgroundTask(fail) as background:
        background.start()
    # The error in hand counts for more.
    with pytest.raises(KeyError), BackgroundTask(fail) as background:
        background.start()
        raise KeyError("mine")
