"""Calls of the user's code: what went wrong in one, in a sentence; which one has not returned; and its end in time.

A call that raises becomes a `TaskError` that names the method, what it was at, the user's line and the stage. One that
does not return is named after half a minute, with the line it is at, and ended where the run's time is over.
"""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

import autocompress
from autocompress.errors import AutoCompressError, TaskError
from autocompress.runs.observer import Observer

# Seconds after which a call that has not returned is named; after three times as long again.
_NAMED_S, _AGAIN = 30.0, 3.0
# A call is ended where the run's time is over and it has taken so long: this share of the run's time, and at most so
# many seconds; a method that took long before has three times that.
_SHARE, _MOST_S, _AS_BEFORE = 0.25, 60.0, 3.0
# Reading ends where the run has taken so many times its time and a minute, though no single batch hangs.
_OVERRUN = 0.5
# Seconds between two looks at what runs.
_LOOK_S = 1.0
# Characters of an exception's own text.
_WORDS = 300
# Windows has none: a call that hangs is named there, not ended.
_SIGNAL: signal.Signals | None = getattr(signal, "SIGALRM", None)
_PACKAGE = f"{Path(autocompress.__file__).parent}{os.sep}"
# What is not the user's own: this package, what was installed, and Python itself.
_FOREIGN = (_PACKAGE, "site-packages", "dist-packages", str(Path(threading.__file__).parent), "<frozen")
_WORKER_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


class _TimeIsUp(BaseException):
    """Raised in a call that hangs. No `Exception`, so that the user's own ``except`` does not keep it."""


@dataclass
class _Call:
    method: str
    begun: float
    named_after: float = _NAMED_S


