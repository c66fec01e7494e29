"""By when something must have ended, on the clock that nobody sets; and what time it is, on the same clock.

`time.time()` jumps when a clock is set, so no duration is taken from it: `time.monotonic()` alone counts seconds here.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

# The wall clock's lead over the monotonic one, taken once: whoever sets the clock later moves no interval.
_EPOCH_S = time.time() - time.monotonic()


def timestamp() -> float:
    """Return seconds since 1970 for a record; differences of two within one process are true durations."""
    return _EPOCH_S + time.monotonic()


@dataclass(frozen=True, order=True)
class Deadline:
    """A moment by which something must have ended. Handed down, and only ever made earlier on its way.

    Attributes:
        end: In seconds of `time.monotonic()`; infinite for no limit.
    """

    end: float = math.inf

    @classmethod
    def after(cls, seconds: float | None, started: float | None = None) -> Deadline:
        """Return the one so many seconds after `started` (now); None for no limit."""
        return cls() if seconds is None else cls((time.monotonic() if started is None else started) + seconds)

    @property
    def finite(self) -> bool:
        """Whether there is a limit at all."""
        return math.isfinite(self.end)

    def left(self) -> float:
        """Return the seconds until then, at least 0."""
        return max(0.0, self.end - time.monotonic())

    def passed(self) -> bool:
        """Return whether nothing is left."""
        return self.left() <= 0

    def within(self, seconds: float) -> Deadline:
        """Return the earlier of this one and the one `seconds` from now."""
        return min(self, Deadline(time.monotonic() + seconds))

    def share(self, fraction: float) -> Deadline:
        """Return the one at this fraction of what is left: the rest is for what comes after."""
        return self.within(fraction * self.left()) if self.finite else self

    def keeping(self, reserve_s: float) -> Deadline:
        """Return the one that leaves so many seconds before this one."""
        return Deadline(self.end - reserve_s)
