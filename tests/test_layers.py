"""Imports point downwards, what is imported is declared, and what is packaged beside the code is there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import autocompress

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Needed without being imported by us: `torch.onnx.export` imports it, and it reads ONNX files for onnx-ir.
UNSEEN = {"onnxscript", "onnx"}
# Their modules, where these runtimes are not installed.
ALIASES = {
    "pynvml": "nvidia-ml-py",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx-cu13",
    "cuda": "cuda-bindings",
}


def test_imports_keep_the_contracts_of_pyproject() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the top-level names a module imports, also through `_lazy.optional`."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (name.name.partition(".")[0] for name in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.partition(".")[0]
            case ast.Call(
                func=ast.Name(id="optional" | "import_module") | ast.Attribute(attr="optional" | "import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module.partition(".")[0]


def distributions(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s<>=!~\[;]", r, maxsplit=1)[0].lower() for r in requirements}


@pytest.fixture(scope="module")
def used() -> dict[str, set[str]]:
    """Distribution to the modules of ours that import it."""
    known, found = metadata.packages_distributions(), {}
    for path in Path(autocompress.__path__[0]).rglob("*.py"):
        for name in imported(ast.parse(path.read_text())):
            if name not in sys.stdlib_module_names and name != "autocompress":
                owner = known.get(name, [ALIASES.get(name, name)])[0].lower().replace("_", "-")
                found.setdefault(owner, set()).add(str(path.relative_to(ROOT)))
    return found


def test_everything_imported_is_declared(used: dict[str, set[str]]) -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    users = [r for name, rs in extras.items() if name not in {"dev", "demo"} for r in rs]
    declared = distributions([*PROJECT["project"]["dependencies"], *users])
    assert {name: files for name, files in used.items() if name not in declared} == {}


def test_everything_in_the_base_install_is_used(used: dict[str, set[str]]) -> None:
    assert distributions(PROJECT["project"]["dependencies"]) - set(used) - UNSEEN == set()


def test_the_data_folders_of_the_wheel_hold_something() -> None:
    for source in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]:
        assert any(path.is_file() for path in (ROOT / source).iterdir()), source
