from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from autocompress.errors import BuildError, ConfigError
from autocompress.measurement.energy import EnergyMeter
from autocompress.measurement.measure import Protocol, measure
from autocompress.measurement.noise import Disturbance
from autocompress.measurement.statistics import levelled
from tests.measurement.fakes import Clock, FakeRunner, StillWatch

pytestmark = pytest.mark.usefixtures("whole_protocols")
BATCH = np.zeros((2, 3), dtype=np.float32)


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


def test_warm_up_goes_on_until_the_median_settles(clock: Clock) -> None:
    def timed_after(cost: Callable[[float], float], **changes: Any) -> tuple[int, tuple[str, ...]]:
        clock.ns = 0
        protocol = Protocol(rounds=2, min_iterations=2, min_seconds=0.01, max_seconds=0.01, **changes)
        runner = FakeRunner(clock, cost)
        ((result, _),) = measure([runner], [BATCH], protocol)
        return len(runner.log) - result.n, result.noise

    steady, noise = timed_after(lambda _: 1.0)
    assert 200 <= steady < 220 and noise == ()
    # As a clock that rises for half a second.
    rising, noise = timed_after(lambda now: 1.0 + max(0.0, 0.5 - now))
    assert 400 < rising < 620 and noise == ()
    never, noise = timed_after(lambda now: 1.0 + 0.5 * (int(now / 0.05) % 2))
    assert 530 < never < 850 and "the warm-up did not settle within 0.8 s" in noise
    brief, noise = timed_after(lambda now: 1.0 + 0.5 * (int(now / 0.01) % 2), warm_up_s=0.04)
    assert brief < 180 and "the warm-up did not settle within 0.16 s" in noise


def test_warm_up_of_long_calls_is_not_called_unsettled(clock: Clock) -> None:
    ((result, _),) = measure([FakeRunner(clock, lambda _: 900.0)], [BATCH], Protocol(min_iterations=2, rounds=2))
    assert result.noise == ()


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
    # The baseline before and after the others; one iteration to settle after a switch, one timed.
    rounds = ["BC", "CB", "CB", "BC", "BC", "CB"]
    first = "AA" + "BBCC" + "AA"
    assert visits == first + "".join("A" + "".join(2 * name for name in order) + "AA" for order in rounds[1:])


def test_drift_cancels_in_the_ratio(clock: Clock) -> None:
    # The machine becomes three times slower while measuring.
    runners = [FakeRunner(clock, lambda now, c=cost: c * (1 + now)) for cost in (1.0, 0.8)]
    _, (candidate, _) = measure(runners, [BATCH, BATCH], Protocol(rounds=20))
    assert candidate.ratio == pytest.approx(0.8, rel=0.02)
    assert candidate.high_ms / candidate.low_ms > 1.2
    assert candidate.noisy
    assert any(re.fullmatch(r"the median drifted by \+\d+%", reason) for reason in candidate.noise)


