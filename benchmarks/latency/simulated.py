"""A simulated machine: how often does a later measurement lie inside the stated interval?

    python benchmarks/latency/simulated.py [--searches 1000]

Fake timers replay what machines were seen to do, on a clock of their own: a neighbour that comes and goes (for
milliseconds or for a quarter of an hour) and slows files by different factors, drift, processes whose memory lies
better or worse, calls with a tail. A simulated search measures its baseline against a copy, a candidate in a trial,
again before and after ten minutes of fine-tuning and at the end. Within the next hour twelve fresh processes time both
files, one after the other, a quarter of them beside a busy processor. All of it goes through the project's own protocol
and statistics; only the timers are fake. Beside it, on the same machines, is the protocol of before occasions: one
process, five instances in turns, one moment, a bootstrap interval over rounds.
Writes ``benchmarks/latency/results/simulated.json``.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.engines.base import Array
from autocompress.files import write_json
from autocompress.measurement.measure import Taken, measure_timers
from autocompress.measurement.occasions import Spread, combined, figures
from autocompress.measurement.protocol import Protocol
from autocompress.measurement.timers import Slice, Timer
from autocompress.runs.records import Measurement, Occasion

RESULT = Path(__file__).parent / "results" / "simulated.json"
HOUR, LATER = 3600.0, 12
BEFORE = Protocol(instances=1, baseline_instances=1, patience_s=0.0)
INSTANCES = 5
_INPUT = [np.zeros((1, 1), np.float32)] * 2


class Machine:
    """What slows files down, moment by moment.

    Args:
        rng: Draws all of it.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.now, self.loaded = rng, 0.0, False
        # Half of the machines have neighbours; how long one stays, and is away.
        self._neighbours = rng.random() < 0.5
        self._stays, self._away = (math.exp(rng.uniform(math.log(0.01), math.log(900))) for _ in range(2))
        self._until, self._here = 0.0, False
        self.processes = abs(rng.normal(0.012, 0.008))
        self._drift, self._drifted = 0.0, 0.0
        # By file: what a neighbour does to it, and what drift does.
        self.slowed = (1 + rng.exponential(0.08), 1 + rng.exponential(0.15))
        self.drifts = rng.normal(1.0, 0.3, 2)
        self.tail = rng.uniform(0.0, 0.15)

    def pass_time(self, seconds: float) -> None:
        """Let time go by."""
        self.now += seconds
        while self._neighbours and self.now > self._until:
            self._here = not self._here
            self._until += self.rng.exponential(self._stays if self._here else self._away)
        steps = self.now - self._drifted
        decay = math.exp(-steps / 600)
        self._drift = self._drift * decay + 0.015 * math.sqrt(1 - decay**2) * self.rng.standard_normal()
        self._drifted = self.now

    def factor(self, file: int) -> float:
        """Return what a file takes now, over what it takes on the quiet machine."""
        slow = self.slowed[file] if self._here or self.loaded else 1.0
        return slow * math.exp(self.drifts[file] * self._drift)

    @contextmanager
    def load(self) -> Iterator[None]:
        """Keep a processor busy."""
        self.loaded = True
        try:
            yield
        finally:
            self.loaded = False


class FakeTimer(Timer):
    """A file in a process that lies somewhere in memory, or in several that take turns."""

    def __init__(self, machine: Machine, file: int, cost_ms: float, instances: int = 1) -> None:
        super().__init__(f"file {file}")
        self._machine, self._file, self._cost = machine, file, cost_ms
        self._offsets = np.exp(machine.rng.normal(0, machine.processes, instances))
        self._turn = 0

    def prepare(self, inputs: Array) -> None:
        """Nothing to bind."""

    def turn(self, number: int) -> None:
        """Take the next instance."""
        self._turn = number % len(self._offsets)

    def settle(self, *, switched: bool = True) -> None:
        """Pass a moment."""
        self._machine.pass_time(0.005)

    def warm_up(self, protocol: Protocol) -> bool:
        """Pass a moment."""
        self._machine.pass_time(protocol.warm_up_s)
        return True

    def time(self, seconds: float, least: int) -> Slice:
        """Make calls, a few at each state of the machine."""
        machine, spent, pieces = self._machine, 0.0, []
        while spent < seconds:
            step = min(0.01, seconds)
            machine.pass_time(step)
            spent += step
            level = self._cost * float(self._offsets[self._turn]) * machine.factor(self._file)
            noise = np.exp(0.02 * np.abs(machine.rng.standard_normal(8)))
            noise[machine.rng.random(8) < machine.tail] *= 1.3
            pieces.append(level * noise)
        samples = np.concatenate(pieces).astype(np.float32)
        return Slice(samples, float(np.median(samples)), spent)

    def joined(self, pieces: Sequence[Slice]) -> float:
        """Return the median of all calls."""
        return float(np.median(np.concatenate([piece.samples for piece in pieces])))


