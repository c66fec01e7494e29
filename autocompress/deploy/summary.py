"""The end of a run: its result verified and told as one document, that of ``search --json`` and ``summary.json``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autocompress.deploy.verify import REFERENCE_NAME, check_outputs, read_reference
from autocompress.engines.base import EngineFile
from autocompress.latency.measure import Protocol
from autocompress.results import SCHEMA_VERSION, Measurement, TrialRecord
from autocompress.run_directory import read_artifact
from autocompress.worker import EngineWorker

if TYPE_CHECKING:
    from autocompress.search.session import SearchSession

# Activities of the ledger, as `search --json` groups them. What no activity claims is overhead.
_GROUPS = {
    "load": ("load",),
    "profile": ("profile",),
    "proxy": ("proxy", "verify"),
    "build": ("export", "build"),
    "measure": ("measure",),
    "recovery": ("recovery",),
    "test": ("test",),
}
# A run that left more than this share of its time unused was not short of time.
_SPARE = 0.1


def summarize(session: SearchSession, best: TrialRecord) -> dict[str, Any]:
    """Read the test data, check and measure the best file again in a fresh process, and return ``summary.json``.

    Raises:
        VerificationError: The file computes something else than when it was measured.
    """
    pipeline, run, observer = session.pipeline, session.run, session.observer
    baseline = pipeline.baseline
    assert baseline is not None and baseline.accuracy is not None
    assert baseline.latency_ms is not None and baseline.size_bytes is not None
    reached = time.monotonic()
    observer.stage("Reading the test data, verifying the engine")
    file = read_artifact(run.best)
    with pipeline.ledger.spend("test"):
        dense_accuracy = pipeline.test_accuracy(pipeline.baseline_file)
        accuracy = pipeline.test_accuracy(file)
    measured = best.measurement if pipeline.ahead else _measured_again(session, file)
    assert measured is not None
    drop = dense_accuracy - accuracy
    limits = session.constraints
    # Sums of counts: a drop of exactly the limit must not fail by a rounding error.
    within_drop = limits.max_drop is None or drop <= limits.max_drop + 1e-9
    feasible = within_drop and limits.within_budget(best) and limits.reached(measured)
    records = pipeline.run.records()
    return {
        "schema_version": SCHEMA_VERSION,
        "run_dir": str(run.path),
        "task": session.task.name,
        "model": session.config.task.model or type(pipeline.original).__name__,
        "engine": pipeline.engine,
        "engine_version": pipeline.engine_version,
        "device": pipeline.device,
        "threads": session.config.threads,
        "batch_size": session.config.batch_size,
        "baseline": {
            "accuracy": dense_accuracy,
            "latency_ms": measured.baseline_ms,
            "size_bytes": baseline.size_bytes,
            "dtype": baseline.policy.dense_dtype,
            "macs": baseline.macs,
            "params": baseline.params,
            "validation_accuracy": baseline.accuracy,
        },
        "best": {
            "trial": best.number,
            "stage": best.stage,
            "accuracy": accuracy,
            "accuracy_drop_pp": 100 * drop,
            "validation_accuracy": best.accuracy,
            "latency_ms": measured.latency_ms,
            "latency_ratio": measured.ratio,
            "latency_ratio_interval": [measured.ratio_low, measured.ratio_high],
            "size_bytes": file.size_bytes,
            "macs_ratio": None if not baseline.macs or best.macs is None else best.macs / baseline.macs,
            "feasible": feasible,
            "verified": not pipeline.ahead,
            "latency_source": measured.source,
            "path": str(file.path),
        },
        "constraints": {
            # A relative bound means the baseline of this very measurement, not of one an hour ago.
            "latency_ms": None if limits.latency is None else limits.latency.resolve(measured.baseline_ms),
            "max_drop": limits.max_drop,
            "size_bytes": limits.size_bytes,
        },
        # What ended it: the time, or as many trials and epochs as were asked for.
        "budget": {
            "epochs": session.config.recovery.epochs if session.config.recovery.enabled else None,
            "seconds_left": None if session.deadline is None else max(0.0, session.deadline - reached),
        },
        "n_trials": len(records),
        "n_failed": sum(r.state == "failed" for r in records.values()),
        "prediction": session.loop.prediction(),
        "explanation": [reason.to_dict() for reason in session.reasons],
        "seconds": group_seconds(pipeline.ledger.seconds, time.monotonic() - session.started),
    }


def _measured_again(session: SearchSession, file: EngineFile) -> Measurement:
    """Check and measure the best file in a fresh process."""
    pipeline, run = session.pipeline, session.run
    with pipeline.ledger.spend("measure"), EngineWorker(log_file=run.path / "verify.log") as fresh:
        check_outputs(fresh, file, run.best / REFERENCE_NAME)
        inputs = read_reference(run.best / REFERENCE_NAME)[0]
        timing = replace(Protocol(), usual_ms=pipeline.usual_ms)
        return fresh.measure([pipeline.baseline_file, file], inputs, timing)[1]


def group_seconds(spent: Mapping[str, float], total: float) -> dict[str, float]:
    """Return wall time by group of activities; ``overhead`` is what no activity claims of `total`."""
    groups = {name: sum(spent.get(a, 0.0) for a in activities) for name, activities in _GROUPS.items()}
    return {"total": total, **groups, "overhead": max(0.0, total - sum(groups.values()))}


def shortfall(summary: Mapping[str, Any]) -> str:
    """Say which limits the best result of a finished run misses, by how much, and what to try."""
    best, limits = summary["best"], summary["constraints"]
    missed = []
    if limits["latency_ms"] is not None and best["latency_ms"] > limits["latency_ms"]:
        over = best["latency_ms"] / limits["latency_ms"] - 1
        missed.append(
            f"latency {best['latency_ms']:.3g} ms is {over:.1%} over the target of {limits['latency_ms']:.3g} ms"
        )
    if limits["max_drop"] is not None and best["accuracy_drop_pp"] > 100 * limits["max_drop"] + 1e-7:
        missed.append(
            f"test accuracy is {best['accuracy_drop_pp']:.2f} pp below the baseline, "
            f"{100 * limits['max_drop']:.3g} pp allowed"
        )
    if limits["size_bytes"] is not None and best["size_bytes"] > limits["size_bytes"]:
        missed.append(f"{best['size_bytes']} bytes are more than the {limits['size_bytes']:.0f} allowed")
    said = "; ".join(missed) or "the measurement is too close to the target to be sure of it"
    return (
        f"No candidate met every limit. The closest, trial {best['trial']}: {said}. It is in "
        f"{summary['run_dir']}/best. {_more(summary)} with --resume, a wider --space, or a looser limit."
    )


def _more(summary: Mapping[str, Any]) -> str:
    """Say what a run that fell short had too little of."""
    budget = summary["budget"]
    left, epochs = budget["seconds_left"], budget["epochs"]
    if left is not None and left < _SPARE * summary["seconds"]["total"]:
        return "Give it more --timeout"
    tuned = "" if epochs is None else f" and {epochs:g} epochs of fine-tuning"
    spare = "" if left is None else f", {left:.0f} s before its time was up"
    options = "--n-trials" if epochs is None else "--n-trials or --set recovery.epochs=N"
    return f"It ended with its {summary['n_trials']} trials{tuned}{spare}: give it more ({options})"
