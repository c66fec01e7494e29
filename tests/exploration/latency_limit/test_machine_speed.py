"""What the machine's pace does to ratios, and that what is fine-tuned has to stay inside its limit at every pace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autocompress.config import RunConfig
from autocompress.exploration.latency_limit.machine_speed import MachineSpeed
from autocompress.exploration.pareto import Constraints, finalists
from autocompress.policy import CompressionPolicy
from autocompress.quantities import Limit
from autocompress.runs.records import PREDICTED, QUIET, Figures, Occasion, TrialRecord
from tests.exploration.conftest import BASELINE, Bench, make_measurement, record
from tests.exploration.known import Known, latency_filter

RELATIVE, ABSOLUTE = Limit(0.5, True), Limit(5.0, False)


def made(power: float, *, n: int = 40, error: float = 0.02, seed: int = 0) -> list[TrialRecord]:
    """Return networks measured while the machine's pace wanders by ±10 %; ratios go with it to this power."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(n):
        base = 10 * float(np.exp(0.1 * np.sin(number / 6)))
        predicted = float(rng.uniform(0.4, 0.6))
        ratio = predicted * (base / 10) ** power * float(np.exp(error * rng.standard_normal()))
        policy = CompressionPolicy(pruning={"c0": (number + 1) / 100})
        measurement = make_measurement(ratio * base, base)
        found.append(record(number, 0.9, 5, policy=policy, measurement=measurement, predicted_ratio=predicted))
    return found


@pytest.mark.parametrize("power", [-0.8, -0.4, 0.0, 0.5])
def test_how_ratios_go_with_the_pace_is_learned_from_what_was_predicted(power: float) -> None:
    found = [MachineSpeed.of(made(power, seed=seed), 10).exponent for seed in range(20)]
    assert float(np.mean(found)) == pytest.approx(power, abs=0.1)
    assert float(np.std(found)) < 0.08


def test_little_evidence_moves_little_and_outliers_do_not_decide() -> None:
    assert abs(MachineSpeed.of(made(-0.8)[:2], 10).exponent) < 0.3
    records = made(0.0, error=0.0)
    assert records[9].measurement is not None
    # A prediction that is off by a factor of three, where the machine was slowest.
    records[9] = replace(records[9], predicted_ratio=records[9].measurement.ratio / 3)
    assert abs(MachineSpeed.of(records, 10).exponent) < 0.15
    assert MachineSpeed.of(made(-5.0), 10).exponent == -1.0


def test_nothing_measured_and_nothing_predicted_say_nothing() -> None:
    assert MachineSpeed.of([], 11.5) == MachineSpeed(11.5, (11.5,))
    assert MachineSpeed(11.5, (11.5,)).limit(RELATIVE) == 0.5
    assert MachineSpeed(11.5, (11.5,)).limit(Limit(5.75, False)) == pytest.approx(0.5)
    ahead = replace(make_measurement(5, 20), source=PREDICTED)
    assert MachineSpeed.of([record(1, 0.9, 5, measurement=ahead, predicted_ratio=0.3)], 11.5) == MachineSpeed(
        11.5, (11.5,)
    )
    assert MachineSpeed.of([replace(r, predicted_ratio=None) for r in made(-1.0)], 10).exponent == 0


def test_ratios_of_one_pace_compare() -> None:
    records = made(-0.8, error=0.0)
    machine_speed = MachineSpeed.of(records, 10)

    def off(levels: list[float]) -> float:
        measured = [r.measurement.ratio / (r.predicted_ratio or 1) for r in records if r.measurement]
        return float(np.std(np.log(np.array(measured) * levels)))

    assert off([1.0] * len(records)) > 0.05
    assert off([machine_speed.normalise(r.measurement) for r in records if r.measurement]) < 0.01


def test_a_relative_limit_is_tighter_where_the_machine_slows_the_baseline_alone() -> None:
    alone, alike = MachineSpeed(10.0, (9.0, 11.0, 10.5), -1.0), MachineSpeed(10.0, (9.0, 11.0, 10.5), 0.0)
    # A network of 4.5 ms is at 0.5x when the baseline takes 9.
    assert alone.limit(RELATIVE) == pytest.approx(0.45)
    assert alike.limit(RELATIVE) == pytest.approx(0.5)
    # Measured beside a slow baseline: 4.8 ms are 0.533x of a fast one.
    slow = make_measurement(4.8, 11)
    assert alone.bound(slow, RELATIVE, slow.ratio_high) == pytest.approx(4.8 / 9)
    assert alike.bound(slow, RELATIVE, slow.ratio_high) == pytest.approx(4.8 / 11)
    # Never below what was measured, even where the machine was faster than counts.
    assert alone.bound(make_measurement(4, 8), RELATIVE, 0.5) == pytest.approx(0.5)


def test_a_limit_in_milliseconds_holds_when_the_machine_is_slow() -> None:
    alone, alike = MachineSpeed(10.0, (9.0, 11.0, 10.5), -1.0), MachineSpeed(10.0, (9.0, 11.0, 10.5), 0.0)
    assert alone.limit(ABSOLUTE) == pytest.approx(0.5)
    assert alike.limit(ABSOLUTE) == pytest.approx(5 / 11)
    fast = make_measurement(4.8, 9)
    assert alone.bound(fast, ABSOLUTE, fast.high_ms) == pytest.approx(4.8)
    assert alike.bound(fast, ABSOLUTE, fast.high_ms) == pytest.approx(4.8 * 11 / 9)


