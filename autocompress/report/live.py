"""Progress on a terminal while a search runs: one bar for the stage, one line for every result that matters."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from autocompress import quantities
from autocompress.errors import Stopped
from autocompress.runs.metric import Metric
from autocompress.runs.observer import Observer
from autocompress.runs.records import TrialRecord

# What asks a process to end; Windows has no SIGHUP.
_STOPPING = (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))


class LiveObserver(Observer):
    """Draw progress on a console (stderr); plain lines where it is no terminal. A context manager.

    Ctrl-C, SIGTERM and SIGHUP raise `Stopped` meanwhile. One that arrives where Python drops exceptions (finalizers,
    callbacks of weak references) is raised again at the next progress.

    Attributes:
        run: The run directory, once it is there.
    """

    def __init__(self, console: Console) -> None:
        self.run: Path | None = None
        self._console = console
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bars.add_task("Starting", total=None, text="")
        self._metric = Metric()
        self._stopped_by: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python allows handlers in the main thread alone; one that is not Python's own is None.
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            # What is ignored, as by nohup, stays so.
            for number in _STOPPING:
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._handlers[number] = signal.signal(number, self._stop)
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A process that reads data for this one, and has its handlers: it ends as any other.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._stopped_by = number
        raise Stopped(number)

    def _raise_if_interrupted(self) -> None:
        if self._stopped_by is not None:
            raise Stopped(self._stopped_by)

    def opened(self, run: Path) -> None:
        """See `Observer.opened`."""
        self.run = run
        self._say(f"Run directory: {run}")

    def stage(self, text: str) -> None:
        """See `Observer.stage`."""
        self._bars.remove_task(self._task)
        self._task = self._bars.add_task(text, total=None, text="")
        if not self._console.is_terminal:
            self._say(text)

    def progress(self, fraction: float, text: str = "") -> None:
        """See `Observer.progress`."""
        self._raise_if_interrupted()
        self._bars.update(self._task, total=1.0, completed=fraction, text=text)

    def baseline(self, record: TrialRecord) -> None:
        """See `Observer.baseline`."""
        self._metric = Metric(record.metric or self._metric.name)
        self._say(f"baseline {self._figures(record)}  {record.policy.dense_dtype}, uncompressed")

    def trial(self, record: TrialRecord) -> None:
        """See `Observer.trial`."""
        name = f"trial {record.number:>4}"
        if record.state == "failed":
            self._say(f"{name} failed: {record.error}")
        elif record.state == "rejected":
            seen = self._accuracy(record)
            self._say(f"{name} {seen}  {'':>9}  about  {record.policy.describe()} (not built: too far behind)")
        else:
            mark = " (fine-tuned)" if record.stage == "recovered" else ""
            self._say(f"{name} {self._figures(record)}  {record.policy.describe()}{mark}")

    def warn(self, text: str) -> None:
        """See `Observer.warn`."""
        self._say(f"Note: {text}")

    def _figures(self, record: TrialRecord) -> str:
        assert record.measurement is not None and record.accuracy is not None
        latency = quantities.format_ms(record.measurement.latency_ms)
        return f"{self._accuracy(record)}  {latency:>9}  {record.measurement.ratio:5.2f}x"

    def _accuracy(self, record: TrialRecord) -> str:
        return f"val. {self._metric.short} {self._metric.value(record.accuracy or 0.0):>7}"

    def _say(self, text: str) -> None:
        self._raise_if_interrupted()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
