"""Which results count: constraints, the front, and the one result that is offered. Decides on validation data alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from autocompress.config import RunConfig
from autocompress.policy import CompressionPolicy
from autocompress.results import MEASURED, Measurement, TrialRecord
from autocompress.run_directory import RunDirectory
from autocompress.search.pace import Pace
from autocompress.units import Limit

# Without any limit, "best" is the fastest result that loses at most this much (a fraction of the metric).
DEFAULT_DROP = 0.01
# Accuracies this close are equal, and those within one standard error: of fewer than 5,000 samples it is more.
TIE = 0.005
# A candidate that loses at most this much before any fine-tuning needs none.
LOSSLESS_DROP = 0.0025


@dataclass(frozen=True)
class Constraints:
    """The user's limits, resolved against the baseline.

    Attributes:
        latency: Bound on latency, in ms or relative to the baseline.
        latency_ms: The same in ms.
        max_drop: Largest loss of the metric, a fraction, or None.
        size_bytes: Bound on the engine's files, or None.
        baseline_ms, baseline_bytes: What the baseline took when the limits were resolved.
        tie: Accuracies this close are equal.
    """

    latency: Limit | None
    latency_ms: float | None
    max_drop: float | None
    size_bytes: float | None
    baseline_ms: float | None = field(default=None, compare=False)
    baseline_bytes: int | None = field(default=None, compare=False)
    tie: float = field(default=TIE, compare=False)

    @classmethod
    def of(cls, config: RunConfig, baseline: TrialRecord) -> Constraints:
        """Resolve a run's limits."""
        assert baseline.latency_ms is not None and baseline.size_bytes is not None
        latency, size = config.latency_limit, config.size_limit
        return cls(
            latency=latency,
            latency_ms=None if latency is None else latency.resolve(baseline.latency_ms),
            max_drop=config.drop_limit,
            size_bytes=None if size is None else size.resolve(baseline.size_bytes),
            baseline_ms=baseline.latency_ms,
            baseline_bytes=baseline.size_bytes,
            tie=max(TIE, _standard_error(baseline)),
        )

    def latency_excess(self, measurement: Measurement) -> float:
        """Return how far a measurement lies over the latency bound, as a fraction of it; feasible at or below 0.

        The upper end of the 95 % interval counts, so that what is called feasible stays so when measured again.
        """
        if self.latency is None:
            return -1.0
        found = measurement.ratio_high if self.latency.relative else measurement.high_ms
        return found / self.latency.value - 1

    def cost(self, record: TrialRecord, pace: Pace | None = None) -> float:
        """Return what is bounded, over the baseline's: the upper end of the latency's interval, or the size.

        A latency is that of the machine's usual pace, where that is given: those of one pace compare.
        """
        assert record.measurement is not None and record.size_bytes is not None
        if self.latency is None and self.size_bytes is not None:
            return record.size_bytes / (self.baseline_bytes or record.size_bytes)
        return record.measurement.ratio_high * (1.0 if pace is None else pace.level(record.measurement))

    @property
    def budget(self) -> float | None:
        """The bound of `cost`; None where nothing is bounded."""
        if self.latency is not None:
            return self.latency.value / (1.0 if self.latency.relative else self.baseline_ms or self.latency.value)
        return None if self.size_bytes is None else self.size_bytes / (self.baseline_bytes or self.size_bytes)

    def reached(self, measurement: Measurement) -> bool:
        """Whether a measurement's median, not its interval, is within the latency bound."""
        if self.latency is None:
            return True
        return (measurement.ratio if self.latency.relative else measurement.latency_ms) <= self.latency.value

    def violations(self, record: TrialRecord) -> dict[str, float]:
        """Return Optuna constraint values of latency and size; feasible when all are at or below 0."""
        assert record.measurement is not None and record.size_bytes is not None
        found = {}
        if self.latency is not None:
            found["latency"] = self.latency_excess(record.measurement)
        if self.size_bytes is not None:
            found["size"] = record.size_bytes / self.size_bytes - 1
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """Keys of `violations`."""
        found = {"latency": self.latency, "size": self.size_bytes}
        return tuple(name for name, limit in found.items() if limit is not None)

    def within_budget(self, record: TrialRecord) -> bool:
        """Whether latency and size are within their bounds; the metric is left out."""
        return all(value <= 0 for value in self.violations(record).values())

    def pace(self, records: Sequence[TrialRecord]) -> Pace:
        """Return the machine's pace, going by a run's records, oldest first; by the baseline's where there are none."""
        return Pace.of(records, self.baseline_ms or 1.0)

    def steady(self, records: Sequence[TrialRecord], pace: Pace) -> list[TrialRecord]:
        """Return the finished records that are within latency and size and stay so at every pace of the machine.

        Where there are none, those that are within as they were measured.
        """
        inside = [r for r in counting(records) if self.within_budget(r)]
        latency = self.latency
        if latency is None:
            return inside
        return [r for r in inside if r.measurement and pace.bound(r.measurement, latency) <= latency.value] or inside


