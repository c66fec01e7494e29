"""Work done in a thread beside the caller's own, which is mostly waiting for another process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self


class BackgroundTask:
    """Something that runs once, from `start` to `join`. A context manager, which waits for it.

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
        """Start it, unless it was started before."""
        if self._work is not None and self._pool is None:
            self._pool = ThreadPoolExecutor(1, "background")
            self._future = self._pool.submit(self._work)

    def join(self) -> None:
        """Return when it has ended, or was never started; raises what it raised."""
        if self._future is not None:
            self._future.result()
