"""The NVIDIA GPU that engines use, as NVML tells of it: identity, clocks, energy. Absent where NVML is.

NVML comes with the driver, its Python package ``nvidia-ml-py`` with the extra ``nvidia``. Neither is needed: without
them there is no GPU to tell of, and nothing is raised. Nothing is ever set.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

# Bits of nvmlClocksThrottleReasons (nvml.h); idling is none.
_THROTTLE_REASONS = {
    0x2: "clock set by a user",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


class Gpu:
    """One GPU. Made by `first_gpu`."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def identity(self) -> dict[str, Any]:
        """Return what decides latency: ``name, compute_capability, driver, clocks_mhz, power_limit_w``.

        Clocks are the highest of multiprocessors (``sm``) and memory. What the driver does not tell is None.
        """
        capability = self._ask("nvmlDeviceGetCudaComputeCapability", self._handle)
        limit = self._ask("nvmlDeviceGetEnforcedPowerLimit", self._handle)
        clocks = {
            name: self._ask("nvmlDeviceGetMaxClockInfo", self._handle, getattr(self._nvml, kind))
            for name, kind in (("sm", "NVML_CLOCK_SM"), ("memory", "NVML_CLOCK_MEM"))
        }
        return {
            "name": _text(self._ask("nvmlDeviceGetName", self._handle)),
            "compute_capability": None if capability is None else ".".join(map(str, capability)),
            "driver": _text(self._ask("nvmlSystemGetDriverVersion")),
            "clocks_mhz": clocks,
            "power_limit_w": None if limit is None else limit / 1e3,
        }

    def energy_j(self) -> float | None:
        """Return the energy used since the driver was loaded; None before Volta."""
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption", self._handle)
        return None if millijoules is None else millijoules / 1e3

    def clock_mhz(self) -> int | None:
        """Return the multiprocessors' clock now."""
        clock: int | None = self._ask("nvmlDeviceGetClockInfo", self._handle, self._nvml.NVML_CLOCK_SM)
        return clock

    def state(self) -> dict[str, Any]:
        """Return how it is now: ``temperature_c, power_w, memory_mhz``; None for what the driver does not tell."""
        power = self._ask("nvmlDeviceGetPowerUsage", self._handle)
        return {
            "temperature_c": self._ask("nvmlDeviceGetTemperature", self._handle, self._nvml.NVML_TEMPERATURE_GPU),
            "power_w": None if power is None else power / 1e3,
            "memory_mhz": self._ask("nvmlDeviceGetClockInfo", self._handle, self._nvml.NVML_CLOCK_MEM),
        }

    def throttle_reasons(self) -> tuple[str, ...]:
        """Return in words why the clock is not the highest; empty where it is, or where the driver does not tell."""
        mask = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", self._handle) or 0
        return tuple(words for bit, words in _THROTTLE_REASONS.items() if mask & bit)

    def _ask(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(*arguments)
        except self._nvml.NVMLError:  # not supported by this GPU, or lost
            return None


def first_gpu() -> Gpu | None:
    """Return the GPU that CUDA programs of this process take, the first they may see; None where NVML is silent."""
    nvml = _library()
    if nvml is None:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        if visible.startswith(("GPU-", "MIG-")):
            return Gpu(nvml, nvml.nvmlDeviceGetHandleByUUID(visible))
        return Gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(int(visible)))
    except (nvml.NVMLError, ValueError):  # "" and "-1" hide all
        return None


@cache
def _library() -> Any:
    """Return the initialised library, or None."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def _text(value: Any) -> str | None:
    # Bytes in releases of the package before 11.5.
    return value.decode() if isinstance(value, bytes) else value
