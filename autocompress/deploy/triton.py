"""A deployed directory as a model repository of NVIDIA Triton Inference Server: ``NAME/config.pbtxt`` and ``NAME/1/``.

Field names are those of Triton's ``model_config.proto``. Nothing is converted: the file that was measured is copied
under the name that Triton's backend expects. Files of CPU engines and of fixed batch are served with
``max_batch_size: 0``, which is how Triton says that the batch axis is the model's own; a TensorRT engine with
``max_batch`` gets dynamic batching.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from typing_extensions import TypedDict

from autocompress.deploy.artifacts import load_graph
from autocompress.deploy.manifest import Manifest
from autocompress.documents import validated
from autocompress.errors import ConfigError
from autocompress.files import read_json, write_text
from autocompress.runs.trust import EVERYBODY

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
# Longest wait for a batch to fill.
_QUEUE_US = 100
_TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.INT8: "TYPE_INT8",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
    onnx.TensorProto.BOOL: "TYPE_BOOL",
}


class _Description(TypedDict):
    """What is read of the description beside a TensorRT engine."""

    batch: tuple[int, int, int]


@dataclass(frozen=True)
class _Backend:
    """How Triton serves one engine: its backend, the file it looks for, and whether it runs on a GPU."""

    name: str
    file: str
    kind: str


_BACKENDS = {
    "tensorrt": _Backend("tensorrt", "model.plan", "KIND_GPU"),
    "onnxruntime": _Backend("onnxruntime", "model.onnx", "KIND_CPU"),
    "openvino": _Backend("openvino", "model.xml", "KIND_CPU"),
}


def write_triton_repository(deployed: Path, to: Path, name: str = "model") -> Path:
    """Write a deployed directory into a model repository as version 1 of the model `name`; return the model's folder.

    Args:
        deployed: As `deploy.package.deploy` wrote it; its files are checked first.
        to: The repository, new or with other models in it.
        name: Of the model, as clients ask for it.

    Raises:
        ConfigError: Triton does not serve the engine, the name cannot be used, or the model is already there.
        VerificationError: A deployed file is damaged.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"Triton model name {name!r} may have letters, digits, '_', '-' and '.' alone.")
    manifest = Manifest.read(deployed)
    manifest.check_files(deployed)
    backend = _BACKENDS.get(manifest.engine)
    if backend is None:
        raise ConfigError(
            f"Triton has no backend for {manifest.engine} engines. Deploy a model built for {', '.join(_BACKENDS)}."
        )
    target = to / name
    if target.exists():
        raise ConfigError(f"{target} is already there; nothing is overwritten. Give another --triton directory.")
    graph = deployed / "model.onnx"
    if not graph.exists():
        raise ConfigError(f"{graph} is missing, from which inputs and outputs are read. Deploy the model again.")
    text = config_text(name, backend, manifest, load_graph(graph), deployed)
    try:
        to.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to, prefix=f".{name}.") as folder:
            fresh = Path(folder) / name
            version = fresh / "1"
            version.mkdir(parents=True)
            # Nothing is opened here, so no code that its options name is run.
            for path in manifest.engine_file(deployed, EVERYBODY).files():
                if path.suffix != ".json":
                    shutil.copyfile(path, version / Path(backend.file).with_suffix(_suffix(path, backend)).name)
            write_text(fresh / "config.pbtxt", text)
            fresh.replace(target)
    except OSError as error:
        raise ConfigError(f"--triton {to} cannot be written: {error.strerror or error}.") from error
    return target


def _suffix(path: Path, backend: _Backend) -> str:
    return ".bin" if path.suffix == ".bin" else Path(backend.file).suffix


def config_text(name: str, backend: _Backend, manifest: Manifest, graph: Any, deployed: Path) -> str:
    """Return the ``config.pbtxt`` of one model."""
    most = _largest_batch(manifest, deployed)
    threads = str(manifest.options.get("threads", 1))
    lines = [
        f"# {manifest.engine} {' '.join(manifest.engine_version.split())}, written by autocompress; policy "
        f"{manifest.policy_hash}.",
        f"name: {_quoted(name)}",
        f"backend: {_quoted(backend.name)}",
        f"default_model_filename: {_quoted(backend.file)}",
        f"max_batch_size: {most}",
        *_tensors("input", graph.input, most),
        *_tensors("output", graph.output, most),
        "instance_group [ { count: 1 kind: " + backend.kind + " } ]",
    ]
    if most:
        size = manifest.options.get("batch_size", 1)
        preferred = sorted({int(size), most})
        lines.append(
            f"dynamic_batching {{ preferred_batch_size: {preferred} max_queue_delay_microseconds: {_QUEUE_US} }}"
        )
    parameters: Mapping[str, str] = {
        # The thread counts with which the latency was measured.
        "onnxruntime": {"intra_op_thread_count": threads, "inter_op_thread_count": "1"},
        "openvino": {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY"},
    }.get(manifest.engine, {})
    lines += [
        f"parameters {{ key: {_quoted(k)} value: {{ string_value: {_quoted(v)} }} }}" for k, v in parameters.items()
    ]
    return "\n".join(lines) + "\n"


def _largest_batch(manifest: Manifest, deployed: Path) -> int:
    """Return the most samples of one request, 0 when the batch is fixed in the file."""
    if manifest.engine != "tensorrt":
        return 0
    described = (deployed / manifest.file).with_suffix(".json")
    found = validated(_Description, read_json(described), described) if described.exists() else {"batch": (1, 1, 1)}
    least, _, most = found["batch"]
    return int(most) if most > least else 0


def _tensors(field: str, values: Sequence[Any], most: int) -> list[str]:
    lines = []
    for value in values:
        kind = value.type.tensor_type
        dims = [d.dim_value or -1 for d in kind.shape.dim]
        # With a max_batch_size Triton adds the batch axis itself.
        shown = ", ".join(map(str, dims[1:] if most else dims))
        if kind.elem_type not in _TYPES:
            raise ConfigError(f"Triton serves no tensor of the type of {value.name!r} (ONNX type {kind.elem_type}).")
        lines.append(
            f"{field} [ {{ name: {_quoted(value.name)} data_type: {_TYPES[kind.elem_type]} dims: [ {shown} ] }} ]"
        )
    return lines


def _quoted(text: str) -> str:
    """Return a string of protobuf's text format: a name from somebody's graph must not end it."""
    plain = (
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}"
        for byte in text.encode(errors="replace")
    )
    return '"' + "".join(plain) + '"'
