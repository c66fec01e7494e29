"""What times one engine: a call after the other (`LatencyTimer`), or several streams side by side (`ThroughputTimer`).

A timer fills slices of a round; which engine's slice follows which is `measurement.measure`'s. It takes opened Runners.
"""

from __future__ import annotations

import abc
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np

from autocompress.engines.base import Array, Runner
from autocompress.errors import AutoCompressError, BuildError
from autocompress.measurement.protocol import WARM_UP_PATIENCE, Protocol
from autocompress.measurement.statistics import Samples

Clock = Callable[[], int]
# After a switch between engines the caches hold the other's weights: this many iterations, or this long, go untimed,
# and where the first was slower, more until four in a row are no faster (VGG-11 among six opened engines: 5.4 ms at
# first, 3.1 ms after ten calls; with two in a row, a file was 1.4 % faster than itself).
_SETTLE_ITERATIONS = 3
_SETTLE_NS = 10_000_000
_SETTLE_MOST, _SETTLE_LONGEST_NS = 40, 150_000_000
_FASTER, _IN = 0.99, 4
# The warm-up is looked at in windows of a quarter of its least time; it has settled when this many in a row agree.
_WINDOWS = 4
_AGREEING = 3
_AGREEMENT = 0.02


@dataclass(frozen=True)
class Slice:
    """One engine's share of a round.

    Attributes:
        samples: Latency of every call in ms, ``(n,)``, of all streams.
        value: What rounds are compared by, in ms: the median latency of a call, or the time per sample of all streams.
        seconds: How long it was timed.
        energy_j: Energy the device used meanwhile; None where it does not tell.
    """

    samples: Samples
    value: float
    seconds: float
    energy_j: float | None = None


class Timer(abc.ABC):
    """One engine to be timed. A context manager around whatever it needs beside its runners.

    Attributes:
        name: Of the engine, for errors.
        instances: How often it is open, to be timed in turns.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._calls = 0
        self.instances = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(  # noqa: B027 - most need nothing.
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the runners open; they are the caller's."""

    @abc.abstractmethod
    def prepare(self, inputs: Array) -> None:
        """Bind inputs ``(batch_size, ...)``."""

    def turn(self, number: int) -> None:  # noqa: B027 - most have one instance.
        """Take the instance whose turn it is in round `number`."""

    @abc.abstractmethod
    def settle(self, *, switched: bool = True) -> None:
        """Run untimed after another engine ran, or, when none was `switched` to, after a pause."""

    @abc.abstractmethod
    def time(self, seconds: float, least: int) -> Slice:
        """Time calls for `seconds`, and at least `least` of them in each stream."""

    @abc.abstractmethod
    def joined(self, pieces: Sequence[Slice]) -> float:
        """Return the value of one slice made of these."""

    def warm_up(self, protocol: Protocol) -> bool:
        """Run untimed until the median settles; return whether it did within the protocol's time."""
        self.settle()
        if protocol.warm_up_s == 0:
            return True
        window = protocol.warm_up_s / _WINDOWS
        medians: list[float] = []
        spent = 0.0
        while True:
            piece = self.time(window, 1)
            medians.append(piece.value)
            spent += piece.seconds
            last = medians[-_AGREEING:]
            agree = len(last) == _AGREEING and max(last) <= min(last) * (1 + _AGREEMENT)
            if spent >= protocol.warm_up_s and agree:
                return True
            if spent >= WARM_UP_PATIENCE * protocol.warm_up_s:
                # Of calls so long that there were no three windows, nothing can be said.
                return len(last) < _AGREEING

    def _guarded(self, call: Callable[[], None]) -> None:
        """Do what may meet the device's end.

        Raises:
            BuildError: The runtime raised something.
        """
        try:
            call()
        except AutoCompressError:
            raise
        except Exception as error:  # whatever a foreign runtime raises when its device is gone
            words = " ".join(str(error).split()) or "no message"
            raise BuildError(
                f"{self.name} stopped running while it was timed, after {self._calls} calls: "
                f"{type(error).__name__}: {words} Its device may have gone, been reset, or be out of memory; see that "
                "it is there (autocompress devices), then repeat the command."
            ) from error


