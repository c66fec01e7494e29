from __future__ import annotations

import gc
import json
from collections.abc import Callable
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import numpy as np
import pytest

from autocompress.engines.base import Array, Runner
from autocompress.errors import ConfigError
from autocompress.latency.measure import Protocol, measure

BATCH = np.zeros((2, 3), dtype=np.float32)


class Clock:
    """A clock that goes only when a runner runs."""

    def __init__(self) -> None:
        self.ns = 0

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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    fake = SimpleNamespace(perf_counter=clock.perf_counter, perf_counter_ns=clock.perf_counter_ns)
    monkeypatch.setattr("autocompress.latency.measure.time", fake)
    return clock


def test_steady_runners(clock: Clock) -> None:
    runners = [FakeRunner(clock, lambda _: 4.0), FakeRunner(clock, lambda _: 1.0)]
    (baseline, first), (candidate, second) = measure(runners, [BATCH, BATCH], Protocol(), threads=3)
    assert (baseline.latency_ms, candidate.latency_ms) == (4, 1)
    assert (baseline.ratio, baseline.ratio_low, baseline.ratio_high) == (1, 1, 1)
    assert (candidate.ratio, candidate.ratio_low, candidate.ratio_high) == (0.25, 0.25, 0.25)
    assert candidate.baseline_ms == baseline.baseline_ms == 4
    assert not baseline.noisy
    assert not candidate.noisy
    assert (candidate.batch_size, candidate.threads) == (2, 3)
    assert first.dtype == second.dtype == np.float32
    assert [len(first), len(second)] == [baseline.n, candidate.n]
    # At least a second of each, and no more than a round's end over it.
    assert 1000 <= first.sum() < 1300
    assert 1000 <= second.sum() < 1300
    assert [runner.prepared for runner in runners] == [1, 1]


def test_slow_runners_get_the_least_iterations(clock: Clock) -> None:
    ((slow, samples),) = measure([FakeRunner(clock, lambda _: 500.0)], [BATCH], Protocol())
    assert slow.n == len(samples) == 60  # the next multiple of the rounds


def test_warm_up_is_not_timed(clock: Clock) -> None:
    ((result, samples),) = measure(
        [FakeRunner(clock, lambda now: 20.0 if now < 0.19 else 1.0)], [BATCH], Protocol(warm_up_s=0.2)
    )
    assert samples.max() == 1
    assert result.p99_ms == 1


def test_first_iterations_after_a_switch_are_not_timed(clock: Clock) -> None:
    log: list[str] = []

    def cold(name: str) -> Callable[[float], float]:
        return lambda _: 5.0 if log[-2:-1] != [name] else 1.0

    runners = [FakeRunner(clock, cold(name), log, name) for name in "AB"]
    for result, samples in measure(runners, [BATCH, BATCH], Protocol()):
        assert samples.max() == 1
        assert result.ratio == 1


def test_order_alternates_and_rotates(clock: Clock) -> None:
    log: list[str] = []
    runners = [FakeRunner(clock, lambda _: 100.0, log, name) for name in "ABC"]
    measure(runners, [BATCH] * 3, Protocol(rounds=6, warm_up_s=0, min_iterations=6, min_seconds=0))
    visits = "".join(log)[3:]  # after the warm-up
    assert visits[::2] == visits[1::2]  # one iteration to settle, one timed
    assert visits[::2] == "ABCCBABCAACBCABBAC"


def test_drift_cancels_in_the_ratio(clock: Clock) -> None:
    # The machine becomes three times slower while measuring.
    runners = [FakeRunner(clock, lambda now, c=cost: c * (1 + now)) for cost in (1.0, 0.8)]
    _, (candidate, _) = measure(runners, [BATCH, BATCH], Protocol(rounds=20))
    assert candidate.ratio == pytest.approx(0.8, rel=0.02)
    assert candidate.high_ms / candidate.low_ms > 1.2


def test_noise_makes_it_measure_longer_and_say_so(clock: Clock) -> None:
    rng = np.random.default_rng(0)
    noise = {}

    def noisy(now: float) -> float:
        return float(noise.setdefault(int(now * 10), rng.uniform(1, 3)))

    runners = [FakeRunner(clock, lambda _: 1.0), FakeRunner(clock, noisy)]
    (baseline, first), (candidate, second) = measure(runners, [BATCH, BATCH], Protocol(max_seconds=3))
    assert candidate.noisy
    assert not baseline.noisy
    assert 3000 <= first.sum() < 3500
    assert candidate.ratio_low < candidate.ratio < candidate.ratio_high
    assert second.sum() > 3000


def test_one_noisy_runner_alone(clock: Clock) -> None:
    ((result, samples),) = measure(
        [FakeRunner(clock, lambda now: 1.0 + int(now * 10) % 2)], [BATCH], Protocol(max_seconds=2)
    )
    assert result.noisy
    assert samples.sum() >= 2000
    assert (result.ratio, result.baseline_ms) == (1, result.latency_ms)


def test_garbage_collector_is_restored_also_after_an_error(clock: Clock) -> None:
    def broken(_: float) -> float:
        raise RuntimeError("no")

    assert gc.isenabled()
    with pytest.raises(RuntimeError):
        measure([FakeRunner(clock, broken)], [BATCH])
    assert gc.isenabled()
    gc.disable()
    try:
        measure([FakeRunner(clock, lambda _: 1.0)], [BATCH])
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_wants_one_input_per_runner(clock: Clock) -> None:
    with pytest.raises(ConfigError, match="one input per runner"):
        measure([], [])
    with pytest.raises(ConfigError, match="not 2 for 1"):
        measure([FakeRunner(clock, lambda _: 1.0)], [BATCH, BATCH])


def test_protocol_round_trips_through_json() -> None:
    protocol = Protocol(rounds=7, noise_limit=0.1)
    assert Protocol.from_dict(json.loads(json.dumps(protocol.to_dict()))) == protocol
    with pytest.raises(ConfigError, match="unknown key 'round'"):
        Protocol.from_dict({"round": 3})


@pytest.mark.parametrize(
    "wrong",
    [{"rounds": 0}, {"min_iterations": 0}, {"warm_up_s": -1}, {"noise_limit": 0}, {"max_seconds": float("nan")}],
)
def test_protocol_checks_ranges(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Protocol(**wrong)
