"""A progress bar on stderr for work that happens once, such as decoding a data set."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress

_QUIET_SECONDS = 2.0  # shorter work shows nothing


class Bar:
    """Progress of `total` units of work; appears only when it takes a while and goes when done."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._start = time.monotonic()
        self._progress: Progress | None = None

    def advance(self, amount: int) -> None:
        """Add finished units."""
        self._done += amount
        if self._progress is None and time.monotonic() - self._start > _QUIET_SECONDS:
            self._progress = Progress(console=Console(stderr=True), transient=True)
            self._progress.add_task(self._what, total=self._total)
            self._progress.start()
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=self._done)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
