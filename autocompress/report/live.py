"""Progress on a terminal while a search runs: one bar for the stage, one line for every result that matters."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from autocompress import quantities
from autocompress.runs.metric import Metric
from autocompress.runs.observer import Observer
from autocompress.runs.records import TrialRecord


class LiveObserver(Observer):
    """Draw progress on a console (stderr); plain lines where it is no terminal. A context manager.

    An interrupt that arrives where Python drops exceptions (finalizers, callbacks of weak references) is raised again
    at the next progress.

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
        self._interrupted = False
        self._handler: Any = None

    def __enter__(self) -> Self:
        # Python allows handlers in the main thread alone; one that is not Python's own is None.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not None:
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def _raise_if_interrupted(self) -> None:
        if self._interrupted:
            raise KeyboardInterrupt

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
