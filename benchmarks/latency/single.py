"""Time one engine file as its deployed ``run.py`` runs it: one instance, alone in its process, fresh inputs.

    python benchmarks/latency/single.py FOLDER [--seconds 0.7]

FOLDER is a deployed directory or a run's ``baseline``. It shares no code with the protocol that states a ratio: a
median of plain wall times, no rounds, no pinning, nothing interleaved. Prints one JSON object: median and 10th
percentile in ms.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
INPUTS, WARM_UP_S = 16, 0.3


def openvino(file: Path, threads: int, dtype: str) -> tuple[Callable[[Any], Any], tuple[int, ...]]:
    """Return what answers a request, and the shape of its inputs."""
    # As run.py does: see there.
    os.environ.setdefault("HWLOC_THISSYSTEM", "0")
    import openvino as ov

    settings = {
        "INFERENCE_PRECISION_HINT": HINTS[dtype], "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False,
    }  # fmt: skip
    model = ov.Core().compile_model(file, "CPU", settings)
    request = model.create_infer_request()
    bound = request.get_input_tensor(0).data

    def run(inputs: Any) -> Any:
        bound[...] = inputs
        request.infer(share_outputs=True)
        return np.array(request.get_output_tensor(0).data)

    return run, tuple(model.input(0).shape)


def onnxruntime(file: Path, threads: int, dtype: str) -> tuple[Callable[[Any], Any], tuple[int, ...]]:
    """Return what answers a request, and the shape of its inputs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    put = session.get_inputs()[0]
    return lambda inputs: session.run(None, {put.name: inputs})[0], tuple(put.shape)


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=0.7)
    given = parser.parse_args()
    described = next(path for name in ("manifest.json", "engine.json") if (path := given.folder / name).exists())
    document = json.loads(described.read_text())
    options = document["options"]
    opened = {"openvino": openvino, "onnxruntime": onnxruntime}[document["engine"]]
    run, shape = opened(given.folder / document["file"], options["threads"], options["dtype"])
    samples = load_file(given.folder / "reference.safetensors")["inputs"]
    inputs = [np.resize(samples[start:], shape).astype(np.float32) for start in range(min(INPUTS, len(samples)))]
    until = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < until:
        run(inputs[0])
    took: list[float] = []
    until = time.perf_counter() + given.seconds
    while time.perf_counter() < until:
        begin = time.perf_counter()
        run(inputs[len(took) % len(inputs)])
        took.append(1e3 * (time.perf_counter() - begin))
    print(json.dumps({"median": float(np.median(took)), "p10": float(np.percentile(took, 10)), "n": len(took)}))


if __name__ == "__main__":
    main()
