"""What is added by one new file, with nothing else edited: an engine and an importance, searched with and deployed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import autocompress
from tests.exploration import tiny

pytest.importorskip("onnxruntime")

ENGINE = """
from autocompress.engines.base import Engine
from autocompress.engines.onnxruntime import ONNXRuntimeEngine
from autocompress.engines.rules import QdqRules


class ToyEngine(ONNXRuntimeEngine):
    name = "toy"
    suffix = ".toy"
    qdq_rules = QdqRules(int32_bias=True, unsigned_only=True)
    kernels_in_order = False
    kernel_times = Engine.kernel_times


ENGINE_CLASSES = (ToyEngine,)
"""
IMPORTANCE = """
import torch

from autocompress.catalogue import Method
from autocompress.compress.importances.base import Importance

METHOD = Method("toy", "importance", "the last channels matter most", "nobody")


class Toy(Importance):
    def scores(self, subject):
        sizes = {name: group.channels for name, group in subject.inventory.groups.items()}
        return {name: torch.arange(size, dtype=torch.float32) for name, size in sizes.items()}


IMPORTANCES = {METHOD.name: Toy}
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with two more files."""
    folder = tmp_path_factory.mktemp("extended")
    package = Path(autocompress.__path__[0])
    shutil.copytree(package, folder / "autocompress", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("search_spaces", "latency_tables"):
        if (package.parent / name).is_dir():
            shutil.copytree(package.parent / name, folder / name)
    (folder / "autocompress/engines/toy.py").write_text(ENGINE)
    (folder / "autocompress/compress/importances/toy.py").write_text(IMPORTANCE)
    return tiny.write_task(folder)


def command(folder: Path, *words: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-m", "autocompress", *words], cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_a_new_engine_and_a_new_importance_are_one_file_each(extended: Path) -> None:
    assert "the last channels matter most" in command(extended, "methods", "--json")
    words = ("search", "--task", "tiny_task:make", "--max-drop", "20pp", "--n-trials", "2", "--timeout", "90s")
    plain = ("--set", "first_candidates=false", "--set", "recovery.enabled=false", "--set", "importance=toy")
    found = json.loads(command(extended, *words, *plain, "--engine", "toy", "--out", "run", "--json"))
    assert found["engine"] == "toy" and found["n_failed"] == 0 and found["n_trials"] == 2
    config = (extended / "run" / "config.yaml").read_text()
    assert "engine: toy" in config and "importance: toy" in config
    command(extended, "deploy", "run", "--to", "deployed", "--force")
    assert (extended / "deployed" / "model.toy").exists() and not (extended / "deployed" / "run.py").exists()