def test_rounds_in_which_the_baseline_was_disturbed_are_taken_anew(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(now: float) -> bool:
        return 0.3 < now < 1.7

    def waits(seconds: float) -> None:
        clock.ns += int(1e9 * seconds)

    monkeypatch.setattr("autocompress.measurement.measure.time.sleep", waits)

    def measured(**changes: Any) -> Any:
        clock.ns = 0
        runners = [
            FakeRunner(clock, lambda now: 2.0 if busy(now) else 1.0),
            FakeRunner(clock, lambda now: 1.2 if busy(now) else 0.8),
        ]
        return measure(runners, [BATCH, BATCH], Protocol.quick(**changes))[1]

    unaware, _ = measured()
    assert unaware.ratio < 0.75
    found, samples = measured(usual_ms=1.0)
    assert found.ratio == found.ratio_high == pytest.approx(0.8) and found.baseline_ms == 1 and not found.noisy
    assert samples.max() == pytest.approx(0.8) and found.noise == ()
    # Out of patience: what there is counts, and the result says what it is.
    tired, _ = measured(usual_ms=1.0, patience_s=0.2)
    assert tired.noisy and any("times as long as usual" in reason for reason in tired.noise)
    assert tired.ratio == unaware.ratio
    # A baseline that has become faster is no disturbance.
    faster, _ = measured(usual_ms=5.0)
    assert faster.ratio == unaware.ratio


def test_noise_makes_it_measure_longer_and_say_so(clock: Clock) -> None:
    rng = np.random.default_rng(0)
    noise = {}

    def noisy(now: float) -> float:
        return float(noise.setdefault(int(now * 10), rng.uniform(1, 3)))

    runners = [FakeRunner(clock, lambda _: 1.0), FakeRunner(clock, noisy)]
    (baseline, first), (candidate, second) = measure(runners, [BATCH, BATCH], Protocol(max_seconds=3))
    assert candidate.noisy
    assert any(reason.startswith("the ratio is known only to ±") for reason in candidate.noise)
    assert not baseline.noisy
    assert candidate.verdict == "slower"
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


def test_rounds_of_one_short_call_are_not_taken_without_end(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[None] = []
    monkeypatch.setattr(StillWatch, "look", lambda _: rounds.append(None))
    # Calls of 10 to 300 µs: thousands of rounds of two of them would leave the median uncertain.
    rng = np.random.default_rng(0)
    restless = FakeRunner(clock, lambda _: 0.01 * 30 ** rng.random())
    protocol = Protocol(warm_up_s=0, min_iterations=1, min_seconds=0, rounds=1, max_seconds=4)
    measure([restless], [BATCH], protocol)
    assert 5 < len(rounds) <= 61


def test_the_baseline_is_measured_against_itself(clock: Clock) -> None:
    runners = [FakeRunner(clock, lambda _: 1.0), FakeRunner(clock, lambda _: 0.5)]
    for result, _ in measure(runners, [BATCH, BATCH]):
        assert (result.aa_ratio, result.aa_low, result.aa_high) == (1, 1, 1)
    # The machine's speed is another every 40 ms.
    speeds = np.random.default_rng(0).uniform(0.9, 1.1, 1000)
    runners = [FakeRunner(clock, lambda now: float(speeds[int(now / 0.04)])) for _ in range(2)]
    _, (candidate, _) = measure(runners, [BATCH, BATCH])
    assert 0.9 < candidate.aa_low < candidate.aa_high < 1.1
    assert candidate.aa_high - candidate.aa_low > 0.01
    assert candidate.verdict in ("equal", "unsure")


def test_what_the_machine_did_is_told(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    runners = [FakeRunner(clock, lambda _: 1.0), FakeRunner(clock, lambda _: 0.5)]
    beside = Disturbance("other programs used 90% of a processor beside it", False)
    monkeypatch.setattr(StillWatch, "disturbances", (beside,))
    for result, _ in measure(runners, [BATCH, BATCH]):
        assert (result.noisy, result.noise) == (False, (beside.reason,))
    on_it = Disturbance("other programs used 40% of it", True)
    monkeypatch.setattr(StillWatch, "disturbances", (on_it, beside))
    for result, samples in measure(runners, [BATCH, BATCH]):
        assert (result.noisy, result.noise) == (True, (on_it.reason, beside.reason))
        # It did the figures no harm: measuring longer would not end it.
        assert samples.sum() < 1500


def test_a_file_against_itself_is_seldom_called_another(clock: Clock) -> None:
    rng = np.random.default_rng(0)

    def verdicts(factor: float, count: int) -> list[str]:
        found = []
        for _ in range(count):
            # Every 20 ms the machine's speed is another, as beside a busy program; rarely a call is interrupted.
            speeds = 1 + 0.03 * rng.standard_normal(2000)

            def cost(now: float, by: float, speeds: Any = speeds) -> float:
                return float(by * speeds[int(now * 50) % 2000] * (1 + 0.01 * rng.random()) + (rng.random() < 0.02) * 3)

            runners = [FakeRunner(clock, lambda now, by=by: cost(now, by)) for by in (1.0, factor)]
            found.append(measure(runners, [BATCH, BATCH], Protocol(min_seconds=0.4, max_seconds=0.4))[1][0].verdict)
        return found

    assert sum(verdict in ("faster", "slower") for verdict in verdicts(1.0, 30)) <= 1
    assert verdicts(0.85, 6) == ["faster"] * 6
    assert verdicts(1.15, 6) == ["slower"] * 6


def test_quick_takes_a_fraction_of_a_second_of_each(clock: Clock) -> None:
    runners = [FakeRunner(clock, lambda now, ms=ms: ms) for ms in (1.0, 0.2, 3.0)]
    measure(runners, [BATCH] * 3, Protocol.quick())
    assert clock.ns < 3 * 0.4e9
    speeds = np.random.default_rng(0).uniform(1, 2, 1000)
    clock.ns = 0
    ((noisy, _),) = measure([FakeRunner(clock, lambda now: float(speeds[int(now * 50)]))], [BATCH], Protocol.quick())
    assert noisy.noisy and noisy.high_ms - noisy.low_ms > 0.1 and noisy.low_ms < noisy.latency_ms < noisy.high_ms
    assert clock.ns < 0.55e9
    assert Protocol.quick(rounds=3).rounds == 3


def test_a_trial_takes_a_quarter_of_a_second_of_each(clock: Clock) -> None:
    runners = [FakeRunner(clock, lambda now, ms=ms: ms) for ms in (1.0, 0.2)]
    measure(runners, [BATCH] * 2, Protocol.trial().occasion())
    assert 2 * 0.25e9 < clock.ns < 2 * 0.5e9


def test_occasions_share_the_timed_work() -> None:
    once = Protocol.standard().occasion()
    assert (once.occasions, once.rounds, once.min_seconds, once.instances) == (0, 6, 0.25, 1)
    assert once.loaded().min_seconds == 0.125 and once.loaded().warm_up_s == 0
    assert Protocol.standard(occasions=1, rounds=3).occasion().rounds == 4


def test_a_device_that_disappears_is_an_error_with_its_words(clock: Clock) -> None:
    def gone(now: float) -> float:
        if now > 0.9:
            raise OSError("CUDA error 719:\n  unspecified launch failure")
        return 1.0

    steady = FakeRunner(clock, lambda _: 1.0)
    with pytest.raises(
        BuildError, match=r"^b.engine stopped .* after \d+ calls: OSError: CUDA error 719: unspec"
    ) as told:
        measure([steady, FakeRunner(clock, gone)], [BATCH, BATCH], names=["a.engine", "b.engine"])
    assert isinstance(told.value.__cause__, OSError)
    assert int(told.value.args[0].split("after ")[1].split()[0]) > 100
    assert gc.isenabled()


def test_throughput_of_streams_side_by_side(clock: Clock) -> None:
    protocol = Protocol(mode="throughput", rounds=4, min_seconds=0.2)
    streams = [[FakeRunner(clock, lambda _, ms=ms: ms) for _ in range(2)] for ms in (2.0, 1.0)]
    (baseline, _), (candidate, samples) = measure(streams, [BATCH, BATCH], protocol, threads=2)
    # Two calls of two samples every 2 ms, and every ms.
    assert baseline.throughput_per_s == pytest.approx(2000)
    assert candidate.throughput_per_s == pytest.approx(4000)
    assert candidate.ratio == pytest.approx(0.5)
    assert candidate.verdict == "faster"
    assert (candidate.mode, candidate.streams, candidate.threads, candidate.batch_size) == ("throughput", 2, 2, 2)
    assert candidate.latency_ms == 1
    assert candidate.n == len(samples) >= 2 * 200
    assert all(runner.prepared == 1 for runners in streams for runner in runners)


def test_throughput_is_per_sample(clock: Clock) -> None:
    streams = [[FakeRunner(clock, lambda _: 1.0)], [FakeRunner(clock, lambda _: 2.0)]]
    larger = np.zeros((8, 3), dtype=np.float32)
    _, (candidate, _) = measure(streams, [BATCH, larger], Protocol(mode="throughput", rounds=4))
    assert candidate.ratio == pytest.approx(0.5)
    assert candidate.throughput_per_s == pytest.approx(4000)


def test_a_stream_that_fails_ends_the_others(clock: Clock) -> None:
    def broken(_: float) -> float:
        raise RuntimeError("no memory for this stream")

    streams = [[FakeRunner(clock, lambda _: 1.0), FakeRunner(clock, broken), FakeRunner(clock, lambda _: 1.0)]]
    with pytest.raises(BuildError, match="no memory for this stream"):
        measure(streams, [BATCH], Protocol(mode="throughput"))


def test_mode_and_runners_must_agree(clock: Clock) -> None:
    runner = FakeRunner(clock, lambda _: 1.0)
    with pytest.raises(ConfigError, match="'throughput' takes a list"):
        measure([runner], [BATCH], Protocol(mode="throughput"))


def test_instances_take_turns_and_none_of_them_decides(clock: Clock) -> None:
    """One opened engine is faster than another of the same file: what counts is their mean, and it is no noise."""
    log: list[str] = []

    def opened(name: str, *costs: float) -> list[FakeRunner]:
        return [FakeRunner(clock, lambda _, c=cost: c, log, f"{name}{n}") for n, cost in enumerate(costs)]  # type: ignore[misc]

    baseline, candidate, single = opened("a", 1.0, 1.1, 0.9), opened("b", 0.5, 0.48, 0.52), opened("c", 0.5)
    runners: list[Any] = [baseline, candidate, single]
    (first, _), *others = measure(runners, [BATCH] * 3, Protocol(rounds=6, warm_up_s=0))
    assert first.latency_ms == pytest.approx(1.0) and first.low_ms == pytest.approx(first.high_ms)
    for found, samples in others:
        assert found.ratio == pytest.approx(0.5, rel=1e-3)
        assert found.ratio_high - found.ratio_low < 0.002 and not found.noisy
        assert len(samples) == found.n
    # The samples are as they were taken.
    assert set(np.round(others[0][1], 2)) == {np.float32(0.5), np.float32(0.48), np.float32(0.52)}
    assert [runner.prepared for runner in (*baseline, *candidate, *single)] == [1] * 7
    # In a round, both slices of the baseline are of one instance.
    turns = [name for name, before in zip(log, ["", *log], strict=False) if name != before and name[0] == "a"]
    assert turns[-12:] == ["a0", "a0", "a1", "a1", "a2", "a2"] * 2


def test_further_instances_share_a_second_warm_up(clock: Clock) -> None:
    """The machine is warm after the first one, and every turn begins with untimed calls."""
    log: list[str] = []
    instances: list[Any] = [FakeRunner(clock, lambda _: 1.0, log, f"a{n}") for n in range(5)]
    protocol = Protocol(warm_up_s=0.5, rounds=10, min_seconds=0, min_iterations=10)
    measure([instances], [BATCH], protocol)
    warming = log[: log.index("a0", log.index("a4"))]
    runs = [warming.count(f"a{n}") for n in range(5)]
    assert 500 <= runs[0] < 520 and all(100 <= count < 120 for count in runs[1:])


def test_what_gets_faster_after_a_switch_is_not_timed_until_it_no_longer_does(clock: Clock) -> None:
    """Weights that another engine drove out of the caches come back over several calls."""

    class Cold(FakeRunner):
        def run(self) -> None:
            others = len(self.log) - 1 - max((n for n, name in enumerate(self.log) if name != self.name), default=-1)
            self.cost = lambda _: 1.0 + max(0.0, 0.8 - 0.1 * others)
            super().run()

    log: list[str] = []
    runners = [Cold(clock, lambda _: 1.0, log, "a"), Cold(clock, lambda _: 1.0, log, "b")]
    for _, samples in measure(runners, [BATCH] * 2, Protocol.quick(warm_up_s=0)):
        assert samples.max() < 1.02


@pytest.mark.parametrize(("rounds", "instances"), [([4.0, 4.4, 3.6, 4.0, 4.4], 3), ([4.0, 4.4], 1)])
def test_few_rounds_or_one_instance_stay_as_they_are(rounds: list[float], instances: int) -> None:
    assert levelled(rounds, instances) == [1.0] * len(rounds)


def test_rounds_come_to_one_level() -> None:
    rounds = [4.0, 4.4, 3.6, 4.0, 4.4, 3.6, 4.0]
    assert np.multiply(rounds, levelled(rounds, 3)) == pytest.approx([4.0] * 7)


class FakeMeter(EnergyMeter):
    """Two watts, by a fake clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def read(self) -> float | None:
        return 2 * self.clock.ns / 1e9


def test_energy_of_a_call(clock: Clock) -> None:
    runners = [FakeRunner(clock, lambda _: 4.0), FakeRunner(clock, lambda _: 1.0)]
    (baseline, _), (candidate, _) = measure(runners, [BATCH, BATCH], meter=FakeMeter(clock))
    assert baseline.energy_mj == pytest.approx(8)
    assert candidate.energy_mj == pytest.approx(2)


def test_garbage_collector_is_restored_also_after_an_error(clock: Clock) -> None:
    def broken(_: float) -> float:
        raise RuntimeError("no")

    assert gc.isenabled()
    with pytest.raises(BuildError, match="no"):
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
    protocol = Protocol(rounds=7, noise_limit=0.1, mode="throughput", streams=3)
    assert Protocol.from_dict(json.loads(json.dumps(protocol.to_dict()))) == protocol
    with pytest.raises(ConfigError, match="unknown key 'round'"):
        Protocol.from_dict({"round": 3})


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0},
        {"min_iterations": 0},
        {"warm_up_s": -1},
        {"noise_limit": 0},
        {"max_seconds": float("nan")},
        {"mode": "thruput"},
        {"streams": 0, "mode": "throughput"},
        {"streams": 2},
    ],
)
def test_protocol_checks_ranges(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Protocol(**wrong)
