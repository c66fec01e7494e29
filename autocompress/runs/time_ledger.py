"""Where a run's seconds went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class TimeLedger:
    """Wall time by activity; activities do not nest."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def charge(self, activity: str) -> Iterator[None]:
        """Charge the block to `activity`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(activity, time.monotonic() - start)

    def add(self, activity: str, seconds: float) -> None:
        """Charge seconds measured elsewhere."""
        self.seconds[activity] = self.seconds.get(activity, 0.0) + seconds

    def merge(self, other: TimeLedger) -> None:
        """Take over another ledger's seconds."""
        for activity, seconds in other.seconds.items():
            self.add(activity, seconds)

    def copy(self) -> TimeLedger:
        """Return one with the same seconds."""
        copied = TimeLedger()
        copied.merge(self)
        return copied

    def since(self, before: TimeLedger) -> TimeLedger:
        """Return what was added after `before` was all there was."""
        added = TimeLedger()
        for activity, seconds in self.seconds.items():
            added.add(activity, seconds - before.seconds.get(activity, 0.0))
        return added
