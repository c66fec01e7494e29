"""What disturbed a measurement on a GPU: its clock, its temperature, and why the driver held it back.

Read through NVML between rounds; nothing is ever set. Where NVML does not tell, nothing is found.
"""

from __future__ import annotations

from typing import Any

from autocompress.measurement.noise import Disturbance
from autocompress.measurement.nvml import Gpu

# Reasons of the driver that slow a GPU down, as opposed to idling or a clock that somebody set.
_HARMFUL = frozenset({"power cap", "hardware slowdown", "thermal slowdown", "hardware thermal slowdown", "power brake"})
_CLOCK = 0.05
# A clock that never moved over so many looks, below the highest there is, was locked.
_LOOKS = 5


class GpuWatch:
    """Watches a GPU from its creation on."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._clocks: list[int] = []
        self._reasons: set[str] = set()
        self._state = gpu.state()

    def look(self) -> None:
        """Note clock and throttling. Called between rounds."""
        clock = self._gpu.clock_mhz()
        if clock is not None:
            self._clocks.append(clock)
        self._reasons |= set(self._gpu.throttle_reasons())

    def summary(self) -> dict[str, Any]:
        """Return what a measurement records: clocks in MHz, temperature in °C, power in W, reasons, locked clock."""
        state = self._gpu.state()
        return {
            **state,
            "temperature_before_c": self._state["temperature_c"],
            "sm_mhz": [min(self._clocks), max(self._clocks)] if self._clocks else None,
            "throttle_reasons": sorted(self._reasons),
            "clock_locked": self._locked(),
        }

    def _locked(self) -> bool | None:
        """Whether the clock was held fixed; None where that cannot be told."""
        highest = self._gpu.identity()["clocks_mhz"]["sm"]
        if len(self._clocks) < _LOOKS or highest is None:
            return None
        return len(set(self._clocks)) == 1 and self._clocks[0] < highest and not self._reasons & _HARMFUL

    def found(self) -> list[Disturbance]:
        """Return what has disturbed the measurement until now."""
        found = [
            Disturbance(f"the driver held the GPU back: {reason}", True) for reason in sorted(self._reasons & _HARMFUL)
        ]
        if self._clocks and (low := min(self._clocks)) < (high := max(self._clocks)) * (1 - _CLOCK):
            found.append(
                Disturbance(f"the GPU's clock moved between {low} and {high} MHz (nvidia-smi -lgc locks it)", False)
            )
        return found
