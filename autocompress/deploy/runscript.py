"""``run.py`` of a deployed directory: loads the engine and answers a request, with the runtime and numpy alone.

The scripts are kept here as text, one per engine, short enough to be read whole by whoever puts them into a service.
"""

from __future__ import annotations

from autocompress.deploy.manifest import Manifest
from autocompress.errors import ConfigError

NAME = "run.py"
_HEAD = '''"""Run {file} on a .npy file of inputs {shape}: python run.py inputs.npy outputs.npy

Needs {package} and numpy. Without arguments it answers a request of zeros and prints the output's shape.
"""

import sys
from pathlib import Path

import numpy as np
'''
_TAIL = """

if __name__ == "__main__":
    inputs = np.load(sys.argv[1]) if len(sys.argv) > 1 else np.zeros({shape}, np.float32)
    run = load()
    outputs = np.concatenate([run(inputs[i : i + {batch}]) for i in range(0, len(inputs), {batch})])
    if len(sys.argv) > 2:
        np.save(sys.argv[2], outputs)
    print(outputs.shape, outputs.dtype)
"""
_OPENVINO = '''import os

# Threads stay where the process may run; bound anew in every call, as is the default, each call takes 8 µs longer.
os.environ.setdefault("HWLOC_THISSYSTEM", "0")
import openvino  # noqa: E402


def load():
    """Return a function from inputs {shape} to outputs; dtype and threads are those of the measurement."""
    settings = {{
        "INFERENCE_PRECISION_HINT": "{hint}", "INFERENCE_NUM_THREADS": {threads},
        "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False,
    }}
    model = openvino.Core().compile_model(Path(__file__).with_name("{file}"), "CPU", settings)
    request = model.create_infer_request()

    def run(inputs):
        request.get_input_tensor(0).data[...] = inputs
        request.infer(share_outputs=True)
        return np.array(request.get_output_tensor(0).data)

    return run
'''
_ONNXRUNTIME = '''import onnxruntime


def load():
    """Return a function from inputs {shape} to outputs; threads are those of the measurement."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = {threads}, 1
    path = str(Path(__file__).with_name("{file}"))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda inputs: session.run(None, {{name: inputs}})[0]
'''
_TENSORRT = '''import {module} as trt
from cuda.bindings import runtime as cuda


def check(status, *values):
    if status != cuda.cudaError_t.cudaSuccess:
        raise SystemExit(f"CUDA: {{status.name}}. Is there a GPU, and its driver? Try nvidia-smi.")
    return values[0] if values else None


def load():
    """Return a function from inputs {shape} to outputs, run on the first GPU."""
    stream = check(*cuda.cudaStreamCreate())
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(Path(__file__).with_name("{file}").read_bytes())
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    context.set_input_shape(names[0], {shape})
    arrays = [np.empty(tuple(context.get_tensor_shape(n)), trt.nptype(engine.get_tensor_dtype(n))) for n in names]
    buffers = [check(*cuda.cudaMalloc(a.nbytes)) for a in arrays]
    for name, buffer in zip(names, buffers):
        context.set_tensor_address(name, int(buffer))
    kinds = cuda.cudaMemcpyKind

    def run(inputs):
        arrays[0][...] = inputs
        check(*cuda.cudaMemcpy(buffers[0], arrays[0].ctypes.data, arrays[0].nbytes, kinds.cudaMemcpyHostToDevice))
        context.execute_async_v3(int(stream))
        check(*cuda.cudaStreamSynchronize(stream))
        for buffer, array in zip(buffers[1:], arrays[1:]):
            check(*cuda.cudaMemcpy(array.ctypes.data, buffer, array.nbytes, kinds.cudaMemcpyDeviceToHost))
        return arrays[1].copy()

    return run
'''
_BODIES = {
    "openvino": (_OPENVINO, "openvino"),
    "onnxruntime": (_ONNXRUNTIME, "onnxruntime"),
    "tensorrt": (_TENSORRT, "tensorrt and cuda-bindings"),
    "tensorrt-rtx": (_TENSORRT, "tensorrt-rtx-cu13 and cuda-bindings"),
}
_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def run_script(manifest: Manifest, shape: tuple[int, ...]) -> str:
    """Return the script for a manifest's engine file, whose input has this shape ``(batch_size, ...)``.

    Raises:
        ConfigError: There is no script for this engine.
    """
    if manifest.engine not in _BODIES:
        raise ConfigError(f"There is no {NAME} for the engine {manifest.engine!r}.")
    body, package = _BODIES[manifest.engine]
    return (_HEAD + body + _TAIL).format(
        file=manifest.file,
        shape=tuple(shape),
        batch=shape[0],
        package=package,
        module=manifest.engine.replace("-", "_"),
        threads=int(manifest.options.get("threads", 1)),
        hint=_HINTS.get(str(manifest.options.get("dtype", "fp32")), "f32"),
    )
