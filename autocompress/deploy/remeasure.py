"""A run's engines measured on this machine: the front of a search that was done elsewhere, or only predicted.

Every engine is run and compared with its reference outputs, measured interleaved with the baseline, and recorded; the
front, the best result and the summary follow. What was measured on another device before no longer counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from autocompress import environment
from autocompress.deploy.summary import alternatives, interval_of, trial_number
from autocompress.deploy.verify import REFERENCE_NAME, read_reference
from autocompress.engines import engine_class
from autocompress.engines.artifact import EngineDocument, check_hashes, read_artifact, write_artifact
from autocompress.engines.base import EngineFile
from autocompress.errors import BuildError, ConfigError, NoFeasibleTrialError, VerificationError
from autocompress.evaluation.agreement import check_outputs_match
from autocompress.exploration.missed_limits import figures_of, limits_of, missed_limits
from autocompress.exploration.pareto import Constraints, best_record, finished_records, run_front, write_front
from autocompress.files import replace_folder
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.fingerprint import device_fingerprint, differences
from autocompress.measurement.measure import Protocol
from autocompress.runs.directory import RunDirectory
from autocompress.runs.records import ELSEWHERE, MEASURED, PREDICTED, Measurement, TrialRecord
from autocompress.runs.summaries import read_environment, read_summary
from autocompress.runs.trust import Trust, code_of_settings, trust_of


@dataclass(frozen=True)
class Remeasured:
    """One trial, or the baseline, measured anew.

    Attributes:
        record: As it is now; as it was where `error` says why it could not be measured.
        before: What was known of its latency; None for nothing.
        error: Why it could not be measured.
        rebuilt: Whether its engine file did not open here, and was built again from its ONNX file.
    """

    record: TrialRecord
    before: Measurement | None
    error: str | None = None
    rebuilt: bool = False


def measure_run(
    run: RunDirectory,
    trials: Sequence[int] | None = None,
    *,
    protocol: Protocol | None = None,
    progress: Callable[[float, str], None] = lambda fraction, text: None,
    trust: bool | Trust = False,
) -> list[Remeasured]:
    """Measure the baseline and trials of a run here, and rank the run anew.

    Args:
        run: A finished or interrupted run.
        trials: Their numbers; None takes the front and the best.
        protocol: How long to measure.
        progress: Called with the share done and what is being measured.
        trust: Whether code that the run names, such as plugins of its engine, may run; see `runs.trust`.

    Returns:
        The baseline and the trials, in the order they were measured.

    Raises:
        ConfigError: There is no such trial, or the run has no baseline.
        UnavailableError: The engine or its device is not here.
        BuildError, VerificationError: The baseline does not run here, or computes something else.
        NoFeasibleTrialError: No trial could be measured.
    """
    records = run.records()
    chosen = _chosen(run, records, trials)
    baseline = TrialRecord.read(run.baseline / "record.json")
    config, trusted = run.config(), trust_of(run.path, trust)
    trusted.require(code_of_settings(config.engine_options), run.config_file)
    device = device_fingerprint(gpu=engine_class(config.engine).uses_gpu)
    moved = bool(differences(read_environment(run).get("device") or {}, device))
    found: list[Remeasured] = []
    with EngineWorker(log_file=run.path / "measure.log") as worker:
        version = worker.describe(config.engine)["version"]
        progress(0.0, "the baseline")
        measuring = _Measuring(worker, run, version, protocol or Protocol.standard(), trusted)
        found.append(measuring.baseline(baseline))
        for number, record in enumerate(chosen, 1):
            progress(number / (len(chosen) + 1), f"trial {record.number}")
            found.append(measuring.trial(record))
    done = {one.record.number for one in found[1:] if one.error is None}
    if not done:
        raise NoFeasibleTrialError(
            f"No trial of {run.path} could be measured here: "
            + "; ".join(f"trial {one.record.number}: {one.error}" for one in found[1:])
        )
    if moved:
        for record in records.values():
            known = record.measurement
            if record.number not in done and known is not None and known.source == MEASURED:
                run.append(replace(record, measurement=replace(known, source=ELSEWHERE)))
    run.write("env.json", {**environment.describe(), "device": device})
    _rank(run, found[0].record, trusted, moved=moved)
    return found


def _chosen(run: RunDirectory, records: dict[int, TrialRecord], trials: Sequence[int] | None) -> list[TrialRecord]:
    complete = {n: r for n, r in sorted(records.items()) if r.state == "complete" and r.artifact is not None}
    listed = ", ".join(map(str, complete)) or "none"
    for number in trials or ():
        if number not in complete:
            raise ConfigError(f"{run.path} has no finished trial {number}. Finished trials: {listed}.")
    if not complete or not (run.baseline / "record.json").exists():
        raise ConfigError(f"{run.path} has nothing to measure yet: no trial has finished. Continue it with --resume.")
    if trials is not None:
        return [complete[number] for number in dict.fromkeys(trials)]
    front = {record.number: complete[record.number] for record in run_front(run) if record.number in complete}
    best = run.best / "record.json"
    if best.exists():
        held = TrialRecord.read(best)
        front.update({held.number: complete[held.number]} if trial_number(held) in complete else {})
    return list(front.values())


class _Measuring:
    """One worker, and the baseline that everything is interleaved with."""

    def __init__(self, worker: EngineWorker, run: RunDirectory, version: str, protocol: Protocol, trust: Trust) -> None:
        self._worker, self._run, self._version, self._protocol, self._trust = worker, run, version, protocol, trust
        self._baseline: EngineFile | None = None

    def baseline(self, record: TrialRecord) -> Remeasured:
        folder = self._run.baseline
        file, inputs, rebuilt = self._opened(folder, record)
        self._baseline = file
        return self._written(folder, record, file, self._worker.measure([file], inputs, self._protocol)[0], rebuilt)

    def trial(self, record: TrialRecord) -> Remeasured:
        assert self._baseline is not None and record.artifact is not None
        folder = self._run.path / record.artifact
        try:
            file, inputs, rebuilt = self._opened(folder, record)
            found = self._worker.measure([self._baseline, file], inputs, self._protocol)[1]
        except (ConfigError, BuildError, VerificationError) as error:
            return Remeasured(record, record.measurement, f"{type(error).__name__}: {error}")
        made = self._written(folder, record, file, found, rebuilt)
        self._run.append(made.record)
        return made

    def _opened(self, folder: Path, record: TrialRecord) -> tuple[EngineFile, np.ndarray, bool]:
        """Return an engine file that runs here and computes what it should, and its inputs."""
        file, hashes = read_artifact(folder, self._trust, check=False), EngineDocument.read(folder)
        check_hashes(folder, hashes, (REFERENCE_NAME,))
        inputs, expected = read_reference(folder / REFERENCE_NAME)
        rebuilt = False
        try:
            check_hashes(folder, hashes)
            outputs = self._worker.infer(file, inputs)
        except (BuildError, VerificationError):
            try:
                check_hashes(folder, hashes, ("model.onnx",))
            except VerificationError as error:
                raise BuildError(f"{file.path} does not open here and cannot be built again: {error}") from error
            # Built by another version, or for another device: its graph is the same.
            settings = tuple((k, v) for k, v in file.options.settings if k != "compute_capability")
            options = replace(file.options, settings=settings)
            file = self._worker.build(file.engine, folder / "model.onnx", options, folder / "model")
            outputs, rebuilt = self._worker.infer(file, inputs), True
        check_outputs_match("the engine here", expected, outputs, record.policy, folder / "model.onnx")
        return file, inputs, rebuilt

    def _written(
        self, folder: Path, record: TrialRecord, file: EngineFile, found: Measurement, rebuilt: bool
    ) -> Remeasured:
        made = replace(record, measurement=found, size_bytes=file.size_bytes)
        made = write_artifact(folder, made, file, self._version)
        return Remeasured(made, record.measurement, rebuilt=rebuilt)


def _rank(run: RunDirectory, baseline: TrialRecord, trust: Trust, *, moved: bool) -> None:
    """Write front, best result and summary from what is measured now."""
    # What best/ alone holds, a network that fine-tuning made worse, was not measured here.
    known = run.records().values() if moved else finished_records(run)
    records = [r for r in known if r.artifact is not None]
    constraints = Constraints.of(run.config(), baseline)
    best = best_record(records, constraints, baseline)
    assert best.artifact is not None and best.measurement is not None
    held = run.best / "record.json"
    if not held.exists() or TrialRecord.read(held) != best:
        replace_folder(run.path / best.artifact, run.best)
    write_front(run)
    if not (run.path / "summary.json").exists():
        return
    summary = read_summary(run)
    before, measured = summary["best"], best.measurement
    same = before["trial"] == trial_number(best) and before["stage"] == best.stage
    tested = before["accuracy"] if same else None
    dense = summary["baseline"]["accuracy"]
    drop = constraints.drop(best) if tested is None else dense - tested
    figures = {**figures_of(best, constraints), "accuracy_drop_pp": 100 * drop}
    limits = limits_of(constraints, measured.baseline_ms)
    missed = missed_limits(figures, limits, best)
    summary["device"] = device_name(run)
    summary["baseline"] = {**summary["baseline"], "latency_ms": measured.baseline_ms}
    summary["best"] = {
        **before,
        **figures,
        "trial": trial_number(best),
        "stage": best.stage,
        # Test data is read by the search alone: of another result only the validation accuracy is known.
        "accuracy": tested,
        "validation_accuracy": best.accuracy,
        **interval_of(measured),
        "latency_source": measured.source,
        "macs_ratio": None if not baseline.macs or best.macs is None else best.macs / baseline.macs,
        "feasible": not missed and measured.source != PREDICTED,
        "verified": measured.source == MEASURED,
        "path": str(read_artifact(run.best, trust, check=False).path),
    }
    summary |= {"constraints": limits, "missed": missed, **alternatives(records, constraints, baseline)}
    run.write("summary.json", summary)


def device_name(run: RunDirectory) -> str:
    """Return the name of the device that a run's latencies are of."""
    device = read_environment(run).get("device") or {}
    gpu = device.get("gpu") or {}
    return str(gpu.get("name") or device.get("cpu") or "unknown")
