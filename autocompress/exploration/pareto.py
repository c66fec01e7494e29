"""A run's front on disk, and the door to what decides it: limits (`constraints`), `dominance`, `selection`."""

from __future__ import annotations

from autocompress.errors import ConfigError
from autocompress.exploration.constraints import Constraints, counting
from autocompress.exploration.dominance import pareto_front
from autocompress.exploration.selection import best_record, finalists, is_lossless
from autocompress.runs.directory import RunDirectory
from autocompress.runs.records import TrialRecord

__all__ = [
    "Constraints",
    "best_record",
    "constraints_of",
    "counting",
    "finalists",
    "finished_records",
    "is_lossless",
    "pareto_front",
    "run_front",
    "write_front",
]


def constraints_of(run: RunDirectory) -> Constraints | None:
    """Return a run's limits; None while it has no baseline, or where its run file or baseline cannot be read."""
    stored = run.baseline / "record.json"
    if not stored.exists():
        return None
    try:
        baseline = TrialRecord.read(stored)
        if baseline.measurement is None or baseline.size_bytes is None:
            return None
        return Constraints.of(run.config(), baseline)
    except ConfigError:
        return None


def finished_records(run: RunDirectory) -> list[TrialRecord]:
    """Return the latest record of every trial, and what ``best/`` holds where later training made a worse one of it."""
    records = [record for _, record in sorted(run.records().items())]
    try:
        best = TrialRecord.read(run.best / "record.json")
    except ConfigError:  # there is none yet
        return records
    # Of a network measured again the latest measurement counts.
    known = any((r.number, r.stage, r.accuracy) == (best.number, best.stage, best.accuracy) for r in records)
    if best.stage == "baseline" or known:
        return records
    return [r for r in records if (r.number, r.stage) != (best.number, best.stage)] + [best]


def run_front(run: RunDirectory) -> list[TrialRecord]:
    """Return a run's front, fastest first: what the table, the report, ``pareto.json`` and `Run.front` show."""
    return pareto_front(finished_records(run), constraints_of(run))


def write_front(run: RunDirectory) -> None:
    """Write ``pareto.json`` from a run's records."""
    front = run_front(run)
    run.write(
        "pareto.json",
        {
            "axes": ["latency_ratio", "accuracy"],
            "front": [r.number for r in front],
            "records": [r.to_dict() for r in front],
        },
    )
