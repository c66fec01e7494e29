"""Energy used by the device: processor packages and their memory by RAPL, or the GPU by NVML. Absent where untold.

The counters are of the whole device, idle share and other programs included, so that energies compare like latencies:
interleaved, on a quiet machine. Linux lets only root read RAPL's (CVE-2020-8694). Source: the kernel's powercap
documentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autocompress.measurement.nvml import Gpu, first_gpu

POWERCAP = Path("/sys/class/powercap")
# `core` and `uncore` are parts of a package, `psys` holds packages: adding them would count twice.
_COUNTED = ("package", "dram")


class EnergyMeter:
    """Reads one growing sum of joules.

    Args:
        gpu: Whether the engine runs on the GPU, whose energy alone then counts.
    """

    def __init__(self, *, gpu: bool = False) -> None:
        self._gpu: Gpu | None = first_gpu() if gpu else None
        self._domains = [] if gpu else _domains()

    def read(self) -> float | None:
        """Return joules since some moment in the past; None where the device does not tell, or no longer does."""
        if self._gpu is not None:
            return self._gpu.energy_j()
        joules = [domain.read() for domain in self._domains]
        known = [j for j in joules if j is not None]
        return sum(known) if known and len(known) == len(joules) else None


@dataclass
class _Domain:
    """One counter of RAPL, which starts again at 0 after `range_uj`."""

    path: Path
    range_uj: int
    last_uj: int
    wrapped_uj: int = 0

    def read(self) -> float | None:
        now = _integer(self.path)
        if now is None:
            return None
        if now < self.last_uj:
            self.wrapped_uj += self.range_uj
        self.last_uj = now
        return (self.wrapped_uj + now) / 1e6


def _domains() -> list[_Domain]:
    found = []
    # intel-rapl (also AMD's) has one folder per package and one per part of it, all links beside each other.
    for folder in sorted(POWERCAP.glob("intel-rapl:*")):
        now, reach = _integer(folder / "energy_uj"), _integer(folder / "max_energy_range_uj")
        if _name(folder).startswith(_COUNTED) and now is not None and reach is not None:
            found.append(_Domain(folder / "energy_uj", reach, now))
    return found


def per_call_mj(joules: Sequence[float | None], calls: int) -> float | None:
    """Return the energy of one call in mJ from what every slice used; None when one of them is unknown."""
    known = [j for j in joules if j is not None]
    return sum(known) / calls * 1e3 if known and len(known) == len(joules) else None


def _name(folder: Path) -> str:
    try:
        return (folder / "name").read_text().strip()
    except OSError:
        return ""


def _integer(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
