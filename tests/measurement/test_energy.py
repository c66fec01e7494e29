from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autocompress.measurement import energy
from autocompress.measurement.energy import EnergyMeter, per_call_mj


class Powercap:
    """A folder as Linux shows RAPL: a package with its cores and memory, and the whole system beside it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder, name in (
            ("intel-rapl:0", "package-0"),
            ("intel-rapl:0:0", "core"),
            ("intel-rapl:0:1", "dram"),
            ("intel-rapl:1", "psys"),
            ("dtpm", "dtpm"),
        ):
            (root / folder).mkdir(parents=True)
            (root / folder / "name").write_text(name + "\n")
            (root / folder / "max_energy_range_uj").write_text("1000000\n")
            self.set(folder, 100_000)

    def set(self, folder: str, microjoules: int) -> None:
        (self.root / folder / "energy_uj").write_text(f"{microjoules}\n")


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Powercap:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    return Powercap(tmp_path)


def used(meter: EnergyMeter, before: float | None) -> float:
    now = meter.read()
    assert before is not None and now is not None
    return now - before


def test_package_and_memory_are_added_and_nothing_twice(powercap: Powercap) -> None:
    meter = EnergyMeter()
    before = meter.read()
    powercap.set("intel-rapl:0", 400_000)
    powercap.set("intel-rapl:0:0", 300_000)
    powercap.set("intel-rapl:0:1", 150_000)
    powercap.set("intel-rapl:1", 900_000)
    assert used(meter, before) == pytest.approx(0.35)


def test_a_counter_that_starts_again(powercap: Powercap) -> None:
    meter = EnergyMeter()
    before = meter.read()
    powercap.set("intel-rapl:0", 950_000)
    meter.read()
    powercap.set("intel-rapl:0", 50_000)
    assert used(meter, before) == pytest.approx(0.95)
    powercap.set("intel-rapl:0", 20_000)
    assert used(meter, before) == pytest.approx(1.92)


def test_absent_unreadable_or_lost(powercap: Powercap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = EnergyMeter()
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.read() is None
    (tmp_path / "intel-rapl:0:1" / "energy_uj").write_text("not a number")
    assert EnergyMeter().read() is None
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "nowhere")
    assert EnergyMeter().read() is None


def test_a_gpu_counts_alone(powercap: Powercap, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([10.0, 12.5])
    monkeypatch.setattr(energy, "first_gpu", lambda: SimpleNamespace(energy_j=lambda: next(readings)))
    meter = EnergyMeter(gpu=True)
    before = meter.read()
    powercap.set("intel-rapl:0", 900_000)
    assert used(meter, before) == 2.5
    monkeypatch.setattr(energy, "first_gpu", lambda: None)
    assert EnergyMeter(gpu=True).read() is None


@pytest.mark.parametrize(
    ("joules", "calls", "expected"),
    [([0.5, 1.5], 1000, 2.0), ([0.5, None], 1000, None), ([], 10, None), ([None], 10, None), ([0.0], 10, 0.0)],
)
def test_energy_of_a_call(joules: list[Any], calls: int, expected: float | None) -> None:
    assert per_call_mj(joules, calls) == expected
