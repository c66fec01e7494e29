"""What a machine says of itself, seeds, and the cache folder."""

from __future__ import annotations

import json
import platform
import random
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autocompress import environment
from autocompress.tasks.seeding import seed_everything


def test_describe_is_json_with_versions_and_devices() -> None:
    found = json.loads(json.dumps(environment.describe()))
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["cpu"]["model"]
    assert 1 <= found["cpu"]["allowed"] <= found["cpu"]["logical"]
    assert found["memory_bytes"] > 2**20


def test_describe_imports_no_framework() -> None:
    code = (
        "import sys; from autocompress.environment import describe; describe();"
        "print([m for m in ('torch', 'optuna', 'pandas', 'openvino', 'onnxruntime') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_packages_that_are_missing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("numpy", "no-such-package"))
    assert environment.package_versions() == {"numpy": np.__version__}


def nvidia_smi(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_gpus_as_nvidia_smi_names_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvidia_smi(monkeypatch, tmp_path, "echo 'NVIDIA A10, 570.1, 24564 MiB'; echo 'NVIDIA L4, 570.1, 23034 MiB'")
    assert environment.describe()["gpus"] == [
        {"name": "NVIDIA A10", "driver": "570.1", "memory": "24564 MiB"},
        {"name": "NVIDIA L4", "driver": "570.1", "memory": "23034 MiB"},
    ]


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'", "exec sleep 5"])
def test_a_broken_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    monkeypatch.setattr(environment, "_NVIDIA_SMI_SECONDS", 0.5)
    nvidia_smi(monkeypatch, tmp_path, script)
    assert environment.describe()["gpus"] == []


def test_no_nvidia_smi_is_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.describe()["gpus"] == []


@pytest.mark.parametrize("text", [None, "", "model name\t: Some CPU\nflags\t\t: fpu avx2 avx512_vnni\n"])
def test_the_processor_has_a_name_wherever_it_hides(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    def read(*_: Any, **__: Any) -> str:
        if text is None:
            raise FileNotFoundError
        return text

    monkeypatch.setattr(Path, "read_text", read)
    cpu = environment.describe()["cpu"]
    assert cpu["model"]
    assert cpu["features"] == (["avx2", "avx512_vnni"] if text else [])


@pytest.mark.parametrize("seed", [0, 2**40])
def test_seeds_repeat_every_generator(seed: int) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_everything(seed)
    first = draw()
    assert draw() != first
    seed_everything(seed)
    assert draw() == first


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"AUTOCOMPRESS_CACHE": "{}/own", "XDG_CACHE_HOME": "{}/xdg"}, "own"),
        ({"AUTOCOMPRESS_CACHE": "~/own"}, "home/own"),
        ({"XDG_CACHE_HOME": "{}/xdg"}, "xdg/autocompress"),
        ({"XDG_CACHE_HOME": "relative"}, "home/.cache/autocompress"),
        ({}, "home/.cache/autocompress"),
    ],
)
def test_the_cache_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], expected: str
) -> None:
    monkeypatch.delenv("AUTOCOMPRESS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert environment.cache_directory() == tmp_path / expected
