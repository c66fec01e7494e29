"""A trained network with Q/DQ where TensorRT wants it keeps the accuracy that torch simulates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from autocompress.compress import CompressionContext, apply_policy, rewrite
from autocompress.compress.quantization import QuantizationRange, activation_ranges, calibrate, quantization_mode
from autocompress.config import TaskConfig
from autocompress.graph.export import save_onnx, to_onnx
from autocompress.graph.qdq import insert_qdq
from autocompress.model.inventory import take_inventory
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.tasks import load_task

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("sklearn")


@pytest.mark.slow
def test_int8_by_tensorrts_rules_is_as_accurate_as_simulated(tmp_path: Path) -> None:
    task = load_task(TaskConfig(name="digits"))
    model = rewrite(task.model())
    x = task.example_inputs(2)
    names = [name for name, layer in take_inventory(model, x).layers.items() if layer.quantizable]
    made = apply_policy(model, CompressionPolicy(layers={n: LayerPolicy("int8") for n in names}), CompressionContext(x))
    calibrate(made, task.calibration(128))
    ranges = activation_ranges(made)
    batches = list(task.test(256))
    inputs, targets = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    with quantization_mode(made, "off"):
        graph = to_onnx(made, inputs)
    layers = {n: QuantizationRange(r.scale, r.signed) for n, r in ranges.items()}
    dense = insert_qdq(graph, layers, "tensorrt").dense
    assert len(dense) < len(names)
    save_onnx(graph, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": inputs.numpy()})
    with torch.no_grad():
        expected = made(inputs)
    one_sample = 1 / len(targets)
    accuracy = task.metric(torch.from_numpy(np.asarray(found)), targets)
    assert abs(accuracy - task.metric(expected, targets)) <= max(0.003, 1.01 * one_sample)
