"""`RunView`: what a report shows of one run, read once, whether it finished, was interrupted or found nothing.

Owns the reading and the arithmetic between records; formatting belongs to `tables` and `html`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocompress import units
from autocompress.config import RunConfig
from autocompress.errors import ConfigError
from autocompress.results import PREDICTED, Measurement, TrialRecord, read_json
from autocompress.run_directory import RunDirectory
from autocompress.search import pareto


@dataclass(frozen=True)
class Point:
    """One measured candidate, with nothing missing that a plot or a table needs.

    Attributes:
        record: The whole record.
        accuracy: On VALIDATION data, in [0, 1]; higher is better.
        measurement: Latency of the engine file, interleaved with the baseline.
    """

    record: TrialRecord
    accuracy: float
    measurement: Measurement

    @classmethod
    def of(cls, record: TrialRecord | None) -> Point | None:
        """Return the point of a record, or None when it failed or was never measured."""
        if record is None or record.state != "complete" or record.accuracy is None or record.measurement is None:
            return None
        return cls(record, record.accuracy, record.measurement)


@dataclass(frozen=True)
class Check:
    """One limit: what was asked, what the result reached, both formatted, and whether it is met."""

    what: str
    asked: str
    reached: str
    met: bool


def pareto_front(points: Iterable[Point]) -> tuple[Point, ...]:
    """Return the points that no other beats in both latency (lower) and accuracy (higher), fastest first."""
    of_record = {id(point.record): point for point in points}
    return tuple(of_record[id(record)] for record in pareto.pareto_front(p.record for p in of_record.values()))


@dataclass(frozen=True)
class RunView:
    """One run as its report shows it.

    Attributes:
        path: The run directory.
        summary: The document of ``summary.json``; empty when the run was interrupted before writing it.
        config: The run file; None when unreadable.
        environment: The document of ``env.json``; empty when missing.
        baseline: The uncompressed model, or None.
        points: Every candidate except the baseline whose latency compares with the others', by trial number.
        failed: Records of the failed candidates, by trial number.
        rejected: Records of those that were not built for what was seen of them, by trial number.
        front: The Pareto front of validation accuracy against latency, fastest first.
        best: The result, or None.
    """

    path: Path
    summary: Mapping[str, Any]
    config: RunConfig | None
    environment: Mapping[str, Any]
    baseline: Point | None
    points: tuple[Point, ...]
    failed: tuple[TrialRecord, ...]
    rejected: tuple[TrialRecord, ...]
    front: tuple[Point, ...]
    best: Point | None

    @property
    def finished(self) -> bool:
        """Whether the run wrote its summary."""
        return bool(self.summary)

    @property
    def predicted(self) -> bool:
        """Whether latencies come from a latency table and nothing was run."""
        return bool(self.points) and all(point.measurement.source == PREDICTED for point in self.points)

    @property
    def summary_best(self) -> Mapping[str, Any]:
        """The summary's ``best`` section; empty when there is none."""
        return self.summary.get("best") or {}

    @property
    def listed(self) -> tuple[Point, ...]:
        """The trials that tables list: the front without the baseline, and the result even where it is not on it.

        A fine-tuned result may lie below a proxy that was trained on the validation data, and one found first below
        a tie.
        """
        front = [p for p in self.front if p.record.stage != "baseline"]
        if self.best is not None and all(p.record.number != self.best.record.number for p in front):
            front.append(self.best)
        return tuple(sorted(front, key=lambda p: p.measurement.ratio))

    @property
    def latency_limit_ms(self) -> float | None:
        """The latency bound in ms, or None when the run had none or its baseline is unknown."""
        if self.finished:
            value = (self.summary.get("constraints") or {}).get("latency_ms")
            return None if value is None else float(value)
        limit = None if self.config is None else self.config.latency_limit
        if limit is None or (limit.relative and self.baseline is None):
            return None
        return limit.resolve(self.baseline.measurement.latency_ms if self.baseline else 1.0)

    @property
    def drop_limit(self) -> float | None:
        """The largest allowed loss of accuracy, as a fraction, or None."""
        if self.finished:
            value = (self.summary.get("constraints") or {}).get("max_drop")
            return None if value is None else float(value)
        return None if self.config is None else self.config.drop_limit

    @property
    def size_limit_bytes(self) -> float | None:
        """The size bound in bytes, or None."""
        if self.finished:
            value = (self.summary.get("constraints") or {}).get("size_bytes")
            return None if value is None else float(value)
        limit = None if self.config is None else self.config.size_limit
        size = None if self.baseline is None else self.baseline.record.size_bytes
        if limit is None or (limit.relative and size is None):
            return None
        return limit.resolve(float(size or 1))

    def drop(self, point: Point) -> float | None:
        """Return the VALIDATION accuracy lost against the baseline, as a fraction; None without a baseline."""
        return None if self.baseline is None else self.baseline.accuracy - point.accuracy

    def latency_ms(self, point: Point) -> float:
        """Return a point's latency at the baseline's speed: its measured ratio times the baseline's median.

        The medians of two trials were taken minutes apart, between which a machine may change its speed; the ratios of
        interleaved rounds compare. The baseline is that of the summary, in which limits are resolved too: the first
        measurement of a run may have been disturbed.
        """
        whole = self.baseline_ms
        return point.measurement.latency_ms if whole is None else point.measurement.ratio * whole

    @property
    def baseline_ms(self) -> float | None:
        """The uncompressed model's latency, as last measured; None without a baseline."""
        if self.baseline is None:
            return None
        latest = (self.summary.get("baseline") or {}).get("latency_ms")
        return float(latest or self.baseline.measurement.latency_ms)

    def macs_ratio(self, point: Point) -> float | None:
        """Return the share of the baseline's multiply-accumulates that is left, or None when unknown."""
        whole = None if self.baseline is None else self.baseline.record.macs
        return point.record.macs / whole if whole and point.record.macs is not None else None

    def checks(self) -> tuple[Check, ...]:
        """Return every limit of the run against the result; test accuracy where it was read, else validation."""
        best, given, found = self.best, self.summary_best, []
        if best is None:
            return ()
        if (limit := self.latency_limit_ms) is not None:
            now = float(given.get("latency_ms") or best.measurement.latency_ms)
            found.append(Check("latency, measured", units.format_ms(limit), units.format_ms(now), now <= limit))
        if (most := self.drop_limit) is not None:
            tested = given.get("accuracy_drop_pp")
            drop = self.drop(best) if tested is None else float(tested) / 100
            if drop is not None:
                what = f"loss of {'validation' if tested is None else 'test'} accuracy"
                # Accuracies are counts over samples: a drop of exactly the limit must not fail by a rounding error.
                found.append(Check(what, f"{100 * most:.3g} pp", f"{100 * drop:.2f} pp", drop <= most + 1e-9))
        if (room := self.size_limit_bytes) is not None and (size := best.record.size_bytes) is not None:
            found.append(Check("size on disk", units.format_bytes(room), units.format_bytes(size), size <= room))
        return tuple(found)

    def seconds(self) -> dict[str, float]:
        """Return wall time by activity; summed over the trials when there is no summary."""
        if self.finished:
            listed = self.summary.get("seconds") or {}
            return {k: float(v) for k, v in listed.items() if isinstance(v, int | float)}
        spent: dict[str, float] = {}
        for record in (*(p.record for p in self.points), *self.failed, *self.rejected):
            for name, value in record.seconds.items():
                spent[name] = spent.get(name, 0.0) + value
        return spent


