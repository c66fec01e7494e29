"""What a run ran on, for ``env.json`` and ``autocompress env``; seeds; the cache directory.

Versions are read from package metadata and devices from the system, so that describing a machine imports no framework.
It must not touch a device or measure anything: fingerprints of devices belong to `latency`.
"""

from __future__ import annotations

import os
import platform
import random
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from autocompress.errors import ConfigError

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
    "ray",
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
# `nvidia-smi` answers in well under a second, and hangs when a driver is broken.
_NVIDIA_SMI_SECONDS = 10.0


def describe() -> dict[str, Any]:
    """Return what this process runs on, as JSON: versions, system, processor, memory and GPUs."""
    model, features = _cpu()
    return {
        "python": platform.python_version(),
        "packages": package_versions(),
        "os": platform.platform(),
        "cpu": {
            "model": model,
            "architecture": platform.machine(),
            "logical": os.cpu_count() or 1,
            "allowed": allowed_cpus(),
            "features": features,
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


def seed_everything(seed: int) -> None:
    """Seed the generators of random, numpy and torch in this process."""
    import torch

    random.seed(seed)
    # numpy's legacy generator takes 32 bits; torch takes 64.
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def cache_directory() -> Path:
    """Return the folder for what can be made again, and make it.

    It is ``$AUTOCOMPRESS_CACHE``, else ``$XDG_CACHE_HOME/autocompress``, else ``~/.cache/autocompress``.

    Raises:
        ConfigError: It cannot be made.
    """
    own, shared = os.environ.get("AUTOCOMPRESS_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        folder = Path(own).expanduser()
    elif Path(shared).is_absolute():
        folder = Path(shared) / "autocompress"
    else:
        # The XDG specification has relative paths ignored.
        folder = Path("~/.cache/autocompress").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The cache folder {folder} cannot be made: {error.strerror or error}. Set AUTOCOMPRESS_CACHE to another."
        ) from error
    return folder


def _cpu() -> tuple[str, list[str]]:
    """Return the processor's name and which of `CPU_FEATURES` it has; none where the system does not tell."""
    lines: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        lines.setdefault(key.strip(), value.strip())
    name = lines.get("model name") or lines.get("Model") or platform.processor() or platform.machine() or "unknown"
    found = set((lines.get("flags") or lines.get("Features") or "").split())
    return name, [f for f in CPU_FEATURES if f in found]


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
