"""The end of a run: its result verified and told as one document, that of ``search --json`` and ``summary.json``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autocompress.deploy.verify import REFERENCE_NAME, check_outputs, read_reference
from autocompress.engines.artifact import read_artifact, write_record
from autocompress.engines.base import EngineFile
from autocompress.errors import ConfigError, EngineError, VerificationError
from autocompress.exploration.constraints import Constraints, counting
from autocompress.exploration.missed_limits import limits_of, missed_limits, say_alternatives, say_missed
from autocompress.exploration.pareto import finished_records
from autocompress.exploration.selection import offer
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.occasions import combined
from autocompress.runs.metric import Metric, metric_name
from autocompress.runs.records import SCHEMA_VERSION, Measurement, TrialRecord
from autocompress.runs.trust import Trust, code_of

if TYPE_CHECKING:
    from autocompress.exploration.session import SearchSession

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
# Layers named as what takes a network's time.
_SLOWEST = 3


def summarize(session: SearchSession, best: TrialRecord) -> dict[str, Any]:
    """Read the test data, check and measure the best file again in a fresh process, and return ``summary.json``.

    Where the test data cannot be read, or the file is lost or computes something else by now, their figures are None or
    those of before, and `SearchSession.lost` and `failure` tell why. Of an interrupted search neither is tried.

    Raises:
        VerificationError: The best file is damaged on disk.
    """
    evaluator, run, observer = session.evaluator, session.run, session.observer
    baseline = evaluator.baseline
    assert baseline.accuracy is not None and baseline.latency_ms is not None and baseline.size_bytes is not None
    reached = time.monotonic()
    observer.stage("Reading the test data, verifying the engine")
    file = read_artifact(run.best, Trust(code=frozenset(code_of(session.config))))
    # Nothing comes after this that time would have to be left for.
    with session.worker.limits.until(session.verified_by, share=1.0):
        with evaluator.ledger.charge("test"):
            dense_accuracy, accuracy = _tested(session, file)
        checked = _checked(session, file, best)
    measured = checked or best.measurement
    assert measured is not None
    # What was only predicted is to be measured on its device; what failed its check is no result.
    offered = checked is not None or evaluator.forecast is not None or session.interrupted is not None
    # Without test data the validation data it was chosen on tell.
    drop = session.constraints.drop(best) if dense_accuracy is None or accuracy is None else dense_accuracy - accuracy
    limits = limits_of(session.constraints, measured.baseline_ms)
    figures = {
        "latency_ms": measured.latency_ms,
        "latency_ratio": measured.ratio,
        "accuracy_drop_pp": 100 * drop,
        "size_bytes": file.size_bytes,
    }
    missed = missed_limits(figures, limits, replace(best, measurement=measured))
    records = evaluator.run.records()
    return {
        "schema_version": SCHEMA_VERSION,
        "run_dir": str(run.path),
        "task": session.task.name,
        "model": session.config.task.model or type(evaluator.original).__name__,
        "engine": evaluator.engine,
        "engine_version": evaluator.engine_version,
        "device": evaluator.device,
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
        "metric": metric_name(session.task),
        "best": {
            "trial": trial_number(best),
            "stage": best.stage,
            "accuracy": accuracy,
            "validation_accuracy": best.accuracy,
            **figures,
            **interval_of(measured),
            "macs_ratio": None if not baseline.macs or best.macs is None else best.macs / baseline.macs,
            # The model itself is an answer where it meets the limits and other networks were measured, too.
            "feasible": offered
            and not missed
            and (best.stage != "baseline" or any(r.measurement for r in records.values())),
            "verified": checked is not None,
            "latency_source": measured.source,
            "path": str(file.path),
        },
        "constraints": limits,
        "missed": missed,
        **alternatives(finished_records(run), session.constraints, baseline),
        # What ended it: the time, or as many trials and epochs as were asked for.
        "budget": {
            "epochs": _epochs(session),
            "seconds_left": None if session.deadline is None else max(0.0, session.deadline - reached),
        },
        "n_trials": len(records),
        "n_failed": sum(r.state == "failed" for r in records.values()),
        "last_error": next((r.error for r in reversed(records.values()) if r.state == "failed"), None),
        # What failed and is missing, a sentence each.
        "lost": list(session.lost),
        "prediction": session.prediction(),
        "explanation": [reason.to_dict() for reason in session.reasons],
        "seconds": group_seconds(evaluator.ledger.seconds, time.monotonic() - session.started),
    }


def _tested(session: SearchSession, file: EngineFile) -> tuple[float | None, float | None]:
    """Return the metric of the baseline and of the best file on the test data; None for both where they cannot be read.

    The search is over then: what it found must not be lost with them. Where a signal ended it, there is no time for
    them, and another session will read them.
    """
    if session.interrupted is not None:
        return None, None
    try:
        dense, best = session.evaluator.test_accuracies([session.evaluator.baseline_file, file])
    except (ConfigError, EngineError) as error:
        session.lost.append(f"The accuracy on test data: {error}")
        session.observer.warn(f"The result is not measured on test data: {error}")
        session.failure = session.failure or error
        return None, None
    return dense, best


def _checked(session: SearchSession, file: EngineFile, best: TrialRecord) -> Measurement | None:
    """Check and measure the best file once more; None where nothing is measured, or it is lost or another by now."""
    if session.evaluator.forecast is not None or session.interrupted is not None:
        return None
    try:
        return _measured_again(session, file, best)
    except (EngineError, VerificationError) as error:
        session.lost.append(f"The last check of the result: {error}")
        session.observer.warn(f"The result is not verified: {error}")
        session.failure = session.failure or error
        return None


def interval_of(measured: Measurement) -> dict[str, Any]:
    """Return how sure a result's ratio is, as ``summary.json`` says it; what it means is `Measurement`'s to say."""
    return {
        "latency_ratio_interval": [measured.expected_low, measured.expected_high],
        "latency_ratio_judged": [measured.ratio_low, measured.ratio_high],
        "latency_states": {state: list(interval) for state, interval in measured.states.items()},
        "latency_occasions": len(measured.occasions),
        "latency_span_s": measured.span_s,
    }


def _measured_again(session: SearchSession, file: EngineFile, best: TrialRecord) -> Measurement:
    """Check the best file in a fresh process and measure it on further occasions; all of them count."""
    evaluator, run = session.evaluator, session.run
    log, limits = run.path / "verify.log", session.worker.limits
    with evaluator.ledger.charge("measure"), EngineWorker(log_file=log, limits=limits) as fresh:
        check_outputs(fresh, file, run.best / REFERENCE_NAME)
        inputs = read_reference(run.best / REFERENCE_NAME)[0]
        found = fresh.measure([evaluator.baseline_file, file], inputs, evaluator.timing())[1]
    # The baseline's own are of its copy.
    if best.measurement is None or best.stage == "baseline":
        return found
    measured = combined(found, [*best.measurement.occasions, *found.occasions], evaluator.spread)
    known = replace(best, measurement=measured)
    write_record(run.best, known)
    run.append(known)
    return measured


def group_seconds(spent: Mapping[str, float], total: float) -> dict[str, float]:
    """Return wall time by group of activities; ``overhead`` is what no activity claims of `total`."""
    groups = {name: sum(spent.get(a, 0.0) for a in activities) for name, activities in _GROUPS.items()}
    return {"total": total, **groups, "overhead": max(0.0, total - sum(groups.values()))}


def trial_number(record: TrialRecord) -> int | None:
    """Return a record's number in the summary; None for the uncompressed model, which is no trial."""
    return None if record.stage == "baseline" else record.number


