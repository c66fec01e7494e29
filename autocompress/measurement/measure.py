"""The one timing protocol, the same for every engine.

Runners are warmed up until their median settles, then timed in rounds A B A, A B A …: the baseline's share of a round
lies half before and half after the candidates', so that drift of the clock and of neighbours falls on all alike, and
the ratio of a candidate to the baseline is known far better than either latency. The baseline's two halves against each
other are an A/A measurement from the same moments: what they differ by is noise. It takes opened Runners, never an
engine's name; pinning is the caller's (`measurement.child`).
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autocompress.engines.base import Array, Runner
from autocompress.errors import ConfigError
from autocompress.measurement.energy import EnergyMeter, per_call_mj
from autocompress.measurement.gpu_noise import GpuWatch
from autocompress.measurement.noise import Disturbance, Watch
from autocompress.measurement.nvml import Gpu
from autocompress.measurement.protocol import DISTURBED, LATENCY, WARM_UP_PATIENCE, Protocol
from autocompress.measurement.statistics import (
    Samples,
    drift,
    half_width,
    levelled,
    mad,
    median_interval,
    ratio_interval,
)
from autocompress.measurement.timers import LatencyTimer, Slice, ThroughputTimer, Timer
from autocompress.runs.records import Measurement

__all__ = ["Protocol", "measure", "measure_timers"]

# A trend of the rounds' medians beyond this makes one median say too little of the device.
_DRIFT = 0.03
# What is done between two slices of one engine evicts little, but a call this short feels it (a file against itself:
# 0.2 % slower as the baseline).
_SHORT_MS = 3.0
# How long to wait for what disturbs to go, before looking again.
_PAUSE_S = 0.03
# Judging takes milliseconds in which caches cool.
_JUDGED_EVERY = 5
# Rounds beyond the protocol's least, at most. `max_seconds` counts timed calls alone: of rounds as short as one call of
# 10 µs it held 100,000, each with its settling and judged at a cost that grows with the square of their number. A
# network that did not settle was then measured for minutes, until the client's deadline. The standard protocol's own
# rounds are longer than this asks for.
_MORE_ROUNDS = 60


@dataclass(frozen=True)
class Taken:
    """One engine on one occasion.

    Attributes:
        measurement: As `measure` gives it.
        samples: Latency of every call in ms, ``(n,)``.
        rounds: Median latency of each round in ms, ``(rounds,)``; those of other engines are of the same moments.
    """

    measurement: Measurement
    samples: Samples
    rounds: NDArray[np.float64]


def measure(
    runners: Sequence[Runner | Sequence[Runner]],
    inputs: Sequence[Array],
    protocol: Protocol | None = None,
    *,
    threads: int = 1,
    names: Sequence[str] | None = None,
    meter: EnergyMeter | None = None,
    gpu: Gpu | None = None,
) -> list[tuple[Measurement, Samples]]:
    """Time opened runners against the first one, the baseline.

    Args:
        runners: One for each engine, or as many as it is open: in latency mode they are timed in turns, in throughput
            mode side by side, as streams.
        inputs: One array ``(batch_size, ...)`` for each engine.
        protocol: How long, and in which mode; None for the standard one.
        threads: Threads of one call; recorded, not set.
        names: Of the engines, for errors.
        meter: What reads the energy; None reads that of the processor.
        gpu: What the engines run on, to be watched; None for the processor.

    Returns:
        For each engine the measurement and its samples ``(n,)`` in ms, in the order they were taken. The baseline's
        ratio is 1; its `noisy` is about its own latency.

    Raises:
        ConfigError: No runners, or not one input for each.
        BuildError: An engine stopped running; its device may be gone.
    """
    if not runners or len(runners) != len(inputs):
        raise ConfigError(f"measure() needs one input per runner, not {len(inputs)} for {len(runners)}.")
    protocol = protocol or Protocol()
    names = names or [f"Engine {number} of {len(runners)}" for number in range(1, len(runners) + 1)]
    made = [_timer(runner, name, protocol) for runner, name in zip(runners, names, strict=True)]
    streams = 1 if isinstance(runners[0], Runner) or protocol.mode == LATENCY else len(runners[0])
    with ExitStack() as stack:
        stack.enter_context(no_garbage_collection())
        timers = [stack.enter_context(timer) for timer in made]
        session = _Session(timers, protocol, lambda: Watch(threads * streams), meter, gpu)
        session.warm_up(inputs)
        session.run()
    return session.results([len(array) for array in inputs], threads, streams)


def measure_timers(
    timers: Sequence[Timer],
    inputs: Sequence[Array],
    protocol: Protocol,
    *,
    threads: int,
    watch: Callable[[], Watch],
    load: AbstractContextManager[object] | None = None,
) -> tuple[list[Taken], list[Taken]]:
    """Time engines wherever they are, one occasion: quiet, and then beside a load.

    Args:
        timers: One for each engine, the baseline's first.
        inputs: One array ``(batch_size, ...)`` for each engine.
        protocol: Of one occasion.
        threads: Threads of one call; recorded, not set.
        watch: Makes what watches the machine.
        load: Keeps a neighbouring processor busy while it is open; None measures the quiet machine alone.

    Returns:
        One for each engine, quiet and beside the load (empty without one).
    """
    sizes = [len(array) for array in inputs]
    quiet = _Session(timers, protocol, watch)
    quiet.warm_up(inputs)
    quiet.run()
    found = quiet.taken(sizes, threads)
    if load is None:
        return found, []
    with load:
        beside = _Session(timers, protocol.loaded(), watch)
        beside.run()
    return found, beside.taken(sizes, threads)


def _timer(runner: Runner | Sequence[Runner], name: str, protocol: Protocol) -> Timer:
    if protocol.mode == LATENCY:
        return LatencyTimer([runner] if isinstance(runner, Runner) else runner, name)
    if isinstance(runner, Runner):
        raise ConfigError(f"Mode {protocol.mode!r} takes a list of runners per engine.")
    return ThroughputTimer(runner, name)


class _Session:
    """One interleaved run: its rounds, and what they say. Engine 0 is the baseline."""

    def __init__(
        self,
        timers: Sequence[Timer],
        protocol: Protocol,
        watch: Callable[[], Watch],
        meter: EnergyMeter | None = None,
        gpu: Gpu | None = None,
    ) -> None:
        self._timers, self._protocol, self._meter = timers, protocol, meter or EnergyMeter()
        self._begin_watch = watch
        self._gpu = None if gpu is None else GpuWatch(gpu)
        # Of each engine; the baseline has two slices a round, before and after the candidates' one each.
        self._slices: list[list[Slice]] = [[] for _ in timers]
        self._unsettled: list[bool] = []
        self._last: Timer | None = None
        self._patience = protocol.patience_s if protocol.usual_ms else 0.0

    # -- taking -------------------------------------------------------------------------------------------------

    def warm_up(self, inputs: Sequence[Array]) -> None:
        """Bind inputs and run until medians settle."""
        for timer, array in zip(self._timers, inputs, strict=True):
            timer.prepare(array)
            self._unsettled.append(not timer.warm_up(self._protocol))

    def run(self) -> None:
        """Take rounds until the protocol is met and nothing disturbs, or its time is up."""
        self._watch = self._begin_watch()
        protocol = self._protocol
        share = protocol.min_seconds / protocol.rounds
        # So long that `_MORE_ROUNDS` of them use up the time.
        longer = max(share, (protocol.max_seconds - protocol.min_seconds) / _MORE_ROUNDS)
        least = -(-protocol.min_iterations // protocol.rounds)
        for number in range(protocol.rounds + _MORE_ROUNDS):
            while not self._round(number, share if number < protocol.rounds else longer, least):
                time.sleep(_PAUSE_S)
            more = number + 1 - protocol.rounds
            if more < 0:
                continue
            spent = min(sum(piece.seconds for piece in slices) for slices in self._slices)
            if spent >= protocol.max_seconds or (more % _JUDGED_EVERY == 0 and not self._disturbed()):
                return

    def _round(self, number: int, share: float, least: int) -> bool:
        """Take a round; when the baseline was disturbed in it, and there is patience, leave it out and return False."""
        known = [len(pieces) for pieces in self._slices]
        for timer in self._timers:
            timer.turn(number)
        # Another instance has other weights.
        if any(timer.instances > 1 for timer in self._timers):
            self._last = None
        self._watch.look()
        if self._gpu is not None:
            self._gpu.look()
        self._take(0, share / 2, -(-least // 2))
        if not self._slowed():
            for index in _order(len(self._timers) - 1, number):
                self._take(index + 1, share, least)
            self._take(0, share / 2, max(1, least // 2))
            if not self._slowed():
                return True
        self._patience -= _PAUSE_S
        for pieces, count in zip(self._slices, known, strict=True):
            self._patience -= sum(piece.seconds for piece in pieces[count:])
            del pieces[count:]
        return False

    def _slowed(self) -> bool:
        """Whether the baseline's last slice was disturbed, and there is patience to wait."""
        return self._patience > 0 and self._slices[0][-1].value > DISTURBED * self._protocol.usual_ms

    def _take(self, index: int, seconds: float, least: int) -> None:
        timer = self._timers[index]
        pieces = self._slices[index]
        switched = timer is not self._last or not pieces
        if switched or pieces[-1].value < _SHORT_MS:
            timer.settle(switched=switched)
        self._last = timer
        before = self._meter.read()
        taken = timer.time(seconds, least)
        after = self._meter.read()
        used = None if before is None or after is None else after - before
        pieces.append(replace(taken, energy_j=used))

    # -- judging ------------------------------------------------------------------------------------------------

    def _values(self, index: int) -> list[float]:
        """Return what each round says of an engine, in ms, its instances brought to one level."""
        return [value * factor for value, factor in zip(self._taken(index), self._factors(index), strict=True)]

    def _taken(self, index: int) -> list[float]:
        pieces = self._slices[index]
        if index > 0:
            return [piece.value for piece in pieces]
        return [self._timers[0].joined(halves) for halves in zip(pieces[::2], pieces[1::2], strict=True)]

    def _factors(self, index: int) -> list[float]:
        return levelled(self._taken(index), self._timers[index].instances)

    def _ratio(self, index: int) -> tuple[float, float, float]:
        ratios = [a / b for a, b in zip(self._values(index), self._values(0), strict=True)]
        return ratio_interval(ratios, self._protocol.seed)

    def _against_itself(self) -> tuple[float, float, float]:
        """Return the baseline's halves' ratio, each half the candidate in turn so that drift cancels."""
        values = [piece.value for piece in self._slices[0]]
        halves = zip(values[::2], values[1::2], strict=True)
        ratios = [b / a if number % 2 else a / b for number, (a, b) in enumerate(halves)]
        return ratio_interval(ratios, self._protocol.seed)

    def _disturbed(self) -> bool:
        """Return whether longer measuring helps: a ratio (or the only latency) scatters, drifts, or is off for A/A.

        A program beside us that leaves the figures alone will not be outwaited; it is only told of.
        """
        judged = range(1, len(self._timers)) if len(self._timers) > 1 else range(1)
        found = itertools.chain(self._itself(), *(self._about(index) for index in judged))
        return any(disturbance.harmful for disturbance in found)

    def _itself(self) -> list[Disturbance]:
        """Return what the A/A part found."""
        usual, taken = self._protocol.usual_ms, float(np.median(self._values(0)))
        if usual and taken > DISTURBED * usual:
            return [Disturbance(f"the baseline took {taken / usual:.2f} times as long as usual", True)]
        middle, low, high = self._against_itself()
        if abs(middle - 1) > self._protocol.noise_limit and not low <= 1 <= high:
            return [Disturbance(f"the baseline against itself gave {middle:.3f}x", True)]
        return []

    def _about(self, index: int) -> list[Disturbance]:
        """Return what disturbed one engine."""
        found = []
        width = half_width(*(self._ratio(index) if index else ratio_interval(self._values(0), self._protocol.seed)))
        if width > self._protocol.noise_limit:
            found.append(Disturbance(f"the {'ratio' if index else 'median'} is known only to ±{width:.1%}", True))
        trend = drift(self._values(index))
        if abs(trend) > _DRIFT:
            found.append(Disturbance(f"the median drifted by {trend:+.0%}", True))
        if self._unsettled and self._unsettled[index]:
            seconds = WARM_UP_PATIENCE * self._protocol.warm_up_s
            found.append(Disturbance(f"the warm-up did not settle within {seconds:.2g} s", False))
        return found

    # -- telling ------------------------------------------------------------------------------------------------

    def results(self, batch_sizes: Sequence[int], threads: int, streams: int) -> list[tuple[Measurement, Samples]]:
        """Return every engine's measurement and samples."""
        device = [] if self._gpu is None else self._gpu.found()
        around, itself = [*device, *self._watch.found(), *self._itself()], self._against_itself()
        state = None if self._gpu is None else self._gpu.summary()
        baseline = float(np.median(self._samples(0)))
        # Rounds are of ms a call, or of ms a sample.
        calls = self._protocol.mode == LATENCY
        made = []
        for index, batch_size in enumerate(batch_sizes):
            found = [*around, *self._about(index)]
            samples = self._samples(index)
            latency = float(np.median(samples))
            _, low, high = median_interval(self._rounds(index), self._protocol.seed)
            ratio = self._ratio(index) if index else (1.0, 1.0, 1.0)
            p90, p95, p99 = (float(p) for p in np.percentile(samples, (90, 95, 99)))
            measurement = Measurement(
                latency_ms=latency, p90_ms=p90, p95_ms=p95, p99_ms=p99, mad_ms=mad(samples), n=len(samples),
                low_ms=min(low, latency), high_ms=max(high, latency),
                ratio=ratio[0], ratio_low=ratio[1], ratio_high=ratio[2],
                baseline_ms=baseline, noisy=any(disturbance.harmful for disturbance in found),
                batch_size=batch_size, threads=threads, noise=tuple(disturbance.reason for disturbance in found),
                aa_ratio=itself[0], aa_low=itself[1], aa_high=itself[2], mode=self._protocol.mode, streams=streams,
                throughput_per_s=1e3 / float(np.median(self._values(index))) * (batch_size if calls else 1),
                energy_mj=per_call_mj([piece.energy_j for piece in self._slices[index]], len(samples)), gpu=state,
            )  # fmt: skip
            made.append((measurement, samples))
        return made

    def taken(self, batch_sizes: Sequence[int], threads: int) -> list[Taken]:
        """Return every engine's measurement, samples and rounds."""
        results = self.results(batch_sizes, threads, 1)
        return [Taken(*result, np.array(self._values(index))) for index, result in enumerate(results)]

    def _rounds(self, index: int) -> list[Samples]:
        pieces = [piece.samples for piece in self._slices[index]]
        if index == 0:
            pieces = [np.concatenate(pair) for pair in zip(pieces[::2], pieces[1::2], strict=True)]
        factors = self._factors(index)
        return [(piece * factor).astype(np.float32) for piece, factor in zip(pieces, factors, strict=True)]

    def _samples(self, index: int) -> Samples:
        return np.concatenate([piece.samples for piece in self._slices[index]])


def _order(count: int, number: int) -> list[int]:
    """Return who runs when in round `number`: for two AB BA BA AB, so that linear and quadratic drift cancel."""
    shift = (number // 2) % max(count, 1)
    order = [(index + shift) % count for index in range(count)]
    return order[::-1] if number % 2 else order


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep the garbage collector off."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
