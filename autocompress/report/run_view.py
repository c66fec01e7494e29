"""`RunView`: what a report shows of one run, read once, whether it finished, was interrupted or found nothing.

Owns the reading and the arithmetic between records; formatting belongs to `tables` and `html`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocompress import quantities
from autocompress.config import RunConfig
from autocompress.errors import ConfigError
from autocompress.exploration import pareto
from autocompress.exploration.missed_limits import DROP, LATENCY, SIZE, missed_limits, say_alternatives
from autocompress.runs.directory import RunDirectory
from autocompress.runs.metric import Metric
from autocompress.runs.records import PREDICTED, Measurement, TrialRecord
from autocompress.runs.summaries import read_environment, read_summary


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
        front: The Pareto front of validation accuracy against latency, fastest first; see `exploration.dominance`.
        best: The result, or None. Its stage is ``"baseline"`` where the uncompressed model is offered.
        damaged: What is wrong with each line of the log that could not be read.
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
    damaged: tuple[str, ...] = ()

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
        """The trials that tables list: the front without the baseline, and the result, even if of an old release.

        Releases before there was one definition of the front chose results that were not on it.
        """
        front = [p for p in self.front if p.record.stage != "baseline"]
        if self.best is not None and self.best.record.stage != "baseline" and not any(map(self.is_best, front)):
            front.append(self.best)
        return tuple(sorted(front, key=lambda p: p.measurement.ratio))

    def is_best(self, point: Point) -> bool:
        """Whether a point is the result, or a later round of training of it."""
        best = None if self.best is None else self.best.record
        return best is not None and (best.number, best.stage) == (point.record.number, point.record.stage)

    @property
    def metric(self) -> Metric:
        """The metric that accuracies are of."""
        named = self.summary.get("metric") or (self.baseline.record.metric if self.baseline else None)
        return Metric(str(named or "accuracy"))

    @property
    def offered_instead(self) -> str:
        """What there is within the drop alone and within the latency alone, in words; empty where all is met."""
        return say_alternatives(self.summary)

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

    @property
    def latency_limit_ratio(self) -> float | None:
        """The latency bound as a ratio to the baseline, where it was given as one."""
        if "latency_ratio" in (self.summary.get("constraints") or {}):
            value = self.summary["constraints"]["latency_ratio"]
            return None if value is None else float(value)
        limit = None if self.config is None else self.config.latency_limit
        return limit.value if limit is not None and limit.relative else None

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
        if best is None or self.baseline is None:
            return ()
        ratio = float(given.get("latency_ratio") or best.measurement.ratio)
        now = float(given.get("latency_ms") or best.measurement.latency_ms)
        tested = given.get("accuracy") is not None
        drop = float(given["accuracy_drop_pp"]) / 100 if tested else self.baseline.accuracy - best.accuracy
        size = best.record.size_bytes or 0
        limits = {
            "latency_ms": self.latency_limit_ms, "latency_ratio": self.latency_limit_ratio,
            "max_drop": self.drop_limit, "size_bytes": self.size_limit_bytes,
        }  # fmt: skip
        figures = {
            "latency_ms": now, "latency_ratio": ratio, "accuracy_drop_pp": 100 * drop, "size_bytes": size,
        }  # fmt: skip
        missed = {entry["limit"] for entry in missed_limits(figures, limits)}
        if (most := limits["latency_ratio"]) is not None:
            what = f"latency, {best.measurement.source}, of the baseline's"
            found.append(Check(what, f"{most:.3g}×", f"{ratio:.3f}×", LATENCY not in missed))
        elif (limit := limits["latency_ms"]) is not None:
            what = f"latency, {best.measurement.source}"
            found.append(Check(what, quantities.format_ms(limit), quantities.format_ms(now), LATENCY not in missed))
        if (most := limits["max_drop"]) is not None:
            what = f"loss of {'test' if tested else 'validation'} {self.metric.name}"
            lost = self.metric.change(-drop).removeprefix("+").removeprefix("±")
            found.append(Check(what, self.metric.loss(most), lost, DROP not in missed))
        if (room := limits["size_bytes"]) is not None:
            found.append(
                Check("size on disk", quantities.format_bytes(room), quantities.format_bytes(size), SIZE not in missed)
            )
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
    summary = _unless_damaged(read_summary, run)
    baseline = Point.of(_record(run.baseline))
    records = pareto.finished_records(run)
    comparable = {id(r) for r in pareto.counting(records)}
    points = [p for r in records if id(r) in comparable and (p := Point.of(r)) is not None]
    of_record = {id(p.record): p for p in points}
    try:
        config = run.config()
    except ConfigError:
        config = None
    front = pareto.pareto_front(records, pareto.constraints_of(run))
    return RunView(
        path=run.path,
        summary=summary,
        config=config,
        environment=_unless_damaged(read_environment, run),
        damaged=run.log().damaged,
        baseline=baseline,
        points=tuple(points),
        failed=tuple(r for r in records if r.state == "failed"),
        rejected=tuple(r for r in records if r.state == "rejected"),
        front=tuple(of_record[id(r)] for r in front),
        best=_best(run, summary, baseline, points),
    )


def _best(run: RunDirectory, summary: Mapping[str, Any], baseline: Point | None, points: list[Point]) -> Point | None:
    """Return the point of the result: what the summary names, else what ``best/`` holds."""
    given = summary.get("best") or {}
    if given.get("stage") == "baseline":
        return baseline
    named = [p for p in points if p.record.number == given.get("trial")]
    if named:
        # Records of old releases' summaries have no stage.
        return next((p for p in named if p.record.stage == given.get("stage")), named[0])
    held = Point.of(_record(run.best))
    if held is not None and held.record.stage == "baseline":
        return baseline
    return None if summary and given.get("trial") is None else held


def _unless_damaged(read: Callable[[RunDirectory], Mapping[str, Any]], run: RunDirectory) -> Mapping[str, Any]:
    try:
        return read(run)
    except ConfigError:
        return {}


def _record(folder: Path) -> TrialRecord | None:
    path = folder / "record.json"
    try:
        return TrialRecord.read(path) if path.exists() else None
    except ConfigError:
        return None
