"""The one timing protocol, the same for every engine.

Runners are warmed up, then timed in rounds A B, B A, B A, A B …, so that drift of the clock and of neighbours falls on
all alike, and the ratio of a candidate to the baseline is known far better than either latency. It takes opened
Runners, never an engine's name; pinning is the caller's (`worker.child`).
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np

from autocompress.engines.base import Array, Runner
from autocompress.errors import ConfigError
from autocompress.latency.statistics import Samples, half_width, mad, median_interval, ratio_interval
from autocompress.results import Measurement

# After a switch between engines the caches hold the other's weights: this many iterations, or this long, go untimed.
_SETTLE_ITERATIONS = 3
_SETTLE_NS = 10_000_000


@dataclass(frozen=True)
class Protocol:
    """How long and how often to time.

    Attributes:
        warm_up_s: Untimed running of each engine before the first round, at least one iteration.
        min_iterations, min_seconds: Timed work of each engine, at least both, spread over the rounds.
        rounds: Interleaved rounds before noise is judged. More and shorter ones pair the engines better on a busy
            machine (a file against itself: standard deviation of the ratio 0.9 % with 10, 0.4 % with 20).
        max_seconds: Timed seconds of each engine after which measuring stops although noisy.
        noise_limit: Half-width of the 95 % interval of the ratio to the baseline, relative to the ratio (of the
            latency for one engine alone), above which a result is noisy.
        seed: Of the bootstrap.
    """

    warm_up_s: float = 0.2
    min_iterations: int = 50
    min_seconds: float = 1.0
    rounds: int = 20
    max_seconds: float = 4.0
    noise_limit: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        for name, least in (("warm_up_s", 0), ("min_seconds", 0), ("max_seconds", 0), ("seed", 0)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"Latency protocol: {name} must be at least {least}, not {getattr(self, name)!r}.")
        for name in ("min_iterations", "rounds"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"Latency protocol: {name} must be at least 1, not {getattr(self, name)!r}.")
        if not self.noise_limit > 0:
            raise ConfigError(f"Latency protocol: noise_limit must be above 0, not {self.noise_limit!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form.

        Raises:
            ConfigError: An unknown key, or a value out of range.
        """
        names = {f.name for f in fields(cls)}
        for key in data:
            if key not in names:
                raise ConfigError(f"Latency protocol: unknown key {key!r}. Allowed: {', '.join(sorted(names))}.")
        return cls(**data)


def measure(
    runners: Sequence[Runner],
    inputs: Sequence[Array],
    protocol: Protocol = Protocol(),
    *,
    threads: int = 1,
) -> list[tuple[Measurement, Samples]]:
    """Time opened runners against the first one, the baseline.

    `inputs` holds one array ``(batch_size, ...)`` per runner. Returns, per runner, the measurement and its samples
    ``(n,)`` in ms, in the order they were taken. The baseline's ratio is 1; its `noisy` is about its own latency.
    `threads` is recorded, not set.

    Raises:
        ConfigError: No runners, or not one input for each.
    """
    if not runners or len(runners) != len(inputs):
        raise ConfigError(f"measure() needs one input per runner, not {len(inputs)} for {len(runners)}.")
    with _no_garbage_collection():
        for runner, array in zip(runners, inputs, strict=True):
            runner.prepare(array)
            _warm_up(runner.run, protocol)
        rounds: list[list[Samples]] = [[] for _ in runners]
        spent = [0.0] * len(runners)
        for number in itertools.count():
            for index in _order(len(runners), number):
                samples = _slice(runners[index], protocol)
                rounds[index].append(samples)
                spent[index] += float(samples.sum()) / 1e3
            if number + 1 < protocol.rounds:
                continue
            if min(spent) >= protocol.max_seconds or not _noisy(rounds, protocol):
                break
    return [
        (_summary(own, rounds[0], protocol, len(array), threads), np.concatenate(own))
        for own, array in zip(rounds, inputs, strict=True)
    ]


def _summary(
    own: Sequence[Samples], baseline: Sequence[Samples], protocol: Protocol, batch_size: int, threads: int
) -> Measurement:
    samples = np.concatenate(own)
    latency, low, high = median_interval(own, protocol.seed)
    ratio = (1.0, 1.0, 1.0) if own is baseline else ratio_interval(_ratios(own, baseline), protocol.seed)
    judged = (latency, low, high) if own is baseline else ratio
    p90, p95, p99 = (float(p) for p in np.percentile(samples, (90, 95, 99)))
    return Measurement(
        latency_ms=latency,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        mad_ms=mad(samples),
        n=len(samples),
        low_ms=low,
        high_ms=high,
        ratio=ratio[0],
        ratio_low=ratio[1],
        ratio_high=ratio[2],
        baseline_ms=float(np.median(np.concatenate(baseline))),
        noisy=half_width(*judged) > protocol.noise_limit,
        batch_size=batch_size,
        threads=threads,
    )


def _ratios(own: Sequence[Samples], baseline: Sequence[Samples]) -> list[float]:
    return [float(np.median(a) / np.median(b)) for a, b in zip(own, baseline, strict=True)]


def _noisy(rounds: Sequence[Sequence[Samples]], protocol: Protocol) -> bool:
    """Return whether any ratio (or the only latency) is still known less well than the protocol asks."""
    if len(rounds) == 1:
        return half_width(*median_interval(rounds[0], protocol.seed)) > protocol.noise_limit
    return any(
        half_width(*ratio_interval(_ratios(own, rounds[0]), protocol.seed)) > protocol.noise_limit for own in rounds[1:]
    )


def _order(count: int, number: int) -> list[int]:
    """Return who runs when in round `number`: for two AB BA BA AB, so that linear and quadratic drift cancel."""
    shift = (number // 2) % count
    order = [(index + shift) % count for index in range(count)]
    return order[::-1] if number % 2 else order


def _warm_up(run: Callable[[], None], protocol: Protocol) -> None:
    start = time.perf_counter()
    run()
    while time.perf_counter() - start < protocol.warm_up_s:
        run()


def _slice(runner: Runner, protocol: Protocol) -> Samples:
    """Time one runner's share of a round and return its samples in ms."""
    clock, run, time_run = time.perf_counter_ns, runner.run, runner.time_run
    start = clock()
    for _ in range(_SETTLE_ITERATIONS):
        run()
        if clock() - start >= _SETTLE_NS:
            break
    least = -(-protocol.min_iterations // protocol.rounds)
    budget = int(protocol.min_seconds / protocol.rounds * 1e9)
    took: list[int] = []
    start = clock()
    while True:
        took.append(time_run(clock))
        if clock() - start >= budget and len(took) >= least:
            return (np.asarray(took, dtype=np.float64) / 1e6).astype(np.float32)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
