"""A clock that goes only when a fake runner runs, so that what a protocol does can be told to the call."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Self

from autocompress.engines.base import Array, Runner
from autocompress.measurement.noise import Disturbance


class Clock:
    """Time as seen by the thread that asks; each stream has a processor of its own."""

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def ns(self) -> int:
        return int(getattr(self._local, "ns", 0))

    @ns.setter
    def ns(self, value: int) -> None:
        self._local.ns = value

    def perf_counter_ns(self) -> int:
        return self.ns

    def perf_counter(self) -> float:
        return self.ns / 1e9


class FakeRunner(Runner):
    """Takes ``cost(now in s)`` ms a run."""

    def __init__(
        self, clock: Clock, cost: Callable[[float], float], log: list[str] | None = None, name: str = ""
    ) -> None:
        self.clock, self.cost, self.log, self.name = clock, cost, [] if log is None else log, name
        self.prepared = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def infer(self, inputs: Array) -> Array:
        return inputs

    def prepare(self, inputs: Array) -> None:
        self.prepared += 1

    def run(self) -> None:
        assert not gc.isenabled()
        self.log.append(self.name)
        self.clock.ns += int(self.cost(self.clock.ns / 1e9) * 1e6)


class StillWatch:
    """A machine on which nothing else happens, but for what a test puts into `disturbances`."""

    disturbances: tuple[Disturbance, ...] = ()

    def __init__(self, threads: int, cpus: Collection[int] | None = None) -> None:
        self.threads = threads

    def look(self) -> None:
        pass

    def found(self) -> list[Disturbance]:
        return list(type(self).disturbances)
