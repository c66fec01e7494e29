"""``run.py`` of a deployed directory: loads the engine and answers a request, with the runtime and numpy alone.

The scripts are kept here as text, one per engine, short enough to be read whole by whoever puts them into a service.
An engine of several inputs takes them by name, or packed as one array, as `tasks.pack` makes it; where the deployed
directory holds a tokenizer, sentences do as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autocompress.deploy.manifest import Manifest
from autocompress.documents import plain_name
from autocompress.engines.ports import Port
from autocompress.errors import ConfigError
from autocompress.tasks.tokens import TOKENIZER_NAME, TextTokens

NAME = "run.py"
_HEAD = '''"""Run {name} on a .npy file of inputs {shape}: python run.py inputs.npy outputs.npy

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
_NAMED_HEAD = '''"""Run {name} on a .npz file of inputs by name: python run.py inputs.npz outputs.npy

{listed}. Needs {package} and numpy.{sentences}
Without arguments it answers a request of zeros and prints the output's shape.
"""

import sys
from pathlib import Path

import numpy as np

INPUTS = {inputs}


def named(given):
    """Return inputs by name, each in its dtype, from a mapping, or from an array (N, total) that holds all of them."""
    if not hasattr(given, "keys"):
        given = dict(zip(INPUTS, np.split(np.asarray(given), {ends}, axis=1)))
    return {{n: np.asarray(given[n]).reshape(-1, *shape).astype(dtype) for n, (shape, dtype) in INPUTS.items()}}


{tokens}'''
_TOKENS = '''def tokens(sentences):
    """Return inputs by name for sentences of up to {length} tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(__file__).with_name({tokenizer!r})))
    tokenizer.enable_truncation({length})
    tokenizer.enable_padding(length={length}, direction={side!r}, pad_id={pad_id}, pad_token={pad_token!r})
    found = tokenizer.encode_batch(list(sentences))
    kinds = {{"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}}
    return {{name: np.array([getattr(one, kind) for one in found]) for name, kind in kinds.items()}}


'''
_NAMED_TAIL = """

if __name__ == "__main__":
    given = sys.argv[1:]
    if not given:
        inputs = named({{n: np.zeros(({batch}, *shape)) for n, (shape, _) in INPUTS.items()}})
    elif given[0].endswith((".npz", ".npy")):
        inputs = named(np.load(given[0]))
    else:
        inputs = {sentences_or}
    run, count = load(), len(next(iter(inputs.values())))
    parts = [{{n: a[i : i + {batch}] for n, a in inputs.items()}} for i in range(0, count, {batch})]
    outputs = np.concatenate([run(part) for part in parts])
    if len(given) > 1 and given[-1].endswith(".npy"):
        np.save(given[-1], outputs)
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
    model = openvino.Core().compile_model(Path(__file__).with_name({file!r}), "CPU", settings)
    request = model.create_infer_request()

    def run(inputs):
{openvino}
        request.infer(share_outputs=True)
        return np.array(request.get_output_tensor(0).data)

    return run
'''
_ONNXRUNTIME = '''import onnxruntime


def load():
    """Return a function from inputs {shape} to outputs; threads are those of the measurement."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = {threads}, 1
    path = str(Path(__file__).with_name({file!r}))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
{onnxruntime}
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
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(Path(__file__).with_name({file!r}).read_bytes())
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
{tensorrt_shapes}
    arrays = [np.empty(tuple(context.get_tensor_shape(n)), trt.nptype(engine.get_tensor_dtype(n))) for n in names]
    buffers = [check(*cuda.cudaMalloc(a.nbytes)) for a in arrays]
    for name, buffer in zip(names, buffers):
        context.set_tensor_address(name, int(buffer))
    kinds = cuda.cudaMemcpyKind

    def run(inputs):
{tensorrt}
        context.execute_async_v3(int(stream))
        check(*cuda.cudaStreamSynchronize(stream))
        for buffer, array in zip(buffers[{count}:], arrays[{count}:]):
            check(*cuda.cudaMemcpy(array.ctypes.data, buffer, array.nbytes, kinds.cudaMemcpyDeviceToHost))
        return arrays[{count}].copy()

    return run