@dataclass
class UserCalls:
    """The calls of one task's methods during one command.

    Attributes:
        where: Who is meant in messages: ``"Task 'mine'"``.
        on_message: Called with what the user should know; also from another thread.
        stage: What the command is doing: ``"Searching"``; see `followed`.
        until: `time.monotonic()` when the command should have ended.
        seconds: How long the whole command may take.
        leaves_out: Whether calibration and training samples with NaN are left out. A check before the command wants to
            see them.
    """

    where: str = "Task"
    on_message: Callable[[str], None] = lambda text: None
    stage: str = ""
    until: float = math.inf
    seconds: float = math.inf
    leaves_out: bool = False
    _running: dict[int, list[_Call]] = field(default_factory=dict)
    _longest: dict[str, float] = field(default_factory=dict)
    _said: set[tuple[str, str]] = field(default_factory=set)

    def limit(self, started: float, seconds: float | None) -> None:
        """Have calls know when the command should have ended; None for no limit."""
        if seconds is not None:
            self.until, self.seconds = started + seconds, seconds

    def followed(self, observer: Observer) -> Observer:
        """Return an observer that tells these calls of every stage and passes everything on."""
        return cast(Observer, _Following(observer, self))

    def say_once(self, method: str, kind: str, text: str) -> None:
        """Tell the user, unless this kind of fault of the method was told before."""
        if (method, kind) not in self._said:
            self._said.add((method, kind))
            self.on_message(f"{self.where}: {text}")

    # -- one call -----------------------------------------------------------------------------------------------------

    @contextmanager
    def calling(self, method: str, at: str = "", mend: str = "") -> Iterator[None]:
        """Run the user's code; whatever it raises names the method.

        Args:
            method: As the user wrote it: ``"validation"``.
            at: What it was asked for, or how far it had come: ``" after 64 samples"``.
            mend: What to do, a sentence.

        Raises:
            TaskError: It raised, ended the process, or took longer than the run may. Errors of this package pass.
        """
        call = _Call(method, time.monotonic())
        running = self._running.setdefault(threading.get_ident(), [])
        running.append(call)
        try:
            yield
        except _TimeIsUp:
            raise TaskError(
                f"{self.where}: {method}(){at} had not returned after {time.monotonic() - call.begun:.0f} s"
                f"{self._during()}, and the {self.seconds:.0f} s of the run are over; it was ended. Find what it waits "
                "for (a lock, a download, a worker of a DataLoader), or give it more --timeout."
            ) from None
        except AutoCompressError:
            raise
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and _is_own(error):
                raise
            raise TaskError(self._what(method, at, error, mend)) from error
        finally:
            running.remove(call)
            self._longest[method] = max(self._longest.get(method, 0.0), time.monotonic() - call.begun)

    def refuse(self, method: str, what: str, mend: str) -> NoReturn:
        """Raise an error about what a method gave.

        Raises:
            TaskError: Always.
        """
        raise TaskError(f"{self.where}: {method}() {what}{self._during()}. {mend}")

    def check_time(self, method: str, count: int) -> None:
        """End reading where the run has taken far longer than it may.

        Raises:
            TaskError: It has.
        """
        if time.monotonic() > self.until + _MOST_S + _OVERRUN * self.seconds:
            raise TaskError(
                f"{self.where}: {method}() had given {count} samples when the run had taken {_OVERRUN:.0%} more than "
                f"its {self.seconds:.0f} s{self._during()}; reading was ended. Give it more --timeout or fewer samples."
            )

    def _what(self, method: str, at: str, error: BaseException, mend: str) -> str:
        kind, text, line = _told(error)
        if isinstance(error, MemoryError):
            mend = "There was not enough memory: give smaller batches than asked for, or read samples as they are due."
        if isinstance(error, SystemExit):
            mend = "Leave sys.exit out of what a task calls, and raise an exception that says what is wrong."
        said = f"{kind}: {text}" if text else kind
        return f"{self.where}: {method}(){at} raised {said}{line}{self._during()}. {mend}".rstrip()

    def _during(self) -> str:
        return f", during {self.stage!r}" if self.stage else ""

    # -- calls that do not return -------------------------------------------------------------------------------------

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at running calls during the block: name those that take long, end those that the run has no time for.

        Only the main thread's can be ended, and only where Python runs: a runtime's own loop has to come back first.
        """
        ended, before = threading.Event(), None
        if _SIGNAL is not None and threading.current_thread() is threading.main_thread():
            free = signal.getsignal(_SIGNAL) is signal.SIG_DFL
            before = signal.signal(_SIGNAL, self._on_signal) if free else None
        watch = threading.Thread(target=self._watch, args=(ended, before is not None), name="user-calls", daemon=True)
        watch.start()
        try:
            yield
        finally:
            ended.set()
            watch.join()
            if _SIGNAL is not None and before is not None:
                signal.signal(_SIGNAL, before)

    def _watch(self, ended: threading.Event, ends: bool) -> None:
        main = threading.main_thread().ident
        while not ended.wait(_LOOK_S):
            now = time.monotonic()
            for thread, calls in list(self._running.items()):
                call = calls[-1] if calls else None
                if call is None:
                    continue
                if now - call.begun > call.named_after:
                    call.named_after *= _AGAIN
                    # An observer that stops a run does so in its own thread.
                    with suppress(BaseException):
                        self._name(call, thread, now)
                if _SIGNAL is not None and ends and thread == main and self._is_over(call, now):
                    signal.pthread_kill(thread, _SIGNAL)

    def _name(self, call: _Call, thread: int, now: float) -> None:
        line = _line_of(sys._current_frames().get(thread))
        self.on_message(
            f"{self.where}: {call.method}() has been running for {now - call.begun:.0f} s{line}{self._during()}"
        )

    def _is_over(self, call: _Call, now: float) -> bool:
        patience = max(min(_SHARE * self.seconds, _MOST_S), _AS_BEFORE * self._longest.get(call.method, 0.0))
        return now > self.until and now - call.begun > patience

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        calls = self._running.get(threading.get_ident())
        # It may have returned since.
        if calls and self._is_over(calls[-1], time.monotonic()):
            raise _TimeIsUp


class _Following:
    """Passes everything on to an observer, and stages to calls as well. No `Observer`, whose methods would hide it."""

    def __init__(self, observer: Observer, calls: UserCalls) -> None:
        self._observer, self._calls = observer, calls

    def stage(self, text: str) -> None:
        self._calls.stage = text
        self._observer.stage(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._observer, name)


def _told(error: BaseException) -> tuple[str, str, str]:
    """Return an exception's class, its text in a line, and where the user's code raised it."""
    kind, text = type(error).__name__, str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if "Original Traceback" in text and lines:
        # A worker of a DataLoader tells its exception as text: the last line is it.
        places = [m for m in _WORKER_LINE.finditer(text) if not _is_foreign(m["file"])]
        place = f" ({Path(places[-1]['file']).name}, line {places[-1]['line']})" if places else ""
        return "in a DataLoader's worker", lines[-1][:_WORDS], place
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_foreign(frame.filename)]
    # A task that is installed has no file of its own by this rule.
    chosen = own or [frame for frame in frames if not frame.filename.startswith(_PACKAGE)]
    place = f" ({Path(chosen[-1].filename).name}, line {chosen[-1].lineno})" if chosen else ""
    return kind, " ".join(lines)[:_WORDS], place


def _is_foreign(file: str) -> bool:
    return any(part in file for part in _FOREIGN)


def _is_own(error: BaseException) -> bool:
    """Whether this package raised it, as for a signal that arrived meanwhile."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(_PACKAGE)


def _line_of(frame: FrameType | None) -> str:
    """Return ``" (at my_task.py, line 42)"``: the innermost line of the user's."""
    while frame is not None and _is_foreign(frame.f_code.co_filename):
        frame = frame.f_back
    return f" (at {Path(frame.f_code.co_filename).name}, line {frame.f_lineno})" if frame is not None else ""
