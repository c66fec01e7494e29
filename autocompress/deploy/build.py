"""Engines built without being run: of an ONNX file, or of a run's models for another engine than the one that searched.

With TensorRT-RTX and a ``compute_capability`` this needs no GPU. Nothing is measured here: an engine that builds proves
the graph, not the speed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from autocompress.compress.reload import load_compressed
from autocompress.documents import reading
from autocompress.engines import engine_class
from autocompress.engines.artifact import write_engine
from autocompress.engines.base import EngineFile, EngineOptions
from autocompress.engines.options import with_sparse_weights
from autocompress.errors import ConfigError, EngineError, ExportError, UnsupportedDtypeError
from autocompress.files import write_json
from autocompress.graph.builder import exported, ranges_for
from autocompress.graph.export import save_onnx
from autocompress.measurement.client import EngineWorker
from autocompress.runs.directory import RunDirectory
from autocompress.runs.records import TrialRecord
from autocompress.tasks.base import Task

_BATCH = 256
# What one protobuf message holds.
_MOST_BYTES = 2**31 - 1


@dataclass(frozen=True)
class Build:
    """One engine, or why it was not built.

    Attributes:
        trial: Of the run; None for a bare ONNX file.
        file: The engine file; None when it could not be built.
        error: Why not.
        dense: int8 layers of the policy that the engine's placement rules leave dense, with the reason.
    """

    trial: int | None
    file: EngineFile | None
    error: str | None = None
    dense: Mapping[str, str] = field(default_factory=dict)


def build_onnx(graph: Path, engine: str, options: EngineOptions, to: Path) -> Build:
    """Build an engine of one ONNX file into `to`, with a copy of the graph beside it, weights from other files inside.

    Raises:
        ConfigError: The file or one that holds its weights cannot be read, `to` holds something, or an option cannot be
            used.
        UnavailableError: The engine is not installed, needs a device that is not here, or does not run the dtype.
        EngineError: The graph cannot be built; carries the runtime's own words.
    """
    with EngineWorker() as worker:
        _prepare(worker, engine, options, to)
        copy = to / "model.onnx"
        _copy_whole(graph, copy)
        file = worker.build(engine, copy, options, to / "model")
        write_engine(to, file, worker.describe(engine, dict(options.settings))["version"])
        return Build(None, file)


def _copy_whole(source: Path, target: Path) -> None:
    """Copy an ONNX file, with what lies in files beside it (exporters put weights above some size there)."""
    mend = "Files with its weights must lie where the exporter put them, beside it."
    with reading(source, mend, also=(onnx.checker.ValidationError, DecodeError)):
        # Entries of external weights always have the key "location"; looking for it is cheap, parsing is not.
        if b"location" not in source.read_bytes():
            shutil.copyfile(source, target)
            return
        whole = onnx.load(str(source))
    if whole.ByteSize() > _MOST_BYTES:
        raise ExportError(f"{source} has {whole.ByteSize() / 2**30:.1f} GB with its weights; one ONNX file holds 2.")
    onnx.save(whole, str(target))


def build_trials(
    run: RunDirectory, task: Task, numbers: Sequence[int], *, engine: str, options: EngineOptions, to: Path
) -> list[Build]:
    """Build an engine of each trial into ``to/trial-00042``; one that does not build is returned with its error.

    Raises:
        ConfigError: There is no such trial, its weights are gone, `to` holds something, or an option cannot be used.
        UnavailableError: The engine is not installed, or needs a device that is not here.
    """
    records = run.records()
    for number in numbers:
        if number not in records or records[number].state != "complete":
            finished = ", ".join(str(n) for n, r in sorted(records.items()) if r.state == "complete") or "none"
            raise ConfigError(f"{run.path} has no finished trial {number}. Finished trials: {finished}.")
    with EngineWorker() as worker:
        capabilities = _prepare(worker, engine, options, to)
        return [
            _build_trial(
                worker, records[n], run=run, task=task, engine=engine,
                options=with_sparse_weights(options, records[n].policy, capabilities), folder=to / f"trial-{n:05d}",
            )
            for n in numbers
        ]  # fmt: skip


def _prepare(worker: EngineWorker, engine: str, options: EngineOptions, to: Path) -> Sequence[str]:
    """Make the directory; return what the engine runs under these options."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--to {to} already exists and is not an empty directory; nothing is overwritten.")
    described = worker.describe(engine, dict(options.settings))
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--to {to} cannot be written: {error.strerror or error}.") from error
    capabilities: Sequence[str] = described["capabilities"]
    return capabilities


def _build_trial(
    worker: EngineWorker,
    record: TrialRecord,
    *,
    run: RunDirectory,
    task: Task,
    engine: str,
    options: EngineOptions,
    folder: Path,
) -> Build:
    source = run.path / (record.artifact or "")
    model = load_compressed(task, source, record)
    dense: dict[str, str] = {}
    try:
        ranges = ranges_for(engine, model, task.calibration(_BATCH), run.config().quantization)
        graph = exported(model, task.example_inputs(options.batch_size), ranges, engine)
        dense = graph.dense
        path = folder / "model.onnx"
        save_onnx(graph.model, path)
        write_json(folder / "policy.json", record.policy.to_dict())
        return Build(record.number, worker.build(engine, path, options, folder / "model"), None, dense)
    except (EngineError, UnsupportedDtypeError) as error:
        return Build(record.number, None, f"{type(error).__name__}: {error}", dense)


def with_default_dtype(options: EngineOptions, engine: str, dtype: str | None) -> EngineOptions:
    """Return options with a dtype: the one asked for, else fp16 on a GPU, where it costs nothing, and fp32."""
    return replace(options, dtype=dtype or ("fp16" if engine_class(engine).uses_gpu else "fp32"))
