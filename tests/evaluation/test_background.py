from __future__ import annotations

import threading

import pytest

from autocompress.evaluation.background import Aside


def test_it_runs_once_in_another_thread_and_is_waited_for() -> None:
    gate, ran = threading.Event(), []

    def work() -> None:
        gate.wait(10)
        ran.append(threading.current_thread())

    with Aside(work) as aside:
        aside.begin()
        aside.begin()
        assert not ran
        gate.set()
        aside.ended()
        assert len(ran) == 1 and ran[0] is not threading.current_thread()


def test_leaving_waits_too() -> None:
    ran = []
    with Aside(lambda: ran.append(1)) as aside:
        aside.begin()
    assert ran == [1]


def test_what_never_began_has_ended() -> None:
    ran = []
    with Aside(lambda: ran.append(1)) as aside:
        aside.ended()
    Aside().begin()
    Aside().ended()
    assert not ran


def test_what_it_raises_is_raised_where_it_is_waited_for() -> None:
    def fail() -> None:
        raise ZeroDivisionError("oops")

    with pytest.raises(ZeroDivisionError), Aside(fail) as aside:
        aside.begin()
    # The error in hand counts for more.
    with pytest.raises(KeyError), Aside(fail) as aside:
        aside.begin()
        raise KeyError("mine")