def test_limit_and_bound_agree() -> None:
    """What is just inside the limit at the usual pace is just inside its bound, measured at whichever pace."""
    machine_speed = MachineSpeed(10.0, (9.0, 11.0, 10.5), -0.6)
    for latency in (RELATIVE, ABSOLUTE):
        for base in (9.0, 9.7, 11.0):
            ratio = machine_speed.limit(latency) * (base / 10) ** machine_speed.exponent
            found = make_measurement(ratio * base, base)
            upper = found.ratio_high if latency.relative else found.high_ms
            assert machine_speed.bound(found, latency, upper) == pytest.approx(latency.value)


@pytest.mark.parametrize("latency", [RELATIVE, ABSOLUTE])
def test_intervals_of_occasions_are_not_widened_again(latency: Limit) -> None:
    occasion = Occasion(1.0, {QUIET: Figures(5.0, 10.0, 0.5)})
    plain = made(-0.8)
    measured = [(r, r.measurement) for r in plain if r.measurement is not None]
    known = [replace(r, measurement=replace(m, occasions=(occasion,))) for r, m in measured]
    machine_speed = MachineSpeed.of(known, 10)
    # What ratios have in common with the pace is learned all the same.
    assert machine_speed.exponent == MachineSpeed.of(plain, 10).exponent and machine_speed.edges_ms == ()
    assert machine_speed.limit(latency) == pytest.approx(0.5, rel=0.03)
    found = make_measurement(4.9, 11.0)
    assert machine_speed.bound(found, latency, 0.49) == 0.49
    assert MachineSpeed.of(plain, 10).bound(found, latency, 0.49) > 0.49


# -- what the search makes of it --------------------------------------------------------------------------------------


def limits(**changes: str) -> Constraints:
    return Constraints.of(RunConfig.model_validate(changes), BASELINE)


def test_finalists_stay_inside_the_limit_at_every_pace_if_any_do() -> None:
    machine_speed = MachineSpeed(10.0, (9.0, 11.0, 10.0), -1.0)
    policies = [CompressionPolicy(pruning={"c0": 0.1 * (n + 1)}) for n in range(4)]
    found = [(0.95, 4.9, 11.0), (0.92, 4.4, 10.0), (0.91, 4.9, 9.0), (0.90, 4.4, 11.0)]
    records = [
        record(n, accuracy, 1, policy=policies[n], measurement=make_measurement(taken, base))
        for n, (accuracy, taken, base) in enumerate(found)
    ]

    def chosen(given: list[TrialRecord]) -> list[int]:
        return [r.number for r in finalists(given, limits(target_latency="0.5x"), BASELINE, 3, machine_speed)]

    # The first was inside by a slow baseline alone; the third is over.
    assert chosen(records) == [1, 3]
    assert chosen(records[:1]) == [0]
    assert limits(target_latency="0.5x").feasible_at_all_speeds(records[2:3], machine_speed) == []
    size = limits(max_size="0.9x")
    assert size.feasible_at_all_speeds([replace(r, size_bytes=800) for r in records[:1]], machine_speed) != []


def test_costs_are_those_of_one_pace() -> None:
    machine_speed, found = (
        MachineSpeed(10.0, (9.0, 11.0), -1.0),
        record(1, 0.9, 1, measurement=make_measurement(4.4, 11.0)),
    )
    assert limits(target_latency="0.5x").cost(found) == pytest.approx(0.4)
    assert limits(target_latency="0.5x").cost(found, machine_speed) == pytest.approx(0.44)
    assert limits(max_size="0.5x").cost(found, machine_speed) == 1.0


def test_what_is_known_is_learned_anew_once_the_pace_is_understood(bench: Bench) -> None:
    class Replacing(Known):
        @property
        def size(self) -> int:
            return len({observation.policy for observation in self.learned})

    known = Replacing()
    made_screen = latency_filter(bench, known)
    records = made(-0.8, error=0.0)
    for found in records:
        made_screen.observe(found)
    latest = {observation.policy: observation.ratio for observation in known.learned}
    assert len(latest) == len(records) < len(known.learned)
    off = [np.log(latest[r.policy] / (r.predicted_ratio or 1)) for r in records]
    assert float(np.std(off)) < 0.01
    assert made_screen.limit is not None and made_screen.limit < 0.47
    assert made_screen.can_filter


def test_where_the_baseline_alone_is_slowed_what_is_fitted_leaves_room(bench: Bench) -> None:
    still, moving = latency_filter(bench), latency_filter(bench)
    for found in made(-0.8, error=0.0):
        moving.observe(found)
    tops = [each.target_ratio()[1] for each in (still, moving)]
    assert tops[1] < 0.96 * tops[0]


def test_a_network_measured_again_is_known_by_that_and_its_layers_once(bench: Bench) -> None:
    known = Known()
    made_screen = latency_filter(bench, known)
    first = record(1, 0.9, 5, policy=CompressionPolicy(pruning={"c1": 0.5}), layer_ms={"c1": 0.5})
    made_screen.observe(first)
    made_screen.observe(replace(first, measurement=make_measurement(6.0)))
    assert [observation.ratio for observation in known.learned] == [5 / 11.5, 6 / 11.5]
    assert len(known.learned_times) == 1
    # Learned anew when the pace is understood: the latest figure is what is told again.
    for found in made(-0.8, error=0.0):
        made_screen.observe(found)
    again = [observation.ratio for observation in known.learned if observation.policy == first.policy]
    assert again[-1] == pytest.approx(6 / 11.5 * made_screen.machine_speed.normalise(make_measurement(6.0)), rel=0.01)
