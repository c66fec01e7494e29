"""Run one callable in a background thread, while the caller waits for another process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self


class BackgroundTask:
    """One callable that runs once, from `start` to `join`, in a thread. A context manager, which joins it.

    Args:
        work: What to run; None runs nothing.
    """

    def __init__(self, work: Callable[[], None] | None = None) -> None:
        self._work = work
        self._pool: ThreadPoolExecutor | None = None
        self._future: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        if error is None:
            self.join()

    def start(self) -> None:
        """Start the callable, unless it was started before."""
        if self._work is not None and self._pool is None:
            self._pool = ThreadPoolExecutor(1, "background")
            self._future = self._pool.submit(self._work)

    def join(self) -> None:
        """Wait until the callable has ended; raise what it raised. Does nothing where it was never started."""
        if self._future is not None:
            self._future.result()