def counting(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return the finished records whose latencies compare: those measured on the run's device, if there are any.

    Where nothing was measured, predictions compare with each other.
    """
    done = [r for r in records if r.state == "complete" and r.accuracy is not None and r.measurement is not None]
    return [r for r in done if r.measurement is not None and r.measurement.source == MEASURED] or done


def pareto_front(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return the records no other one beats in both accuracy and latency, fastest first.

    Latencies compare by their ratio to the baseline of the same interleaved run: a machine's speed drifts.
    """
    done = counting(records)
    done.sort(key=lambda r: (r.measurement.ratio if r.measurement else 0.0, -(r.accuracy or 0.0)))
    front: list[TrialRecord] = []
    for record in done:
        if not front or (record.accuracy or 0.0) > (front[-1].accuracy or 0.0):
            front.append(record)
    return front


def best_record(records: Iterable[TrialRecord], constraints: Constraints, baseline: TrialRecord) -> TrialRecord | None:
    """Return the record to offer, or None when nothing finished.

    With a latency or size bound: the best of those within it (see `_rank`); of those as good as it, before any
    fine-tuning the one with the most multiply-accumulates left (a budget is there to be used, and the highest of many
    accuracies is partly luck), after it the one that was trained longest (what it learned last is not what the original
    weights remembered of the validation data). Where nothing is within, the one closest to it.
    With a bound on the drop alone, or none: the fastest within the drop.
    """
    done = counting(records)
    if not done:
        return None
    if constraints.latency is not None or constraints.size_bytes is not None:
        inside = [r for r in done if constraints.within_budget(r)]
        if inside:
            best = max(inside, key=lambda r: _rank(r, baseline))
            ties = [r for r in inside if best.stage == r.stage and _equal(r, best, baseline, constraints.tie)]
            if best.stage == "recovered":
                return max(ties, key=lambda r: (r.seconds.get("recovery", 0.0), _rank(r, baseline)))
            return max(ties, key=lambda r: (r.macs or 0, _rank(r, baseline)), default=best)
        return min(done, key=lambda r: max(constraints.violations(r).values()))
    allowed = constraints.max_drop if constraints.max_drop is not None else DEFAULT_DROP
    floor = (baseline.accuracy or 0.0) - allowed
    near = [r for r in done if (r.accuracy or 0.0) >= floor]
    if near:
        return min(near, key=lambda r: r.measurement.ratio if r.measurement else 1.0)
    return max(done, key=lambda r: r.accuracy or 0.0)


def is_lossless(record: TrialRecord, baseline: TrialRecord) -> bool:
    """Whether a candidate is as good as the baseline before any fine-tuning."""
    return (baseline.accuracy or 0.0) - (record.accuracy or 0.0) <= LOSSLESS_DROP


def _standard_error(record: TrialRecord) -> float:
    """Return that of an accuracy, and at least that of any mean of numbers from 0 to 1; 0 where it is not known."""
    accuracy = min(max(record.accuracy or 0.0, 0.0), 1.0)
    return (accuracy * (1 - accuracy) / record.samples) ** 0.5 if record.samples else 0.0


def _equal(record: TrialRecord, best: TrialRecord, baseline: TrialRecord, tie: float) -> bool:
    """Whether a record is as good as the best one, as far as can be told."""
    lossless = is_lossless(record, baseline) == is_lossless(best, baseline)
    return lossless and (record.accuracy or 0.0) >= (best.accuracy or 0.0) - tie


def _rank(record: TrialRecord, baseline: TrialRecord) -> tuple[bool, float, float]:
    """Order candidates within the budget: lossless or fine-tuned ones first, then by accuracy, then by speed.

    Accuracies before and after fine-tuning do not compare where the original weights were trained on the validation
    data too, which is the rule with published weights: fine-tuning forgets what the network remembered of them, so its
    validation accuracy falls while its test accuracy rises.
    """
    settled = record.stage == "recovered" or is_lossless(record, baseline)
    # The ratio, as on the front: two latencies of different minutes do not compare.
    return settled, record.accuracy or 0.0, -(record.measurement.ratio if record.measurement else 1.0)


def finalists(
    records: Sequence[TrialRecord], constraints: Constraints, baseline: TrialRecord, count: int, pace: Pace
) -> list[TrialRecord]:
    """Return the candidates worth fine-tuning, most promising first.

    Within the budget (at every pace of the machine, where there are such) half are the most accurate before
    fine-tuning, the others those that keep the most multiply-accumulates: proxy accuracy orders deep cuts badly, and
    capacity is what fine-tuning has to work with.
    Without a budget: the front, from the fastest that keeps half of the baseline's accuracy on; all of it, since
    `promotion` decides.
    """
    done = [r for r in records if r.state == "complete" and r.stage == "proxy" and r.accuracy is not None]
    if constraints.latency is None and constraints.size_bytes is None:
        floor = 0.5 * (baseline.accuracy or 0.0)
        return [r for r in pareto_front(done) if (r.accuracy or 0.0) >= floor]
    inside = constraints.steady(done, pace)
    if not inside:
        return sorted(done, key=lambda r: max(constraints.violations(r).values()))[:1]
    by_accuracy = sorted(inside, key=lambda r: -(r.accuracy or 0.0))
    by_capacity = sorted(by_accuracy[: max(count, len(inside) // 2)], key=lambda r: -(r.macs or 0))
    chosen: dict[CompressionPolicy, TrialRecord] = {}
    for pair in zip(by_accuracy, by_capacity, strict=False):
        for record in pair:
            chosen.setdefault(record.policy, record)
    return list(chosen.values())[:count]


def write_front(run: RunDirectory) -> None:
    """Write ``pareto.json`` from a run's records."""
    front = pareto_front(run.records().values())
    run.write(
        "pareto.json",
        {
            "axes": ["latency_ratio", "accuracy"],
            "front": [r.number for r in front],
            "records": [r.to_dict() for r in front],
        },
    )
