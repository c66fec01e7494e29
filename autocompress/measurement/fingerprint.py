"""What a device is, as far as it decides latency, and how engines ran on it; and what differs between two of these.

A measurement holds where it was taken. `differences` says in words why it does not hold elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autocompress import environment
from autocompress.measurement.nvml import first_gpu

_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
# Trade marks and clocks that say nothing a folder name needs.
_NOISE = re.compile(r"\(r\)|\(tm\)|\bcpu\b|\bprocessor\b|@.*$|\b\d+-core\b", re.IGNORECASE)
# What `differences` calls the entries. The hash and the slug follow from the others.
_WORDS = {
    "cpu": "processor",
    "vendor": "processor vendor",
    "family": "processor family",
    "model": "processor model",
    "stepping": "processor stepping",
    "cores": "logical processors",
    "machine": "architecture",
    "system": "system",
    "governor": "clock governor",
    "engine": "engine",
    "engine_version": "engine version",
    "threads": "threads",
    "batch_size": "batch size",
}
_GPU_WORDS = {
    "name": "GPU",
    "compute_capability": "GPU compute capability",
    "driver": "GPU driver",
    "clocks_mhz": "highest GPU clocks in MHz",
    "power_limit_w": "GPU power limit in W",
}


def device_fingerprint(*, gpu: bool = False) -> dict[str, Any]:
    """Return what this device is, as JSON.

    ``cpu``, ``vendor``, ``family``, ``model``, ``stepping`` (as the system names them), ``cores`` (logical processors
    of the machine, whatever this process may use), ``features``, ``machine`` and ``system`` identify it; ``hash`` is
    over these. ``slug`` is for folder names: readable, stable, ending in six digits of the hash. ``governor`` (None
    where the system does not tell) can change and is in neither.

    With `gpu`, for engines that run on one, ``gpu`` holds its ``name, compute_capability, driver, clocks_mhz`` (the
    highest of ``sm`` and ``memory``) and ``power_limit_w`` where NVML answers, and name and compute capability identify
    the device too. It is None otherwise.
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
    found = first_gpu() if gpu else None
    card = None if found is None else found.identity()
    # Without a GPU the hash is what it was before GPUs were listed.
    hashed = identity if card is None else {**identity, "gpu": [card["name"], card["compute_capability"]]}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    name = _plain((card and card["name"]) or identity["cpu"]) or "cpu"
    return {
        **identity,
        "governor": _read(_GOVERNOR).strip() or None,
        "gpu": card,
        "hash": digest[:16],
        "slug": f"{name}-{identity['cores']}c-{digest[:6]}",
    }


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Say what differs between two fingerprints, one sentence part each; empty when latencies carry over.

    `expected` is that of what was measured, `found` that of here and now. An entry that one of them lacks, or that the
    system did not tell, is not compared: an old record says less, but not something else.
    """
    said = _compare(expected, found, _WORDS)
    if "features" in expected and "features" in found:
        before, now = set(expected["features"]), set(found["features"])
        if missing := sorted(before - now):
            said.append(f"processor instructions missing here: {', '.join(missing)}")
        if added := sorted(now - before):
            said.append(f"processor instructions only here: {', '.join(added)}")
    if "gpu" in expected and "gpu" in found:
        before_gpu, now_gpu = expected["gpu"], found["gpu"]
        if bool(before_gpu) != bool(now_gpu):
            names = [card["name"] if card else "none" for card in (before_gpu, now_gpu)]
            said.append(f"GPU: {names[0]}, here {names[1]}")
        elif before_gpu:
            said += _compare(before_gpu, now_gpu, _GPU_WORDS)
    return said


def _compare(expected: Mapping[str, Any], found: Mapping[str, Any], words: Mapping[str, str]) -> list[str]:
    said = []
    for key, word in words.items():
        before, now = expected.get(key), found.get(key)
        # Tables come from text files: 1 and "1" are the same.
        if before is not None and now is not None and _shown(before) != _shown(now):
            said.append(f"{word}: {_shown(before)}, here {_shown(now)}")
    return said


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value) or "unnamed"


def _plain(name: Any) -> str:
    return re.sub(r"[^a-z0-9]+", "-", _NOISE.sub(" ", str(name)).lower()).strip("-")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
