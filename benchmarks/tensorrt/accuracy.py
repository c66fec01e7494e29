"""Does a network with Q/DQ where TensorRT wants it keep the accuracy that torch simulates? No GPU is needed.

    python benchmarks/tensorrt/accuracy.py --data cifar10-jpeg.tar --weights resnet20-cifar10.safetensors

ResNet-20 on CIFAR-10, every layer int8 but those that TensorRT's rules leave dense, post-training quantization alone.
The graph runs in ONNX Runtime on the test data, torch simulates the same policy; the engine is built by TensorRT-RTX
for compute capability 8.9 where it is installed. Writes benchmarks/tensorrt/results/accuracy.json.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from autocompress import environment
from autocompress.compress import CompressionContext, apply_policy, rewrite
from autocompress.compress.quantization import activation_ranges, calibrate
from autocompress.config import TaskConfig
from autocompress.engines.base import EngineFile, EngineOptions
from autocompress.errors import UnavailableError
from autocompress.files import write_json
from autocompress.graph.builder import GraphBuilder, Ranges
from autocompress.graph.export import save_onnx
from autocompress.measurement.client import EngineWorker
from autocompress.model.inventory import take_inventory
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.tasks import load_task

HERE = Path(__file__).parent
BATCH = 100


def main() -> None:
    """Compare once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10, a folder per class or a .tar of one")
    parser.add_argument("--weights", required=True)
    arguments = parser.parse_args()
    task = load_task(TaskConfig(name="cifar10", model="resnet20", data=arguments.data, weights=arguments.weights))
    base = rewrite(task.model())
    inventory = take_inventory(base, task.example_inputs(2))
    int8 = {name: LayerPolicy("int8") for name, layer in inventory.layers.items() if layer.quantizable}
    model = apply_policy(base, CompressionPolicy("fp16", layers=int8), CompressionContext(task.example_inputs(2)))
    calibrate(model, task.calibration(256))
    graph = GraphBuilder(base, task.example_inputs(BATCH), inventory, "tensorrt").build(
        model, Ranges(activation_ranges(model))
    )
    found, simulated, dense, targets = [], [], [], []
    with tempfile.TemporaryDirectory() as folder, EngineWorker() as worker, torch.no_grad():
        path = Path(folder) / "model.onnx"
        save_onnx(graph.model, path)
        file = EngineFile("onnxruntime", path, EngineOptions("fp32", 1, BATCH))
        for inputs, target in task.test(20 * BATCH):
            found.append(torch.from_numpy(np.asarray(worker.infer(file, inputs.float().numpy()))))
            simulated.append(model(inputs))
            dense.append(base(inputs))
            targets.append(target)
        try:
            settings = (("compute_capability", "8.9"),)
            built = worker.build(
                "tensorrt-rtx", path, EngineOptions("fp16", 1, BATCH, settings), Path(folder) / "model"
            )
            engine_bytes = built.size_bytes
        except UnavailableError:
            engine_bytes = None
    labels = torch.cat(targets)
    figures = {
        name: task.metric(torch.cat(outputs), labels)
        for name, outputs in (("uncompressed", dense), ("int8_in_torch", simulated), ("int8_in_onnxruntime", found))
    }
    result = {
        "environment": environment.describe(), "model": "resnet20", "test_samples": len(labels),
        "int8_layers": len(int8) - len(graph.dense), "left_dense": graph.dense, "accuracy": figures,
        "apart_pp": 100 * abs(figures["int8_in_onnxruntime"] - figures["int8_in_torch"]),
        "engine_bytes_8_9": engine_bytes,
    }  # fmt: skip
    write_json(HERE / "results" / "accuracy.json", result)
    print(
        figures, f"{result['apart_pp']:.2f} pp apart; engine for 8.9: {engine_bytes} bytes; left dense: {graph.dense}"
    )


if __name__ == "__main__":
    main()
