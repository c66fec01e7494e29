"""What a run ran on, for ``env.json`` and ``autocompress env``; the cache directory.

Versions are read from package metadata and devices from the system, so that describing a machine imports no framework.
It must not touch a device or measure anything: fingerprints of devices belong to `measurement.fingerprint`.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

# Distributions whose version can change a result; those that are not installed are left out.
PACKAGES = (
    "autocompress",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "optuna",
    "pandas",
    "pydantic",
    "scikit-learn",
    "scipy",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "torch",
    "torch-pruning",
    "torchvision",
)
# Instructions that decide whether int8 and bf16 pay, as Linux names them (x86, then Arm).
CPU_FEATURES = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
CPUINFO = Path("/proc/cpuinfo")
# `nvidia-smi` answers in well under a second, and hangs when a driver is broken.
_NVIDIA_SMI_SECONDS = 10.0
# The C library that this process runs with.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def describe() -> dict[str, Any]:
    """Return what this process runs on, as JSON: versions, system, processor, memory and GPUs."""
    return {
        "python": platform.python_version(),
        "packages": package_versions(),
        "os": platform.platform(),
        "cpu": {
            "model": cpu_name(),
            "architecture": platform.machine(),
            "logical": os.cpu_count() or 1,
            "allowed": allowed_cpus(),
            "features": cpu_features(),
        },
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of the installed `PACKAGES` without importing them."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def allowed_cpus() -> int:
    """Return how many logical processors this process may run on; fewer than the machine's under affinity limits."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def cache_directory() -> Path:
    """Return the folder for what can be made again; it may not exist yet.

    It is ``$AUTOCOMPRESS_CACHE``, else ``$XDG_CACHE_HOME/autocompress``, else ``~/.cache/autocompress``.
    """
    own, shared = os.environ.get("AUTOCOMPRESS_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        folder = Path(own).expanduser()
    elif Path(shared).is_absolute():
        folder = Path(shared) / "autocompress"
    else:
        # The XDG specification has relative paths ignored.
        folder = Path("~/.cache/autocompress").expanduser()
    return folder


def release_memory() -> None:
    """Give freed memory back to the system, which glibc keeps between allocations that live; milliseconds.

    Elsewhere, nothing is done.
    """
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


def cpu_info() -> dict[str, str]:
    """Return the first processor's entries of ``/proc/cpuinfo``; empty where there is none."""
    found: dict[str, str] = {}
    try:
        text = CPUINFO.read_text(errors="replace")
    except OSError:
        return found
    for line in text.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    info = cpu_info()
    return info.get("model name") or info.get("Model") or platform.processor() or platform.machine() or "unknown"


def cpu_features() -> list[str]:
    """Return which of `CPU_FEATURES` the processor has; none where the system does not tell."""
    info = cpu_info()
    found = set((info.get("flags") or info.get("Features") or "").split())
    return [feature for feature in CPU_FEATURES if feature in found]


def _gpus() -> list[dict[str, str]]:
    """Return name, driver and memory of every NVIDIA GPU; none when ``nvidia-smi`` is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in answer.stdout.splitlines()]
    return [dict(zip(("name", "driver", "memory"), row, strict=True)) for row in rows if len(row) == 3]
