"""What disturbed a measurement, in words: other programs, the hypervisor, the clock.

Steal, pressure (PSI), quotas, clocks, interrupts, what shares the core. Reads counters before and after, never while
a call is timed, and judges no figures: whether the samples themselves look disturbed (spread, drift) is
`measurement.measure`'s to say. Linux tells all of this; elsewhere nothing is found.
Counters: proc(5) ``/proc/stat``, the kernel's cpufreq and thermal documentation.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
# The control group's own, as a container sees it: version 2, and version 1's file.
CGROUP = Path("/sys/fs/cgroup")
CPUS = Path("/sys/devices/system/cpu")
# Shares of the processors that were measured on; below them is the kernel's own housekeeping.
_OTHERS = 0.05
_STOLEN = 0.02
# Of one processor, beside those that were measured on: it shares memory, and the clock's headroom.
_BESIDE = 0.25
# Involuntary context switches a second; the kernel's own are a few.
_SWITCHES = 50
_CLOCK = 0.1
# Share of the time in which some program waited for a processor (the kernel's pressure stall information). A timed
# process and the one that asks it wait for each other on one processor, up to a sixth of the time.
_PRESSED = 0.3
# Processor time is counted in ticks of 10 ms: less than this many are no finding, and no shorter time is judged.
_TICKS = 4
_SHORTEST_S = 0.1


@dataclass(frozen=True)
class Disturbance:
    """One thing found.

    Attributes:
        reason: Words that end a sentence such as "noisy: …".
        harmful: Whether it falsifies latencies by itself; otherwise it only explains a spread that is there.
    """

    reason: str
    harmful: bool


@dataclass(frozen=True)
class _Counters:
    """Cumulative: seconds by processor, and events."""

    wall_s: float
    own_s: float
    busy_s: dict[int, float]
    stolen_s: dict[int, float]
    switches: int
    throttled: int
    held_back: int
    pressed_s: float


class Watch:
    """Watches the machine from its creation on.

    Args:
        threads: How many processors the measured program keeps busy.
        cpus: The processors it may run on; those of the calling thread by default.
        used: Returns what the measured program has used until now: seconds of processor time, and how often a processor
            was taken from it. Those of this process by default.
    """

    def __init__(
        self,
        threads: int,
        cpus: Collection[int] | None = None,
        used: Callable[[], tuple[float, int]] | None = None,
    ) -> None:
        self._threads, self._used = threads, used or used_here
        self._affinity = frozenset(_affinity())
        self._cpus = self._affinity if cpus is None else frozenset(cpus)
        self._clocks: list[float] = []
        self._before = self._read()

    def look(self) -> None:
        """Note the clock. Called between rounds."""
        found = [_number(CPUS / f"cpu{cpu}" / "cpufreq" / "scaling_cur_freq") for cpu in self._cpus]
        known = [khz for khz in found if khz]
        if known:
            self._clocks.append(sum(known) / len(known) / 1e6)

    def found(self) -> list[Disturbance]:
        """Return what has disturbed the measurement until now, the worst first."""
        before, now = self._before, self._read()
        wall = now.wall_s - before.wall_s
        if wall < _SHORTEST_S:
            return []
        found = [*self._programs(before, now, wall)]
        if self._used is used_here and frozenset(_affinity()) != self._affinity:
            found.append(Disturbance("something moved it to other processors meanwhile", False))
        stolen = _spent(before.stolen_s, now.stolen_s, self._cpus) / (wall * max(1, len(self._cpus)))
        if stolen > _STOLEN:
            found.append(Disturbance(f"the hypervisor took {stolen:.0%} of the processor's time", True))
        if now.throttled > before.throttled:
            found.append(Disturbance("the processor was too hot and throttled its clock", True))
        if now.held_back > before.held_back:
            found.append(Disturbance("the control group's processor quota was used up, and it was held back", True))
        pressed = (now.pressed_s - before.pressed_s) / wall
        if pressed > _PRESSED:
            found.append(Disturbance(f"programs waited for a processor {pressed:.0%} of the time", False))
        if self._clocks and (low := min(self._clocks)) < (high := max(self._clocks)) * (1 - _CLOCK):
            found.append(Disturbance(f"the clock moved between {low:.2f} and {high:.2f} GHz", False))
        switches = (now.switches - before.switches) / wall
        if switches > _SWITCHES:
            found.append(Disturbance(f"it was interrupted {switches:.0f} times a second", False))
        return sorted(found, key=lambda disturbance: not disturbance.harmful)

    def _programs(self, before: _Counters, now: _Counters, wall: float) -> list[Disturbance]:
        """Find other programs: on the processors measured on, on the other half of their cores, and beside them."""
        found = []
        least = _TICKS * _tick_s()
        spent = _spent(before.busy_s, now.busy_s, self._cpus) - (now.own_s - before.own_s)
        # Where more processors are allowed than used, another program may have had one to itself.
        spare = max(0, len(self._cpus) - self._threads)
        if spent > least and spent / wall > spare + _OTHERS * self._threads:
            share, where = spent / wall, "a processor that was measured on"
            if len(self._cpus) > 1:
                share, where = share / len(self._cpus), f"the {len(self._cpus)} processors that were measured on"
            found.append(Disturbance(f"other programs used {min(share, 1):.0%} of {where}", True))
        halves = frozenset(half for cpu in self._cpus for half in siblings(cpu)) - self._cpus
        beside = frozenset(now.busy_s) - self._cpus - halves
        for cpus, words, harmful in (
            (halves, "on the other half of a core that was measured on", True),
            (beside, "beside those that were measured on", False),
        ):
            share = _spent(before.busy_s, now.busy_s, cpus) / wall
            if share > _BESIDE:
                said = f"other programs used {share:.0%} of a processor {words}"
                found.append(Disturbance(said, harmful))
        return found

    def _read(self) -> _Counters:
        busy, stolen = _processor_times()
        throttled = sum(_number(CPUS / f"cpu{c}" / "thermal_throttle" / "core_throttle_count") or 0 for c in self._cpus)
        own, switches = self._used()
        return _Counters(
            time.monotonic(), own, busy, stolen, switches, int(throttled), _held_back(), _pressed_s()
        )  # fmt: skip


def _affinity() -> Collection[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _processor_times() -> tuple[dict[int, float], dict[int, float]]:
    """Return the seconds that each processor was busy, and that the hypervisor took from it; empty if untold."""
    busy: dict[int, float] = {}
    stolen: dict[int, float] = {}
    tick = _tick_s()
    try:
        lines = (PROC / "stat").read_text().splitlines()
    except OSError:
        return busy, stolen
    for line in lines:
        name, *numbers = line.split()
        # The first line sums up all processors. Guests' time is in user and nice already.
        if name.startswith("cpu") and name[3:].isdigit() and len(numbers) >= 7:
            user, nice, system, _idle, _iowait, irq, softirq, *rest = map(int, numbers)
            busy[int(name[3:])] = (user + nice + system + irq + softirq) * tick
            stolen[int(name[3:])] = (rest[0] if rest else 0) * tick
    return busy, stolen


def _spent(before: dict[int, float], now: dict[int, float], cpus: Collection[int]) -> float:
    return sum(now[cpu] - before[cpu] for cpu in cpus if cpu in now and cpu in before)


def siblings(cpu: int) -> set[int]:
    """Return the processors of one core, as hyper-threads are; the kernel writes ``0,4`` or ``0-1``."""
    found: set[int] = set()
    try:
        text = (CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
        for part in text.strip().split(","):
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    except (OSError, ValueError):
        return {cpu}
    return found


def used_here() -> tuple[float, int]:
    """Return this process's processor time in s, and how often it lost its processor to another."""
    return time.process_time(), _switches()


def _switches() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _held_back() -> int:
    """Return how often the control group's quota stopped its programs; 0 where there is none."""
    for name in ("cpu.stat", "cpu/cpu.stat"):
        with contextlib.suppress(OSError, ValueError):
            fields = dict(line.split() for line in (CGROUP / name).read_text().splitlines())
            return int(fields.get("nr_throttled", 0))
    return 0


def _pressed_s() -> float:
    """Return the seconds since the start of the machine in which some program waited for a processor; 0 if untold."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        first = (PROC / "pressure" / "cpu").read_text().splitlines()[0]
        return int(first.rpartition("total=")[2]) / 1e6
    return 0.0


def _tick_s() -> float:
    return 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None