class LatencyTimer(Timer):
    """Times one runner, a call after the other; where an engine is open more than once, the one whose turn it is.

    Args:
        runners: Opened, of one engine file.
        name: Of the engine, for errors.
        fresh: Inputs ``(batch_size, ...)`` of which each call gets the next, as a request brings its own; empty to run
            what `prepare` bound throughout.
    """

    def __init__(self, runners: Sequence[Runner], name: str, fresh: Sequence[Array] = ()) -> None:
        super().__init__(name)
        self._runners, self._runner = runners, runners[0]
        self._fresh, self._next = fresh, 0
        self.instances = len(runners)

    def turn(self, number: int) -> None:
        """Take the next instance."""
        self._runner = self._runners[number % self.instances]

    def prepare(self, inputs: Array) -> None:
        """Bind inputs to every instance."""
        for runner in self._runners:
            self._guarded(lambda runner=runner: runner.prepare(inputs))  # type: ignore[misc]

    def warm_up(self, protocol: Protocol) -> bool:
        """Run every instance untimed until its median settles.

        The first one warms the machine; the others, only their own memory, share about as much time again. When each
        took as long as the first, half of measuring a small network was warming up.
        """
        settled = []
        for number in range(self.instances):
            self.turn(number)
            share = 1 if number == 0 else self.instances
            settled.append(super().warm_up(replace(protocol, warm_up_s=protocol.warm_up_s / share)))
        return all(settled)

    def settle(self, *, switched: bool = True) -> None:
        """Run a few times, or once when one call is long; after a switch until calls get no faster."""
        self._guarded(lambda: _settle(self._runner.run, _SETTLE_MOST if switched else _SETTLE_ITERATIONS))

    def time(self, seconds: float, least: int) -> Slice:
        """Time calls; the slice's value is their median."""
        took: list[int] = []

        def fill() -> None:
            try:
                _fill(took, self._time_fresh if self._fresh else self._runner.time_run, int(seconds * 1e9), least)
            finally:
                self._calls += len(took)

        self._guarded(fill)
        samples = _milliseconds(took)
        return Slice(samples, float(np.median(samples)), sum(took) / 1e9)

    def _time_fresh(self, clock: Clock) -> int:
        self._next = (self._next + 1) % len(self._fresh)
        return self._runner.time_request(self._fresh[self._next], clock)

    def joined(self, pieces: Sequence[Slice]) -> float:
        """Return the median of all calls: the mean of two medians of half as many is larger, calls being skewed."""
        return float(np.median(np.concatenate([piece.samples for piece in pieces])))


class ThroughputTimer(Timer):
    """Times several runners of one engine file side by side, each in a thread of its own."""

    def __init__(self, runners: Sequence[Runner], name: str) -> None:
        super().__init__(name)
        self._runners = runners
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        """Start the threads, which inherit the processors that the calling one may use."""
        self._pool = ThreadPoolExecutor(len(self._runners))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def prepare(self, inputs: Array) -> None:
        """Bind inputs to every runner."""
        self._batch_size = len(inputs)
        for runner in self._runners:
            self._guarded(lambda runner=runner: runner.prepare(inputs))  # type: ignore[misc]

    def settle(self, *, switched: bool = True) -> None:
        """Run all streams for a moment."""
        self._side_by_side(_SETTLE_NS, 1)

    def time(self, seconds: float, least: int) -> Slice:
        """Time calls; the slice's value is the time in ms in which one sample comes out of any stream."""
        streams = self._side_by_side(int(seconds * 1e9), least)
        self._calls += sum(len(took) for took in streams)
        # Streams end at different moments: each has its own rate over its own time.
        rate = sum(len(took) / sum(took) for took in streams)
        seconds = max(sum(took) for took in streams) / 1e9
        samples = _milliseconds([ns for took in streams for ns in took])
        return Slice(samples, 1 / (rate * self._batch_size * 1e6), seconds)

    def joined(self, pieces: Sequence[Slice]) -> float:
        """Return the time of a sample at the mean rate."""
        return len(pieces) / sum(1 / piece.value for piece in pieces)

    def _side_by_side(self, budget: int, least: int) -> list[list[int]]:
        streams = _Streams(len(self._runners))
        if self._pool is None:
            raise BuildError(f"{self.name}: the timer is not open; use it as a context manager.")
        # Drained before anything is raised, so that no stream of this slice runs into the next.
        futures = [self._pool.submit(streams.run, runner.run, budget, least) for runner in self._runners]
        errors = [future.exception() for future in futures]
        failed = [e for e in errors if e is not None and not isinstance(e, threading.BrokenBarrierError)]
        if failed:
            self._guarded(lambda: _raise(failed[0]))
        return [future.result() for future in futures]


class _Streams:
    """The streams of one slice: they start together, and all stay busy until the last has its share."""

    def __init__(self, count: int) -> None:
        self._start = threading.Barrier(count)
        self._left = count
        self._lock = threading.Lock()

    def run(self, run: Callable[[], None], budget: int, least: int) -> list[int]:
        try:
            self._start.wait()
            took: list[int] = []
            _fill(took, partial(_timed, run), budget, least)
            with self._lock:
                self._left -= 1
            while self._left > 0:
                run()
            return took
        except BaseException:
            self._left = 0
            self._start.abort()
            raise


def _settle(run: Callable[[], None], most: int) -> None:
    clock = time.perf_counter_ns
    start = now = clock()
    took: list[int] = []
    while len(took) < most and now - start < _SETTLE_LONGEST_NS:
        run()
        before, now = now, clock()
        took.append(now - before)
        if len(took) < _SETTLE_ITERATIONS and now - start < _SETTLE_NS:
            continue
        if min(took) >= _FASTER * took[0] or (len(took) > _IN and min(took[-_IN:]) >= _FASTER * min(took[:-_IN])):
            return


def _timed(run: Callable[[], None], clock: Clock) -> int:
    """Return the ns of one call."""
    begin = clock()
    run()
    return clock() - begin


def _fill(took: list[int], time_run: Callable[[Clock], int], budget: int, least: int) -> None:
    """Append the ns of each call until `budget` ns have passed, and at least `least` of them."""
    clock = time.perf_counter_ns
    start = clock()
    while True:
        took.append(time_run(clock))
        if clock() - start >= budget and len(took) >= least:
            return


def _milliseconds(took: Sequence[int]) -> Samples:
    return (np.asarray(took, dtype=np.float64) / 1e6).astype(np.float32)


def _raise(error: BaseException) -> None:
    raise error
