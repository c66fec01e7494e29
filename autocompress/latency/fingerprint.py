"""What a device is, as far as it decides latency: processor, instructions, core count. GPUs are not listed here."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

from autocompress import environment

_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
# Trade marks and clocks that say nothing a folder name needs.
_NOISE = re.compile(r"\(r\)|\(tm\)|\bcpu\b|\bprocessor\b|@.*$|\b\d+-core\b", re.IGNORECASE)


def device_fingerprint() -> dict[str, Any]:
    """Return what this device is, as JSON.

    ``cpu``, ``vendor``, ``family``, ``model``, ``stepping`` (as the system names them), ``cores`` (logical processors
    of the machine, whatever this process may use), ``features``, ``machine`` and ``system`` identify it; ``hash`` is
    over these. ``slug`` is for folder names: readable, stable, ending in six digits of the hash. ``governor`` (None
    where the system does not tell) can change and is in neither.
    """
    info = environment.cpu_info()
    identity: dict[str, Any] = {
        "cpu": environment.cpu_name(),
        "vendor": info.get("vendor_id") or info.get("CPU implementer") or "",
        "family": info.get("cpu family") or info.get("CPU architecture") or "",
        "model": info.get("model") or info.get("CPU part") or "",
        "stepping": info.get("stepping") or info.get("CPU revision") or "",
        "cores": os.cpu_count() or 1,
        "features": environment.cpu_features(),
        "machine": platform.machine(),
        "system": platform.system(),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^a-z0-9]+", "-", _NOISE.sub(" ", str(identity["cpu"])).lower()).strip("-") or "cpu"
    return {
        **identity,
        "governor": _read(_GOVERNOR).strip() or None,
        "hash": digest[:16],
        "slug": f"{name}-{identity['cores']}c-{digest[:6]}",
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
