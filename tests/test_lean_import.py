"""What is slow to import is imported when it is used: a bare import, ``--help`` and the measuring process stay lean."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import pytest

import autocompress
import autocompress.engines
import autocompress.measurement

HEAVY = ("torch", "torchvision", "optuna", "pandas", "scipy", "onnx", "openvino", "onnxruntime", "sklearn", "plotly")


def loaded(code: str, *arguments: str) -> tuple[float, list[str]]:
    """Run code in a fresh interpreter; return its seconds, without the interpreter's own start, and what it loaded."""
    frame = (
        "import json, sys, time; start = time.perf_counter()\n"
        f"try:\n    {code}\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('\\n' + json.dumps([time.perf_counter() - start, [m for m in {HEAVY!r} if m in sys.modules]]))"
    )
    answer = subprocess.run([sys.executable, "-c", frame, *arguments], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    seconds, modules = json.loads(answer.stdout.splitlines()[-1])
    return seconds, modules


def test_a_bare_import_loads_nothing_heavy_and_is_quick() -> None:
    runs = [loaded("import autocompress") for _ in range(3)]
    assert runs[0][1] == []
    # The quickest of three: other processes may be busy on this machine.
    assert min(seconds for seconds, _ in runs) < 0.5


@pytest.mark.parametrize(
    "module", ["errors", "quantities", "policy", "files", "config", "environment", "runs.records", "runs.directory"]
)
def test_the_lower_layers_load_nothing_heavy(module: str) -> None:
    assert loaded(f"import autocompress.{module}")[1] == []


MEASURING = [
    info.name
    for package in (autocompress.engines, autocompress.measurement)
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


def test_what_the_measuring_process_imports_is_without_torch() -> None:
    assert "autocompress.engines.base" in MEASURING
    assert not {"torch", "torchvision", "optuna", "pandas"} & set(loaded(f"import {', '.join(MEASURING)}")[1])


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["search", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    assert loaded("from autocompress.cli import main; sys.exit(main())", *arguments)[1] == []


def test_public_names_are_sorted_listed_and_there() -> None:
    names = autocompress.__all__
    assert list(names) == sorted(names)
    assert all(getattr(autocompress, name) is not None for name in names)
    assert set(names) <= set(dir(autocompress))
