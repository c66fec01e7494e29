"""From what a user points at (a run, an artefact, a deployed directory, a bare file) to the engine file to open."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from autocompress.deploy.manifest import MANIFEST_NAME, Manifest
from autocompress.documents import read_bytes, reading
from autocompress.engines import ENGINES
from autocompress.engines.artifact import EngineDocument, read_artifact
from autocompress.engines.base import EngineFile, EngineOptions
from autocompress.engines.ports import Port
from autocompress.errors import ConfigError, nearest
from autocompress.files import read_json
from autocompress.runs.directory import RunDirectory
from autocompress.runs.records import Measurement
from autocompress.runs.trust import Trust, trust_of

_DEFAULT_ENGINE = "openvino"
# Which engines open a bare file of this suffix.
_OPENED_BY = {
    suffix: tuple(name for name, engine in ENGINES.items() if suffix in engine.opens) for suffix in (".onnx", ".xml")
}

# One array of more is not what a request holds: 8 GB of float32.
_MOST_ELEMENTS = 2**31
# What OpenVINO's files call dtypes.
_XML_DTYPES = {
    "f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32", "i8": "int8", "u8": "uint8", "boolean": "bool"
}  # fmt: skip


def resolve(path: Path, engine: str | None, options: EngineOptions, trust: bool | Trust = False) -> EngineFile:
    """Return the engine file behind a path.

    Args:
        path: A run directory (its best), an artefact folder, a deployed directory, an engine file, or a bare ``.onnx``
            or ``.xml``.
        engine: Opens a bare file; None means OpenVINO. Must agree with what an artefact says of itself.
        options: For bare files. An artefact keeps its own, without which its latency would be another.
        trust: Whether code that an artefact names may run; see `runs.trust`.

    Raises:
        ConfigError: Nothing there can be opened, it names code, or `engine` is another one than the artefact's.
        VerificationError: A file of an artefact or a deployed directory is not the one that was measured.
    """
    if engine is not None and engine not in ENGINES:
        raise ConfigError(f"Unknown engine {engine!r}.{nearest(engine, ENGINES)}")
    if path.is_dir():
        return _agreeing(_in_folder(path, trust_of(path, trust)), path, engine)
    if not path.exists():
        raise ConfigError(f"{path} does not exist. Give a run, an artefact, a deployed directory or an engine file.")
    companion = path.parent / "engine.json"
    # `model.onnx` beside `model.xml` is a graph of its own; engine.json speaks for the file it names alone.
    if companion.exists() and EngineDocument.read(path.parent).file == path.name:
        return _agreeing(read_artifact(path.parent, trust_of(path.parent, trust)), path, engine)
    chosen = engine or _DEFAULT_ENGINE
    if chosen not in _OPENED_BY.get(path.suffix, ()):
        known = ", ".join(f"{suffix} ({' or '.join(names)})" for suffix, names in _OPENED_BY.items())
        raise ConfigError(
            f"{path} cannot be opened by {chosen}, and has no engine.json beside it. Bare files: {known}."
        )
    return EngineFile(chosen, path, options)


def stated(path: Path) -> Measurement | None:
    """Return what a deployed directory or an artefact says was measured of it; None where it says nothing.

    Ratios are to the baseline of its run.
    """
    if not path.is_dir():
        path = path.parent
    try:
        if (path / MANIFEST_NAME).exists():
            data = Manifest.read(path).measured
        elif RunDirectory(path).config_file.exists():
            data = read_json(path / "best" / "latency.json")
        else:
            data = read_json(path / "latency.json")
        return None if data is None else Measurement.from_dict(data)
    except ConfigError:
        return None


def _in_folder(path: Path, trust: Trust) -> EngineFile:
    run = RunDirectory(path)
    if run.config_file.exists():
        if not (run.best / "engine.json").exists():
            raise ConfigError(f"{path} is a run without a result yet. Continue it with --resume.")
        return read_artifact(run.best, trust)
    if (path / MANIFEST_NAME).exists():
        manifest = Manifest.read(path)
        manifest.check_files(path)
        return manifest.engine_file(path, trust)
    if (path / "engine.json").exists():
        return read_artifact(path, trust)
    raise ConfigError(
        f"{path} holds nothing to open: no config.yaml (a run), no engine.json (an artefact), no {MANIFEST_NAME} "
        "(a deployed directory)."
    )


def _agreeing(file: EngineFile, path: Path, engine: str | None) -> EngineFile:
    if engine is not None and engine != file.engine:
        raise ConfigError(f"{path} was built for {file.engine}, not {engine}. Leave --engine away.")
    return file


def input_ports(path: Path, batch_size: int) -> list[Port]:
    """Return the inputs of an ONNX file or an OpenVINO model, their batch axes set.

    Raises:
        ConfigError: It has none, or one with a dynamic axis that is not the batch.
    """
    with reading(path, "Export it again, or take another copy.", also=(DecodeError,)):
        found = _of_xml(path) if path.suffix == ".xml" else _of_onnx(path)
    if not found:
        raise ConfigError(f"{path} has no input, so it cannot be run alone.")
    ports = []
    for name, dims, dtype in found:
        if dims and (largest := max(d or 1 for d in dims)) > _MOST_ELEMENTS:
            raise ConfigError(f"{path}: input {name!r} has an axis of {largest}, which no memory holds.")
        if not dims or None in dims[1:]:
            raise ConfigError(
                f"{path}: the shape of input {name!r} is {dims}; only its first axis, the batch, may be dynamic. "
                "Export it with fixed shapes."
            )
        shape = (batch_size, *(int(d or 1) for d in dims[1:]))
        if math.prod(shape) > _MOST_ELEMENTS:
            raise ConfigError(f"{path}: input {name!r} of shape {shape} does not fit into memory.")
        ports.append(Port(name, shape, dtype))
    return ports


def _of_xml(path: Path) -> list[tuple[str, list[int | None], np.dtype[Any]]]:
    found = []
    for layer in ElementTree.fromstring(read_bytes(path)).iter("layer"):
        data, port = layer.find("data"), layer.find("output/port")
        if layer.get("type") != "Parameter" or data is None:
            continue
        dims = [int(d) if d.strip().isdigit() else None for d in str(data.get("shape")).split(",")]
        name = (port.get("names") if port is not None else None) or layer.get("name") or ""
        found.append(
            (name.partition(",")[0], dims, np.dtype(_XML_DTYPES.get(str(data.get("element_type")), "float32")))
        )
    return found


def load_graph(path: Path) -> onnx.GraphProto:
    """Return the graph of an ONNX file, without weights that lie in other files.

    Raises:
        ConfigError: It is missing, or no ONNX file.
    """
    with reading(path, "Export it again, or take another copy.", also=(DecodeError,)):
        return onnx.load(str(path), load_external_data=False).graph


def _of_onnx(path: Path) -> list[tuple[str, list[int | None], np.dtype[Any]]]:
    graph = load_graph(path)
    weights = {value.name for value in graph.initializer}
    kinds = [(value.name, value.type.tensor_type) for value in graph.input if value.name not in weights]
    return [
        (
            name,
            [d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim],
            onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type),
        )
        for name, kind in kinds
    ]


def example_inputs(file: EngineFile) -> NDArray[np.float32]:
    """Return inputs to time an engine file with, as they travel: random numbers, and ones for integers and masks.

    Raises:
        ConfigError: See `input_ports`.
    """
    ports, random = input_ports(file.path, file.options.batch_size), np.random.default_rng(0)
    parts = [
        random.standard_normal(port.shape, np.float32)
        if np.dtype(port.dtype).kind == "f"
        else np.ones(port.shape, np.float32)
        for port in ports
    ]
    return parts[0] if len(parts) == 1 else np.concatenate([part.reshape(len(part), -1) for part in parts], 1)
