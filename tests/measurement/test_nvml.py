"""NVML as ``nvidia-ml-py`` shows it, on a machine without a GPU: the package's own names, answered by hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from autocompress.measurement import nvml
from autocompress.measurement.gpu_noise import GpuWatch
from autocompress.measurement.nvml import first_gpu


class NVMLError(Exception):
    pass


def library(**changes: Any) -> ModuleType:
    def by_index(index: int) -> str:
        if not 0 <= index <= 1:
            raise NVMLError("invalid argument")
        return f"card {index}"

    made = ModuleType("pynvml")
    vars(made).update(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=by_index,
        nvmlDeviceGetHandleByUUID=lambda uuid: f"card {uuid}",
        nvmlDeviceGetName=lambda handle: f"NVIDIA {handle}",
        nvmlDeviceGetCudaComputeCapability=lambda _: (8, 9),
        nvmlSystemGetDriverVersion=lambda: "595.71.05",
        nvmlDeviceGetMaxClockInfo=lambda _, kind: {1: 2520, 2: 10501}[kind],
        nvmlDeviceGetClockInfo=lambda *_: 1980,
        nvmlDeviceGetEnforcedPowerLimit=lambda _: 72_000,
        nvmlDeviceGetTotalEnergyConsumption=lambda _: 12_345,
        nvmlDeviceGetTemperature=lambda *_: 61,
        nvmlDeviceGetPowerUsage=lambda _: 58_500,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda _: 0x1,
    )
    vars(made).update(changes)
    return made


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    nvml._library.cache_clear()
    yield
    nvml._library.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library(**changes))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def fail(*_: Any) -> Any:
    raise NVMLError("not supported")


def test_identity_clocks_and_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    gpu = first_gpu()
    assert gpu is not None
    assert gpu.identity() == {
        "name": "NVIDIA card 0",
        "compute_capability": "8.9",
        "driver": "595.71.05",
        "clocks_mhz": {"sm": 2520, "memory": 10501},
        "power_limit_w": 72.0,
    }
    assert gpu.energy_j() == 12.345
    assert gpu.clock_mhz() == 1980


def test_the_state_of_a_gpu_and_why_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = iter([0x1, 0x4 | 0x40, 0x2])
    install(monkeypatch, nvmlDeviceGetCurrentClocksThrottleReasons=lambda _: next(reasons))
    gpu = first_gpu()
    assert gpu is not None
    assert gpu.state() == {"temperature_c": 61, "power_w": 58.5, "memory_mhz": 1980}
    assert gpu.throttle_reasons() == ()
    assert gpu.throttle_reasons() == ("power cap", "hardware thermal slowdown")
    assert gpu.throttle_reasons() == ("clock set by a user",)


def watched(monkeypatch: pytest.MonkeyPatch, clocks: list[int], reasons: int = 0) -> GpuWatch:
    left = list(clocks)
    install(
        monkeypatch,
        nvmlDeviceGetClockInfo=lambda _, kind: 10501 if kind == 2 else left.pop(0),
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda _: reasons,
    )
    gpu = first_gpu()
    assert gpu is not None
    made = GpuWatch(gpu)
    for _ in clocks:
        made.look()
    return made


def test_a_gpu_that_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    steady = watched(monkeypatch, [2520] * 6)
    assert steady.found() == []
    assert steady.summary() == {
        "temperature_c": 61, "power_w": 58.5, "memory_mhz": 10501, "temperature_before_c": 61, "sm_mhz": [2520, 2520],
        "throttle_reasons": [], "clock_locked": False,
    }  # fmt: skip
    nvml._library.cache_clear()
    assert watched(monkeypatch, [1410] * 6, 0x2).summary()["clock_locked"] is True
    nvml._library.cache_clear()
    moving = watched(monkeypatch, [1980, 1980, 1200], 0x4)
    slowed, moved = moving.found()
    assert slowed.harmful and "power cap" in slowed.reason
    assert not moved.harmful and "between 1200 and 1980 MHz" in moved.reason
    assert moving.summary()["clock_locked"] is None  # three looks say too little


def test_what_a_card_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        monkeypatch,
        nvmlDeviceGetTotalEnergyConsumption=fail,
        nvmlDeviceGetEnforcedPowerLimit=fail,
        nvmlDeviceGetMaxClockInfo=fail,
        nvmlDeviceGetName=lambda _: b"Tesla P4",
    )
    gpu = first_gpu()
    assert gpu is not None
    assert gpu.energy_j() is None
    identity = gpu.identity()
    assert identity["name"] == "Tesla P4"
    assert identity["power_limit_w"] is None and identity["clocks_mhz"] == {"sm": None, "memory": None}


@pytest.mark.parametrize(
    ("visible", "name"),
    [("1,0", "NVIDIA card 1"), ("GPU-abc", "NVIDIA card GPU-abc"), ("", None), ("-1", None), ("7", None)],
)
def test_the_first_visible_gpu(monkeypatch: pytest.MonkeyPatch, visible: str, name: str | None) -> None:
    install(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = first_gpu()
    assert (gpu.identity()["name"] if gpu else None) == name


def test_without_driver_or_package(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, nvmlInit=fail)
    assert first_gpu() is None
    nvml._library.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert first_gpu() is None


def test_the_names_are_the_packages_own() -> None:
    real = pytest.importorskip("pynvml", reason="nvidia-ml-py is optional")
    assert isinstance(real, ModuleType | SimpleNamespace)
    assert [name for name in vars(library()) if not name.startswith("__") and not hasattr(real, name)] == []