'''
_BODIES = {
    "openvino": (_OPENVINO, "openvino"),
    "onnxruntime": (_ONNXRUNTIME, "onnxruntime"),
    "tensorrt": (_TENSORRT, "tensorrt and cuda-bindings"),
    "tensorrt-rtx": (_TENSORRT, "tensorrt-rtx-cu13 and cuda-bindings"),
}
_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


# How inputs reach the runtime: of one, and of several by name.
_ONE = {
    "openvino": "        request.get_input_tensor(0).data[...] = inputs",
    "onnxruntime": """    name = session.get_inputs()[0].name
    return lambda inputs: session.run(None, {name: inputs})[0]""",
    "tensorrt_shapes": "    context.set_input_shape(names[0], SHAPE)",
    "tensorrt": """        arrays[0][...] = inputs
        check(*cuda.cudaMemcpy(buffers[0], arrays[0].ctypes.data, arrays[0].nbytes, kinds.cudaMemcpyHostToDevice))""",
}
_SEVERAL = {
    "openvino": """        for name, array in named(inputs).items():
            request.get_tensor(name).data[...] = array""",
    "onnxruntime": "    return lambda inputs: session.run(None, named(inputs))[0]",
    "tensorrt_shapes": """    for name, (shape, _) in INPUTS.items():
        context.set_input_shape(name, (BATCH, *shape))""",
    "tensorrt": """        for name, given in named(inputs).items():
            buffer, array = buffers[names.index(name)], arrays[names.index(name)]
            array[...] = given
            check(*cuda.cudaMemcpy(buffer, array.ctypes.data, array.nbytes, kinds.cudaMemcpyHostToDevice))""",
}


def has_script(engine: str) -> bool:
    """Return whether there is a script for an engine; the others are deployed without."""
    return engine in _BODIES


def run_script(manifest: Manifest, ports: Sequence[Port], text: TextTokens | None = None) -> str:
    """Return the script for a manifest's engine file.

    Args:
        manifest: Of the deployed directory.
        ports: The engine file's inputs; their shapes begin with the batch size.
        text: How sentences become these, where they are texts'; the directory then holds `TOKENIZER_NAME`.

    Raises:
        ConfigError: There is no script for this engine.
    """
    for port in ports:
        # Names of somebody's graph: in code they are quoted, but they are also words of the docstring.
        if not port.name.isprintable() or set(port.name) & set('"\\'):
            raise ConfigError(f"The input {port.name!r} of {manifest.file} cannot be named in {NAME}. Rename it.")
    if manifest.engine not in _BODIES:
        raise ConfigError(f"There is no {NAME} for the engine {manifest.engine!r}.")
    body, package = _BODIES[manifest.engine]
    batch, shape = ports[0].shape[0], ports[0].shape
    fields = {
        # Quoted where it is code; where it is words, it is a plain name.
        "file": manifest.file,
        "name": plain_name(manifest.file),
        "batch": batch,
        "shape": shape,
        "package": package,
        "module": manifest.engine.replace("-", "_"),
        "threads": int(manifest.options.get("threads", 1)),
        "hint": _HINTS.get(str(manifest.options.get("dtype", "fp32")), "f32"),
        "count": len(ports),
    }
    one = len(ports) == 1 and np.dtype(ports[0].dtype).kind == "f"
    for name, lines in (_ONE if one else _SEVERAL).items():
        fields[name] = lines.replace("SHAPE", str(shape)).replace("BATCH", str(batch))
    if one:
        return (_HEAD + body + _TAIL).format(**fields)
    names = ", ".join(port.name for port in ports)
    ends = np.cumsum([math.prod(port.shape[1:]) for port in ports])[:-1]
    fields |= {
        "shape": "by name",
        "inputs": {port.name: (port.shape[1:], np.dtype(port.dtype).name) for port in ports},
        "listed": ", ".join(f"{port.name} {port.shape} {np.dtype(port.dtype).name}" for port in ports),
        "ends": [int(end) for end in ends],
        "tokens": "",
        "sentences": "",
        "sentences_or": f"sys.exit({f'Give a .npz file of {names}.'!r})",
    }
    if text is not None:
        values = {
            "tokenizer": TOKENIZER_NAME,
            "length": text.length,
            "pad_id": text.pad_id,
            "side": text.padding_side,
            "pad_token": text.pad_token,
        }
        fields |= {
            "tokens": _TOKENS.format(**values),
            "sentences": ' With the package tokenizers, sentences do: python run.py "A cat sleeps." outputs.npy',
            "sentences_or": 'named(tokens(text for text in given if not text.endswith(".npy")))',
        }
    return (_NAMED_HEAD + body + _NAMED_TAIL).format(**fields)