class Still:
    """Nothing is watched."""

    def look(self) -> None:
        """Nothing."""

    def found(self) -> list[Any]:
        """Nothing."""
        return []


def take(machine: Machine, costs: Sequence[float], protocol: Protocol, files: tuple[int, int] = (0, 1)) -> Occasion:
    """Take one occasion with fresh processes."""
    timers = [FakeTimer(machine, file, costs[file]) for file in files]
    load: AbstractContextManager[object] = machine.load()
    quiet, beside = measure_timers(timers, _INPUT, protocol.occasion(), threads=1, watch=Still, load=load)  # type: ignore[arg-type]
    machine.pass_time(1.0)
    states = {**figures(*_pair(quiet), loaded=False), **figures(*_pair(beside), loaded=True)}
    return Occasion(machine.now, states)


def _pair(taken: list[Taken]) -> tuple[Taken, Taken]:
    return taken[0], taken[1]


def any_measurement() -> Measurement:
    """Return one whose figures are all replaced."""
    return Measurement(1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, False, 1, 1)


def search(machine: Machine, costs: Sequence[float]) -> Measurement:
    """Measure as a search of ten minutes does, and return what it states."""
    standard, trial = Protocol.standard(), Protocol.trial()
    copies = [take(machine, costs, standard, (0, 0)) for _ in range(standard.occasions)]
    known = combined(any_measurement(), copies)
    machine.pass_time(float(machine.rng.uniform(30, 240)))
    occasions = [take(machine, costs, trial)]
    for pause in (60.0, 60.0, 120.0):
        machine.pass_time(pause)
        occasions.append(take(machine, costs, standard))
    for pause, count in ((30.0, 4), (240.0, 4), (10.0, 4)):
        machine.pass_time(pause)
        occasions += [take(machine, costs, standard) for _ in range(count)]
    found = combined(any_measurement(), occasions)
    return combined(any_measurement(), occasions, Spread.of([found], [known]))


def before(machine: Machine, costs: Sequence[float]) -> tuple[float, float]:
    """Return the interval that one process at one moment states."""
    timers = [FakeTimer(machine, file, costs[file], INSTANCES) for file in (0, 1)]
    quiet, _ = measure_timers(timers, _INPUT, BEFORE, threads=1, watch=Still)  # type: ignore[arg-type]
    return quiet[1].measurement.ratio_low, quiet[1].measurement.ratio_high


def later(machine: Machine, costs: Sequence[float], *, busy: bool) -> float:
    """Return what fresh processes show, one after the other: medians of half a second, twice each (A B B A)."""
    machine.loaded = busy
    medians = [FakeTimer(machine, file, costs[file]).time(0.5, 1).value for file in (0, 1, 1, 0)]
    machine.loaded = False
    return math.sqrt(medians[1] * medians[2] / (medians[0] * medians[3]))


def simulate(number: int) -> dict[str, Any]:
    """Return what one search states, and what came later."""
    rng = np.random.default_rng(number)
    machine = Machine(rng)
    costs = (1.0, float(rng.uniform(0.2, 0.9)))
    stated = search(machine, costs)
    ends = {"occasions": (stated.expected_low, stated.expected_high), "one moment": before(machine, costs)}
    found = []
    for index in range(LATER):
        machine.pass_time(float(rng.uniform(0, 2 * HOUR / LATER)))
        found.append(later(machine, costs, busy=index % 4 == 3))
    return {
        "inside": {name: [low <= one <= high for one in found] for name, (low, high) in ends.items()},
        "half_width": {name: (high - low) / (high + low) for name, (low, high) in ends.items()},
        "quiet": (stated.quiet[2] - stated.quiet[1]) / (2 * stated.quiet[0]),
    }


def main() -> None:
    """Simulate searches and print how often what follows is inside."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.workers) as pool:
        made = list(pool.map(simulate, range(options.searches), chunksize=10))
    names = ("occasions", "one moment")
    document = {
        "searches": options.searches,
        "later": LATER,
        "coverage": {name: float(np.mean([one["inside"][name] for one in made])) for name in names},
        "median_half_width": {name: float(np.median([one["half_width"][name] for one in made])) for name in names},
        "median_half_width_quiet": float(np.median([one["quiet"] for one in made])),
    }
    write_json(RESULT, document)
    print(document)


if __name__ == "__main__":
    main()
