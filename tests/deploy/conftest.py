"""A run directory with real OpenVINO engines: a baseline, a smaller best, a recovered trial and a slower one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from autocompress.config import RunConfig
from autocompress.engines.artifact import write_artifact
from autocompress.engines.base import EngineOptions
from autocompress.files import replace_folder
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.measure import Protocol
from autocompress.policy import CompressionPolicy
from autocompress.runs.directory import RunDirectory
from autocompress.runs.records import Measurement, TrialRecord

SIZE, CLASSES = 16, 10


def make_onnx(path: Path, channels: int, depth: int, seed: int = 0) -> Path:
    """Write a stack of 3x3 convolutions ``(N, 3, 16, 16)`` to ``(N, 10)``."""
    rng = np.random.default_rng(seed)
    nodes, weights, source, width = [], [], "inputs", 3
    for index in range(depth):
        values = rng.normal(0, (2 / (9 * width)) ** 0.5, (channels, width, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{index}"))
        nodes.append(helper.make_node("Conv", [source, f"w{index}"], [f"c{index}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"]))
        source, width = f"r{index}", channels
    nodes.append(helper.make_node("GlobalAveragePool", [source], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    weights.append(numpy_helper.from_array(rng.normal(size=(channels, CLASSES)).astype(np.float32), "head"))
    nodes.append(helper.make_node("MatMul", ["flat", "head"], ["outputs"]))
    graph = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, [1, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("outputs", TensorProto.FLOAT, [1, CLASSES])],
        weights,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def make_artifact(worker: EngineWorker, folder: Path, record: TrialRecord, channels: int, depth: int) -> None:
    options = EngineOptions("fp32")
    file = worker.build("openvino", make_onnx(folder / "model.onnx", channels, depth), options, folder / "model.xml")
    inputs = np.random.default_rng(1).normal(size=(4, 3, SIZE, SIZE)).astype(np.float32)
    save_file({"inputs": inputs, "outputs": worker.infer(file, inputs)}, folder / "reference.safetensors")
    save_file({"head": np.zeros((2, 2), np.float32)}, folder / "weights.safetensors")
    write_artifact(folder, record, file, "2026.4.1")


@pytest.fixture(scope="session")
def worker() -> Iterator[EngineWorker]:
    with EngineWorker() as started:
        yield started


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, worker: EngineWorker) -> Path:
    """A run: trial 3 is recovered and the best, 5 a proxy, 7 slower than the baseline, 9 failed."""
    run = RunDirectory(tmp_path_factory.mktemp("built") / "run")
    run.path.mkdir()
    run.write_config(RunConfig(target_latency="0.5x"))
    measured = Measurement(0.1, 0.1, 0.1, 0.1, 0.0, 500, 0.1, 0.1, 0.4, 0.39, 0.41, 0.25, False, 1, 1)
    make_artifact(
        worker, run.baseline, TrialRecord(0, CompressionPolicy(), "complete", "baseline", accuracy=0.9), 24, 6
    )
    for number, channels, depth, recovered in ((3, 4, 2, True), (3, 4, 2, False), (5, 8, 3, False), (7, 40, 8, False)):
        policy = CompressionPolicy(pruning={"conv": number / 10})
        record = TrialRecord(
            number, policy, "complete", "recovered" if recovered else "proxy", 0.89, measured, 1000, 10, 10
        )
        make_artifact(worker, run.artifact(number, recovered=recovered), record, channels, depth)
        if number != 3 or recovered:
            run.append(record)
    run.append(TrialRecord(9, CompressionPolicy(), "failed", error="BuildError: no"))
    replace_folder(run.artifact(3, recovered=True), run.best)
    best = {"trial": 3, "stage": "recovered", "accuracy": 0.88}
    run.write("summary.json", {"device": "a CPU", "task": "digits", "model": "tiny", "best": best})
    return run.path


@pytest.fixture
def run(built: Path, tmp_path: Path) -> RunDirectory:
    shutil.copytree(built, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def quick() -> Protocol:
    return Protocol(warm_up_s=0.02, min_iterations=20, min_seconds=0.06, rounds=6, max_seconds=0.06)
