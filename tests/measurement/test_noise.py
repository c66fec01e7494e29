from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autocompress.measurement import noise
from autocompress.measurement.noise import Disturbance, Watch


class System:
    """A machine of two cores of two halves each (0 and 2, 1 and 3), whose counters a test moves."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.busy, self.stolen = [0.0] * 4, [0.0] * 4
        self.wall = self.own = 0.0
        self.switches = 0
        for cpu in range(4):
            self.write(f"cpu{cpu}/topology/thread_siblings_list", f"{cpu % 2},{cpu % 2 + 2}\n")
        monkeypatch.setattr(noise, "PROC", folder)
        monkeypatch.setattr(noise, "CPUS", folder)
        monkeypatch.setattr(noise, "CGROUP", folder / "cgroup")
        monkeypatch.setattr(noise, "_tick_s", lambda: 0.01)
        monkeypatch.setattr(noise, "_switches", lambda: self.switches)
        monkeypatch.setattr(noise.time, "monotonic", lambda: self.wall)
        monkeypatch.setattr(noise.time, "process_time", lambda: self.own)
        self.stat()

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)

    def stat(self) -> None:
        lines = ["cpu  1 2 3 4 5 6 7 8 9 10"]
        for cpu, (busy, stolen) in enumerate(zip(self.busy, self.stolen, strict=True)):
            ticks = round(busy * 100)
            # user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice
            lines.append(f"cpu{cpu} {ticks // 2} 0 {ticks - ticks // 2} 7777 5 0 0 {round(stolen * 100)} 99 0")
        self.write("stat", "\n".join([*lines, "intr 123 4 5", "ctxt 99"]) + "\n")

    def go(self, seconds: float, *busy: float, own: float = 0.0, stolen: float = 0.0) -> None:
        """Let time pass with processors busy for these shares, and this program for `own` of one."""
        self.wall += seconds
        self.own += own * seconds
        for cpu, share in enumerate(busy):
            self.busy[cpu] += share * seconds
        self.stolen[1] += stolen * seconds
        self.stat()


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    return System(tmp_path, monkeypatch)


def test_alone(system: System) -> None:
    watch = Watch(1, [1])
    watch.look()
    system.go(2.5, 0.05, 1.0, 0.02, 0.02, own=0.99)
    assert watch.found() == []


def test_another_program_on_the_same_processor(system: System) -> None:
    watch = Watch(1, [1])
    system.go(2.0, 0, 1.0, 0, 0, own=0.52)
    assert watch.found() == [Disturbance("other programs used 48% of a processor that was measured on", True)]


def test_another_program_on_the_other_half_and_beside(system: System) -> None:
    watch = Watch(1, [1])
    system.go(2.0, 0.7, 1.0, 0.1, 0.9, own=1.0)
    assert watch.found() == [
        Disturbance("other programs used 90% of a processor on the other half of a core that was measured on", True),
        Disturbance("other programs used 80% of a processor beside those that were measured on", False),
    ]


def test_only_what_happens_while_watching_counts(system: System) -> None:
    system.go(100.0, 1, 1, 1, 1, stolen=1)
    watch = Watch(1, [1])
    system.go(1.0, 0, 1, 0, 0, own=1)
    assert watch.found() == []


def test_processors_to_spare_are_not_contended(system: System) -> None:
    watch = Watch(1, [0, 1, 2, 3])
    system.go(2.0, 1.0, 1.0, 0.4, 0.4, own=1.0)
    assert watch.found() == []
    watch = Watch(4, [0, 1, 2, 3])
    system.go(2.0, 1.0, 1.0, 1.0, 1.0, own=3.0)
    assert watch.found() == [Disturbance("other programs used 25% of the 4 processors that were measured on", True)]


def test_ticks_are_coarse(system: System) -> None:
    watch = Watch(1, [1])
    system.go(0.3, 0, 1.0, 0, 0, own=0.9)  # three ticks
    assert watch.found() == []
    watch = Watch(1, [1])
    system.go(0.05, 1, 1.0, 1, 1, own=0.1)
    assert watch.found() == []


@pytest.mark.parametrize("name", ["cpu.stat", "cpu/cpu.stat"])
def test_a_quota_that_is_used_up(system: System, name: str) -> None:
    system.write(f"cgroup/{name}", "nr_periods 100\nnr_throttled 7\n")
    watch = Watch(1, [1])
    system.go(2.0, 0, 1.0, 0, 0, own=1.0)
    assert watch.found() == []
    system.write(f"cgroup/{name}", "nr_periods 120\nnr_throttled 9\n")
    assert watch.found() == [Disturbance("the control group's processor quota was used up, and it was held back", True)]
    system.write(f"cgroup/{name}", "damaged")
    assert Watch(1, [1]).found() == []


def test_programs_that_wait_for_a_processor(system: System) -> None:
    system.write("pressure/cpu", "some avg10=2.75 avg60=4.33 avg300=4.52 total=1000000\nfull avg10=0 total=0\n")
    watch = Watch(1, [1])
    system.go(2.0, 0, 1.0, 0, 0, own=1.0)
    system.write("pressure/cpu", "some avg10=2.75 avg60=4.33 avg300=4.52 total=1800000\nfull avg10=0 total=0\n")
    assert watch.found() == [Disturbance("programs waited for a processor 40% of the time", False)]


def test_what_another_process_used_is_its_own(system: System) -> None:
    used = [(0.0, 0)]
    watch = Watch(1, [1], lambda: used[0])
    system.go(2.0, 0, 1.0, 0, 0)
    used[0] = (1.98, 3)
    assert watch.found() == []
    used[0] = (1.0, 300)
    assert [one.reason for one in watch.found()] == [
        "other programs used 50% of a processor that was measured on", "it was interrupted 150 times a second",
    ]  # fmt: skip


def test_the_hypervisor(system: System) -> None:
    watch = Watch(1, [1])
    system.go(2.0, 0, 0.9, 0, 0, own=0.9, stolen=0.1)
    assert watch.found() == [Disturbance("the hypervisor took 10% of the processor's time", True)]


def test_the_clock_and_its_throttling(system: System) -> None:
    system.write("cpu1/cpufreq/scaling_cur_freq", "3500000\n")
    system.write("cpu1/thermal_throttle/core_throttle_count", "4\n")
    watch = Watch(1, [1])
    watch.look()
    system.write("cpu1/cpufreq/scaling_cur_freq", "3300000\n")
    watch.look()
    system.go(1.0, 0, 1, 0, 0, own=1)
    assert watch.found() == []
    system.write("cpu1/cpufreq/scaling_cur_freq", "2100000\n")
    system.write("cpu1/thermal_throttle/core_throttle_count", "5\n")
    watch.look()
    assert watch.found() == [
        Disturbance("the processor was too hot and throttled its clock", True),
        Disturbance("the clock moved between 2.10 and 3.50 GHz", False),
    ]


def test_interruptions(system: System) -> None:
    watch = Watch(1, [1])
    system.switches += 300
    system.go(2.0, 0, 1, 0, 0, own=1)
    assert watch.found() == [Disturbance("it was interrupted 150 times a second", False)]


def test_moved_to_other_processors(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(1, [1])
    system.go(1.0, 0, 1, 0, 0, own=1)
    monkeypatch.setattr(noise, "_affinity", lambda: {97, 98})
    assert watch.found() == [Disturbance("something moved it to other processors meanwhile", False)]


def test_a_system_that_tells_nothing(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "PROC", tmp_path / "nowhere")
    monkeypatch.setattr(noise, "CPUS", tmp_path / "nowhere")
    watch = Watch(1, [1])
    watch.look()
    system.go(1.0, 1, 1, 1, 1)
    assert watch.found() == []


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc/stat")
def test_a_real_program_on_the_same_processor() -> None:
    before = os.sched_getaffinity(0)
    cpu = min(before)
    os.sched_setaffinity(0, {cpu})
    # Started now, it inherits the one processor.
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        watch = Watch(1)
        spin(1.0)
        found = watch.found()
    finally:
        other.kill()
        other.wait()
        os.sched_setaffinity(0, before)
    assert any("of a processor that was measured on" in f.reason and f.harmful for f in found)
