"""From what a user points at (a run, an artefact, a deployed directory, a bare file) to the engine file to open."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import onnx

from autocompress.deploy.manifest import MANIFEST_NAME, Manifest
from autocompress.engines import ENGINES
from autocompress.engines.base import EngineFile, EngineOptions
from autocompress.errors import ConfigError, nearest
from autocompress.results import Measurement, read_json
from autocompress.run_directory import RunDirectory, read_artifact

_DEFAULT_ENGINE = "openvino"
# Which engines open a bare file of this suffix.
_OPENED_BY = {".onnx": ("openvino", "onnxruntime", "tensorrt", "tensorrt-rtx"), ".xml": ("openvino",)}


def resolve(path: Path, engine: str | None, options: EngineOptions) -> EngineFile:
    """Return the engine file behind a path.

    Args:
        path: A run directory (its best), an artefact folder, a deployed directory, an engine file, or a bare ``.onnx``
            or ``.xml``.
        engine: Opens a bare file; None means OpenVINO. Must agree with what an artefact says of itself.
        options: For bare files. An artefact keeps its own, without which its latency would be another.

    Raises:
        ConfigError: Nothing there can be opened, or `engine` is another one than the artefact's.
    """
    if engine is not None and engine not in ENGINES:
        raise ConfigError(f"Unknown engine {engine!r}.{nearest(engine, ENGINES)}")
    if path.is_dir():
        return _agreeing(_in_folder(path), path, engine)
    if not path.exists():
        raise ConfigError(f"{path} does not exist. Give a run, an artefact, a deployed directory or an engine file.")
    companion = path.parent / "engine.json"
    # `model.onnx` beside `model.xml` is a graph of its own; engine.json speaks for the file it names alone.
    if companion.exists() and read_json(companion).get("file") == path.name:
        return _agreeing(read_artifact(path.parent), path, engine)
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
    except (ConfigError, KeyError, TypeError, ValueError):
        return None


def _in_folder(path: Path) -> EngineFile:
    run = RunDirectory(path)
    if run.config_file.exists():
        if not (run.best / "engine.json").exists():
            raise ConfigError(f"{path} is a run without a result yet. Continue it with --resume.")
        return read_artifact(run.best)
    if (path / MANIFEST_NAME).exists():
        return Manifest.read(path).engine_file(path)
    if (path / "engine.json").exists():
        return read_artifact(path)
    raise ConfigError(
        f"{path} holds nothing to open: no config.yaml (a run), no engine.json (an artefact), no {MANIFEST_NAME} "
        "(a deployed directory)."
    )


def _agreeing(file: EngineFile, path: Path, engine: str | None) -> EngineFile:
    if engine is not None and engine != file.engine:
        raise ConfigError(f"{path} was built for {file.engine}, not {engine}. Leave --engine away.")
    return file


def input_shape(file: EngineFile) -> tuple[int, ...]:
    """Return the shape of an engine file's input, its batch axis set to the options' batch size.

    Raises:
        ConfigError: The file has several inputs, or a dynamic axis that is not the batch.
    """
    if file.path.suffix == ".xml":
        text = file.path.read_text()
        parameters = [e for e in ElementTree.fromstring(text).iter("layer") if e.get("type") == "Parameter"]
        shapes = [str(e.find("data").get("shape")).split(",") for e in parameters]  # type: ignore[union-attr]
        dims = [int(d) if d.strip().isdigit() else None for d in shapes[0]] if len(shapes) == 1 else []
        count = len(shapes)
    else:
        inputs = onnx.load(str(file.path), load_external_data=False).graph.input
        count = len(inputs)
        dims = [d.dim_value or None for d in inputs[0].type.tensor_type.shape.dim] if count == 1 else []
    if count != 1 or None in dims[1:] or not dims:
        raise ConfigError(
            f"{file.path} has {count} inputs or a dynamic axis beside the batch; it cannot be timed alone."
        )
    return (file.options.batch_size, *(int(d or 1) for d in dims[1:]))
