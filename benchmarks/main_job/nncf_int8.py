"""The rival of the main job: NNCF's own recipe for int8 on OpenVINO, measured as autocompress measures.

    pip install nncf
    python benchmarks/main_job/nncf_int8.py --data cifar10-jpeg.tar --weights DIR

Post-training quantization with NNCF's defaults and 300 calibration samples; what stays in floating point runs in bf16.
Latency is interleaved with the uncompressed model in bf16; accuracy is on test data. Writes ``results/nncf-int8.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import nncf
import openvino as ov
import torch

from autocompress.config import TaskConfig
from autocompress.engines.base import EngineFile, EngineOptions
from autocompress.graph.export import save_onnx, to_onnx
from autocompress.measurement.client import EngineWorker
from autocompress.tasks import Task, load_task

HERE = Path(__file__).parent
MODELS = {"vgg11_bn": "vgg11bn-cifar10.safetensors", "resnet20": "resnet20-cifar10.safetensors"}


def accuracy(task: Task, worker: EngineWorker, file: EngineFile) -> float:
    """Return test accuracy of an engine file."""
    outputs, targets = [], []
    for inputs, target in task.test(1024):
        outputs.append(torch.from_numpy(worker.infer(file, inputs.numpy())))
        targets.append(target)
    return task.metric(torch.cat(outputs), torch.cat(targets))


def compare(model: str, weights: Path, data: str, folder: Path) -> dict[str, object]:
    """Quantize one model and return its figures beside the uncompressed one's."""
    task = load_task(TaskConfig(name="cifar10", model=model, weights=str(weights), data=data))
    onnx = folder / f"{model}.onnx"
    save_onnx(to_onnx(task.model(), task.example_inputs(1)), onnx)
    samples = [x[None].numpy() for batch in task.calibration(300) for x in batch][:300]
    quantized = nncf.quantize(ov.Core().read_model(onnx), nncf.Dataset(samples))
    path = folder / f"{model}-int8.xml"
    ov.save_model(quantized, path)
    options = EngineOptions("bf16", 1, 1)
    with EngineWorker() as worker:
        dense = worker.build("openvino", onnx, options, folder / f"{model}-dense")
        int8 = EngineFile("openvino", path, options)
        measured = worker.measure([dense, int8], samples[0])[1]
        found = {name: accuracy(task, worker, file) for name, file in (("dense", dense), ("int8", int8))}
    return {
        "accuracy": found,
        "measured": measured.to_dict(),
        "device": ov.Core().get_property("CPU", "FULL_DEVICE_NAME"),
    }


def main() -> None:
    """Read the options and compare both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True, type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {
            model: compare(model, options.weights / file, options.data, Path(folder)) for model, file in MODELS.items()
        }
    found = {"nncf": nncf.__version__, "openvino": ov.__version__, **found}
    (HERE / "results" / "nncf-int8.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