def read_run(run: RunDirectory) -> RunView:
    """Read a run; files that an interrupted run never wrote count as empty.

    Raises:
        ConfigError: A record was written by a newer release.
    """
    summary = _document(run.path / "summary.json")
    baseline = Point.of(_record(run.baseline))
    records = run.records()
    comparable = {r.number for r in pareto.counting(records.values())}
    points = {n: p for n, r in sorted(records.items()) if n in comparable and (p := Point.of(r)) is not None}
    listed = _document(run.path / "pareto.json").get("records") if summary else None
    front = (Point.of(TrialRecord.from_dict(data)) for data in listed or ())
    number = (summary.get("best") or {}).get("trial")
    best = points.get(number) if number is not None else None
    try:
        config = run.config()
    except ConfigError:
        config = None
    return RunView(
        path=run.path,
        summary=summary,
        config=config,
        environment=_document(run.path / "env.json"),
        baseline=baseline,
        points=tuple(points.values()),
        failed=tuple(r for _, r in sorted(records.items()) if r.state == "failed"),
        rejected=tuple(r for _, r in sorted(records.items()) if r.state == "rejected"),
        front=pareto_front(p for p in front if p is not None) if listed else pareto_front(points.values()),
        best=best or (None if summary and number is None else Point.of(_record(run.best))),
    )


def _document(path: Path) -> Mapping[str, Any]:
    try:
        data = read_json(path)
    except ConfigError:
        return {}
    return data if isinstance(data, dict) else {}


def _record(folder: Path) -> TrialRecord | None:
    data = _document(folder / "record.json")
    return TrialRecord.from_dict(data) if data else None