def alternatives(records: Iterable[TrialRecord], constraints: Constraints, baseline: TrialRecord) -> dict[str, Any]:
    """Return what a run has to offer beside its best, for ``summary.json``.

    Keys: ``reason`` (why the best was chosen, see `selection.Offer`), ``fastest_within_drop`` and
    ``most_accurate_within_latency``, each None or a mapping of ``trial, stage, latency_ratio, accuracy, drop`` (both on
    validation data, fractions), ``size_bytes`` and ``slowest_layers`` (layer to its share of the latency, the three
    that take most); and ``lowest_ratio``, the latency ratio of the fastest trial, None for none.
    """
    records = list(records)
    found = offer(records, constraints, baseline)
    ratios = [r.measurement.ratio for r in counting(records) if r.measurement is not None]
    return {
        "reason": found.reason,
        "fastest_within_drop": _alternative(found.fastest_within_drop, constraints),
        "most_accurate_within_latency": _alternative(found.most_accurate_within_latency, constraints),
        "lowest_ratio": min(ratios, default=None),
    }


def _alternative(record: TrialRecord | None, constraints: Constraints) -> dict[str, Any] | None:
    if record is None or record.measurement is None:
        return None
    whole = sum(record.layer_ms.values())
    slowest = sorted(record.layer_ms.items(), key=lambda layer: -layer[1])[:_SLOWEST]
    return {
        "trial": record.number,
        "stage": record.stage,
        "latency_ratio": record.measurement.ratio,
        "accuracy": record.accuracy,
        "drop": constraints.drop(record),
        "size_bytes": record.size_bytes,
        "slowest_layers": {name: time_ms / whole for name, time_ms in slowest if whole > 0},
    }


def shortfall(summary: Mapping[str, Any]) -> str:
    """Say which limits the best result of a finished run misses, by how much, what else there is, and what to try."""
    best, folder = summary["best"], f"{summary['run_dir']}/best"
    more = f"{_more(summary)} with --resume, a wider --space, or a looser limit."
    if best.get("stage") == "baseline":
        return f"{_nothing_offered(summary)} {folder} holds the uncompressed model, which is what you had. {more}"
    missed = summary.get("missed")
    if missed is None:  # written by an older release
        missed = missed_limits(best, summary["constraints"])
    data = "validation" if best.get("accuracy", True) is None else "test"
    said = say_missed(missed, Metric(summary.get("metric") or "accuracy"), data)
    said = said or "the measurement is too close to the target to be sure of it"
    others = say_alternatives(summary)
    return (
        f"No candidate met every limit. The closest, trial {best['trial']}: {said}. It is in {folder}."
        f"{' ' if others else ''}{others} {more}"
    )


def _nothing_offered(summary: Mapping[str, Any]) -> str:
    """Say why the result is the uncompressed model."""
    if summary.get("lowest_ratio") is None:
        error = summary.get("last_error")
        last = f" The last failure: {error}" if error else " There was no time for a single trial."
        return f"No candidate could be built and measured ({summary.get('n_failed', 0)} failed).{last}"
    others = say_alternatives(summary)
    return (
        f"No candidate is worth offering: each is slower than the uncompressed model or lost too much. {others}".strip()
    )


def _epochs(session: SearchSession) -> float | None:
    """Return the epochs that a fine-tuning had at most; None where there was none, or where the time ended it."""
    recovery = session.config.recovery
    ended_by_time = session.deadline is not None and recovery.epochs is None
    return recovery.whole_epochs if recovery.enabled and not ended_by_time else None


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
