"""`deploy`: the measured file becomes the shipped file. Copied, described, verified in a fresh process, then renamed.

Nothing is rebuilt or converted: what was measured is what ships. Whatever fails leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.deploy import run_script
from autocompress.deploy.artifacts import input_ports
from autocompress.deploy.manifest import MANIFEST_VERSION, FileEntry, Manifest, describe_file
from autocompress.deploy.summary import trial_number
from autocompress.deploy.verify import (
    REFERENCE_NAME,
    TOLERANCE,
    Worker,
    check_outputs,
    fresh,
    never_slower,
    read_reference,
)
from autocompress.documents import reading
from autocompress.engines.artifact import EngineDocument, content_hash, read_artifact
from autocompress.engines.base import EngineFile
from autocompress.engines.ports import Port
from autocompress.errors import ConfigError, VerificationError
from autocompress.exploration.missed_limits import figures_of, limits_of, missed_limits, say_missed
from autocompress.exploration.pareto import constraints_of, run_front
from autocompress.files import half_made, read_json
from autocompress.measurement.measure import Protocol
from autocompress.policy import CompressionPolicy
from autocompress.runs.directory import RunDirectory
from autocompress.runs.metric import Metric
from autocompress.runs.records import PREDICTED, TrialRecord
from autocompress.runs.summaries import read_summary
from autocompress.runs.trust import Trust, trust_of
from autocompress.tasks.tokens import TOKENIZER_NAME, TextTokens

_NEEDED = ("engine.json", "policy.json", REFERENCE_NAME)
_OPTIONAL = ("model.onnx", "weights.safetensors")
_FIGURES = ("latency_ms", "latency_ratio", "accuracy_drop_pp", "size_bytes")


def deploy(
    run: RunDirectory,
    to: Path,
    trial: int | None = None,
    worker: Worker | None = None,
    *,
    device: Mapping[str, Any] | None = None,
    protocol: Protocol | None = None,
    force: bool = False,
    trust: bool | Trust = False,
) -> Manifest:
    """Package the run's result, or one trial, into `to` and return its manifest.

    Args:
        run: A finished or interrupted run.
        to: A directory that does not exist or is empty.
        trial: Trial number; its recovered files are preferred. None takes the best.
        worker: Runs the engine; None starts a fresh process, which is what makes the verification mean something.
        device: Fingerprint of the device it was measured on; None takes the name from the run's summary.
        protocol: How to measure again; None for the default.
        force: Deploy what missed a limit of its run all the same.
        trust: Whether code that the run names, such as plugins of its engine, may run; see `runs.trust`.

    Raises:
        ConfigError: Nothing to deploy, it names code, it misses a limit, `to` holds something, or it cannot be written.
        VerificationError: The copy differs, computes something else, or is measurably slower than the baseline.
        BuildError: The engine does not open the file.
    """
    to = Path(to).absolute()
    if to.is_symlink() or (to.exists() and (not to.is_dir() or any(to.iterdir()))):
        raise ConfigError(f"--to {to} already exists and is not an empty directory; nothing is overwritten.")
    source = _source(run, trial)
    _must_be_measured(run, source)
    if not force:
        _must_meet_limits(run, source)
    trusted = trust_of(run.path, trust)
    # Its files are compared while they are copied.
    measured_file = read_artifact(source, trusted, check=False)
    if not (run.baseline / "engine.json").exists():
        raise ConfigError(f"{run.path} has no baseline engine to compare with. Continue the run with --resume.")
    baseline = read_artifact(run.baseline, trusted)
    with _writing(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        # Not `mkdtemp`, whose folders nobody else may read: who may is for the umask to say.
        folder = half_made(to)
        folder.mkdir()
    try:
        with _writing(to):
            hashes = _copy(run, source, measured_file, folder)
            manifest = _manifest(run, source, measured_file, hashes, device)
            script, text = folder / run_script.NAME, TextTokens.read(run.path)
            if text is not None:
                shutil.copyfile(text.file, folder / TOKENIZER_NAME)
            own = [folder / TOKENIZER_NAME] if text is not None else []
            if run_script.has_script(manifest.engine):
                script.write_text(run_script.run_script(manifest, _ports(folder, measured_file), text))
                own.append(script)
            manifest = replace(manifest, files={**manifest.files, **{p.name: describe_file(p) for p in own}})
        # The copies are checked as anyone will who receives them, from disk.
        manifest.check_files(folder)
        with fresh(worker) as running:
            found = _verify(running, manifest.engine_file(folder, trusted), folder / REFERENCE_NAME, baseline, protocol)
        manifest = replace(manifest, verification=found)
        manifest.write(folder)
        with _writing(to):
            # An empty directory is replaced by the rename itself; one that was filled meanwhile is not.
            folder.replace(to)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def _ports(folder: Path, file: EngineFile) -> list[Port]:
    """Return the inputs of a deployed engine file; its graph tells, where that came along."""
    size, graph = file.options.batch_size, folder / "model.onnx"
    if graph.exists() or file.path.suffix != ".engine":
        return input_ports(graph if graph.exists() else folder / file.path.name, size)
    shape = read_reference(folder / REFERENCE_NAME)[0].shape
    return [Port("input", (size, *shape[1:]), np.float32)]


@contextmanager
def _writing(to: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--to {to} cannot be written: {error.strerror or error}.") from error


def deployable(run: RunDirectory) -> list[int]:
    """Return the numbers of the trials whose engine files are there."""
    return sorted(run.folders())


def _source(run: RunDirectory, trial: int | None) -> Path:
    numbers = deployable(run)
    listed = f"Trials with files: {', '.join(map(str, numbers))}." if numbers else "No trial has files yet."
    if trial is None:
        if not (run.best / "engine.json").exists():
            raise ConfigError(f"{run.path} has no best result yet. {listed}")
        return run.best
    folder = run.folders().get(trial)
    if folder is None:
        raise ConfigError(f"Trial {trial} of {run.path} cannot be deployed: {_why_not(run, trial)}. {listed}")
    return folder


def _must_be_measured(run: RunDirectory, source: Path) -> None:
    path = source / "record.json"
    found = TrialRecord.read(path).measurement if path.exists() else None
    if found is not None and found.source == PREDICTED:
        raise ConfigError(
            f"The latency of {source} is predicted; nothing was ever run, so nothing can be verified. Copy the run to "
            f"the device, 'autocompress measure {run.path.name}' there, and deploy then."
        )


def _must_meet_limits(run: RunDirectory, source: Path) -> None:
    """Refuse a result that misses a limit of its run, with the value, the limit, and the trial that meets them all."""
    constraints, path = constraints_of(run), source / "record.json"
    if constraints is None or not path.exists():
        return
    record = TrialRecord.read(path)
    if record.measurement is None or record.size_bytes is None:
        return
    summary = read_summary(run)
    best = summary.get("best") or {}
    final = best.get("trial") == trial_number(record) and best.get("stage") == record.stage
    tested = final and best.get("accuracy") is not None
    # The figures of the end of the run are of test data, and of a second measurement.
    figures = {**figures_of(record, constraints), **({k: best[k] for k in _FIGURES if k in best} if final else {})}
    with reading(run.path / "summary.json", "Deploy it with --force, or continue the run with --resume."):
        missed = missed_limits(figures, limits_of(constraints, record.measurement.baseline_ms), record)
    if not missed:
        return
    named = TrialRecord.read(run.baseline / "record.json").metric
    metric = Metric(summary.get("metric") or named or "accuracy")
    said = say_missed(missed, metric, "test" if tested else "validation")
    name = "The uncompressed model" if trial_number(record) is None else f"Trial {record.number}"
    others = [r for r in run_front(run) if (r.number, r.stage) != (record.number, record.stage)]
    there = run.folders()
    meeting = [
        r
        for r in others
        if r.number in there
        and not missed_limits(figures_of(r, constraints), limits_of(constraints, constraints.baseline_ms or 1.0), r)
    ]
    mend = "Deploy it all the same with --force"
    if meeting:
        other = max(meeting, key=lambda r: r.accuracy or 0.0)
        mend += f", or trial {other.number} with --trial {other.number}, which meets every limit (on validation data)"
    raise ConfigError(f"{name} of {run.path} misses its limits: {said}. {mend}.")


def _why_not(run: RunDirectory, trial: int) -> str:
    record = run.records().get(trial)
    if record is not None and record.state == "failed":
        return f"it failed ({record.error})"
    if trial == 0:
        return "0 is the uncompressed model"
    return "there is no such trial" if record is None else "its files are gone"


def _copy(run: RunDirectory, source: Path, file: EngineFile, folder: Path) -> dict[str, FileEntry]:
    """Copy what ships and return its hashes, taken from the ORIGINALS.

    Raises:
        ConfigError: A file is missing or unreadable.
        VerificationError: An engine file is not the one that was measured.
    """
    _must_be_recorded(run, source)
    listed = EngineDocument.read(source).hashes
    originals = dict.fromkeys((*file.files(), *(source / name for name in _NEEDED)))
    originals |= dict.fromkeys(path for name in _OPTIONAL if (path := source / name).exists())
    described: dict[str, FileEntry] = {}
    for path in originals:
        if not path.exists():
            raise ConfigError(f"{path} is missing; the run stopped while writing it. Continue it with --resume.")
        described[path.name] = describe_file(path)
        expected = listed.get(path.name, described[path.name]["sha256"])
        if described[path.name]["sha256"] != expected:
            raise VerificationError(f"{path} has changed since it was measured: its SHA-256 is not {expected}.")
        with path.open("rb") as reader, (folder / path.name).open("wb") as writer:
            shutil.copyfileobj(reader, writer)
            writer.flush()
            os.fsync(writer.fileno())
    return described


def _must_be_recorded(run: RunDirectory, source: Path) -> None:
    """Check that an artefact is the one that the run's log names.

    Raises:
        VerificationError: The log names another content for this folder.
    """
    path = source / "record.json"
    if not path.exists():
        return
    artifact = TrialRecord.read(path).artifact
    recorded = [r.sha256 for r in run.history() if r.artifact == artifact and r.sha256 is not None]
    if recorded and recorded[-1] != content_hash(source):
        raise VerificationError(
            f"{source} does not hold what was recorded for {artifact}: the SHA-256 of its engine.json is not "
            f"{recorded[-1]}. Deploy another trial with --trial."
        )


def _manifest(
    run: RunDirectory,
    source: Path,
    file: EngineFile,
    files: Mapping[str, FileEntry],
    device: Mapping[str, Any] | None,
) -> Manifest:
    policy = CompressionPolicy.from_dict(read_json(source / "policy.json"))
    record = TrialRecord.read(source / "record.json") if (source / "record.json").exists() else None
    summary = read_summary(run)
    best = summary.get("best") or {}
    tested = record is not None and best.get("trial") == trial_number(record) and best.get("stage") == record.stage
    if device is None and summary.get("device"):
        device = {"name": summary["device"]}
    return Manifest(
        schema_version=MANIFEST_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        autocompress=_version(),
        engine=file.engine,
        engine_version=EngineDocument.read(source).engine_version,
        options=file.options.to_dict(),
        file=file.path.name,
        files=files,
        policy=policy.to_dict(),
        policy_hash=policy.hash,
        trial=trial_number(record) if record else None,
        stage=record.stage if record else None,
        task=summary.get("task"),
        model=summary.get("model"),
        device=device,
        measured=record.measurement.to_dict() if record and record.measurement else None,
        accuracy={"validation": record.accuracy if record else None, "test": best.get("accuracy") if tested else None},
        size_bytes=file.size_bytes,
        verification={},
    )


def _verify(
    worker: Worker, file: EngineFile, reference: Path, baseline: EngineFile, protocol: Protocol | None
) -> dict[str, Any]:
    outputs = check_outputs(worker, file, reference, TOLERANCE)
    inputs = read_reference(reference)[0]
    found = never_slower(worker, baseline, file, inputs, protocol)
    described = worker.describe(file.engine)
    return {
        "sha256": "equal",
        "device": described["device"],
        "engine_version": described["version"],
        "outputs": outputs,
        "latency": found.to_dict(),
    }


def _version() -> str | None:
    try:
        return metadata.version("autocompress")
    except metadata.PackageNotFoundError:
        return None
