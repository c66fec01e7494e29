"""The user's limits, resolved against the baseline: what a record breaks, and by how much."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from autocompress.config import RunConfig
from autocompress.exploration.latency_limit.machine_speed import MachineSpeed
from autocompress.quantities import Limit
from autocompress.runs.records import MEASURED, Measurement, TrialRecord

# Without a limit on the drop, a result may lose this much (a fraction of the metric) to count as nearly as good.
DEFAULT_DROP = 0.01
# Among candidates for fine-tuning accuracies this close are equal, and those within one standard error.
TIE = 0.005
# A candidate that loses at most this much before any fine-tuning needs none.
LOSSLESS_DROP = 0.0025
# A network is ruined when it lost this share of what the baseline has, or this many times the allowed drop where a
# drop is allowed, though not before it lost `_LEAST_RUIN`.
_RUIN_SHARE, _RUIN_TIMES, _LEAST_RUIN = 0.5, 10.0, 0.05
# Accuracies are counts over samples: a drop of exactly the limit must not fail by a rounding error.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Constraints:
    """The user's limits, resolved against the baseline.

    Attributes:
        latency: Bound on latency, in ms or relative to the baseline.
        latency_ms: The same in ms.
        max_drop: Largest loss of the metric, a fraction, or None.
        size_bytes: Bound on the engine's files, or None.
        baseline_ms, baseline_bytes, baseline_accuracy: The baseline's figures when the limits were resolved.
        tie: Accuracies this close are equal among candidates for fine-tuning.
        quiet: Whether latency is judged on the quiet machine alone, not in the least favourable state.
    """

    latency: Limit | None
    latency_ms: float | None
    max_drop: float | None
    size_bytes: float | None
    baseline_ms: float | None = field(default=None, compare=False)
    baseline_bytes: int | None = field(default=None, compare=False)
    tie: float = field(default=TIE, compare=False)
    baseline_accuracy: float | None = field(default=None, compare=False)
    quiet: bool = False

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
            baseline_accuracy=baseline.accuracy,
            quiet=config.latency_state == "quiet",
        )

    # -- latency and size -----------------------------------------------------------------------------------------

    @property
    def bounded(self) -> bool:
        """Whether latency or size has a bound."""
        return self.latency is not None or self.size_bytes is not None

    def latency_excess(self, measurement: Measurement) -> float:
        """Return how far a measurement lies over the latency bound, as a fraction of it; feasible at or below 0.

        The upper end of the 95 % interval counts, so that what is called feasible stays so when measured again.
        """
        if self.latency is None:
            return -1.0
        return self.upper(measurement) / self.latency.value - 1

    def upper(self, measurement: Measurement) -> float:
        """Return the end of a measurement's interval that the limit is judged by: a ratio, or ms for a limit in ms."""
        ratio = self._ratio_high(measurement)
        if self.latency is None or self.latency.relative:
            return ratio
        return measurement.high_ms * ratio / measurement.ratio_high

    def _ratio_high(self, measurement: Measurement) -> float:
        return measurement.quiet[2] if self.quiet else measurement.ratio_high

    def cost(self, record: TrialRecord, machine_speed: MachineSpeed | None = None) -> float:
        """Return what is bounded, over the baseline's: the upper end of the latency's interval, or the size.

        A latency is that of the machine's usual pace, where that is given: those of one pace compare.
        """
        assert record.measurement is not None and record.size_bytes is not None
        if self.latency is None and self.size_bytes is not None:
            return record.size_bytes / (self.baseline_bytes or record.size_bytes)
        return self._ratio_high(record.measurement) * (
            1.0 if machine_speed is None else machine_speed.normalise(record.measurement)
        )

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
        ratio = measurement.quiet[0] if self.quiet else measurement.worst_ratio
        found = ratio if self.latency.relative else measurement.latency_ms * ratio / measurement.ratio
        return found <= self.latency.value

    def undecided(self, measurement: Measurement) -> bool:
        """Whether further occasions may show that a measurement is within the latency bound: its median is."""
        return self.reached(measurement) and self.latency_excess(measurement) > 0

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

    # -- the metric -----------------------------------------------------------------------------------------------

    @property
    def allowed_drop(self) -> float:
        """The largest loss that counts as nearly as good: the user's, else `DEFAULT_DROP`."""
        return DEFAULT_DROP if self.max_drop is None else self.max_drop

    def drop(self, record: TrialRecord) -> float:
        """Return the VALIDATION accuracy lost against the baseline, a fraction; 0 where the baseline is not known."""
        return 0.0 if self.baseline_accuracy is None else self.baseline_accuracy - (record.accuracy or 0.0)

    def within_drop(self, record: TrialRecord) -> bool:
        """Whether a record loses no more than `allowed_drop`."""
        return self.drop(record) <= self.allowed_drop + ROUNDING

    def settled(self, record: TrialRecord) -> bool:
        """Whether a record's accuracy compares with that of a fine-tuned one.

        Published weights were often trained on the validation data too. Before fine-tuning a network remembers some of
        it; fine-tuning forgets that, so validation accuracy falls while test accuracy rises. A network that has
        lost something, and was not fine-tuned, may therefore look better than it is. One that loses nothing, or no more
        than the user allows, needs no fine-tuning, and is judged by the same limit as a fine-tuned one.
        """
        return record.stage != "proxy" or self.drop(record) <= max(self.max_drop or 0.0, LOSSLESS_DROP) + ROUNDING

    @property
    def ruin(self) -> float:
        """The loss (a fraction of the metric) beyond which a network has collapsed and is never offered.

        Half of what the baseline has; where the user allows a drop, ten times that (and at least 5 points), if it is
        less. The metric counts from 0, as the number of classes, and with it the accuracy of guessing, is not
        recorded.
        """
        half = _RUIN_SHARE * (self.baseline_accuracy or 0.0)
        return half if self.max_drop is None else min(half, max(_RUIN_TIMES * self.max_drop, _LEAST_RUIN))

    def ruined(self, record: TrialRecord) -> bool:
        """Whether a record's accuracy has collapsed; see `ruin`."""
        return self.baseline_accuracy is not None and self.drop(record) > self.ruin + ROUNDING

    # -- several records ------------------------------------------------------------------------------------------

    def broken(self, record: TrialRecord) -> frozenset[str]:
        """Return which limits a record breaks: ``"latency"``, ``"size"``, ``"drop"`` (`allowed_drop`)."""
        over = {name for name, value in self.violations(record).items() if value > 0}
        return frozenset(over if self.within_drop(record) else {*over, "drop"})

    def keeps_what(self, one: TrialRecord, other: TrialRecord) -> bool:
        """Whether `one` keeps every limit that `other` keeps, and is no further over the bound on size."""
        over = [max(self.violations(r).get("size", 0.0), 0.0) for r in (one, other)]
        return self.broken(one) <= self.broken(other) and over[0] <= over[1]

    def machine_speed(self, records: Sequence[TrialRecord]) -> MachineSpeed:
        """Return the machine's pace, going by a run's records, oldest first; by the baseline's where there are none."""
        return MachineSpeed.of(records, self.baseline_ms or 1.0)

    def feasible_at_all_speeds(self, records: Sequence[TrialRecord], machine_speed: MachineSpeed) -> list[TrialRecord]:
        """Return the finished records that are within latency and size and stay so at every pace of the machine.

        Where there are none, those that are within as they were measured.
        """
        inside = [r for r in counting(records) if self.within_budget(r)]
        latency = self.latency
        if latency is None:
            return inside
        return [
            r
            for r in inside
            if r.measurement and machine_speed.bound(r.measurement, latency, self.upper(r.measurement)) <= latency.value
        ] or inside


def counting(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return the finished records whose latencies compare: those measured on the run's device, if there are any.

    Where nothing was measured, predictions compare with each other.
    """
    done = [r for r in records if r.state == "complete" and r.accuracy is not None and r.measurement is not None]
    return [r for r in done if r.measurement is not None and r.measurement.source == MEASURED] or done


def _standard_error(record: TrialRecord) -> float:
    """Return that of an accuracy, and at least that of any mean of numbers from 0 to 1; 0 where it is not known."""
    accuracy = min(max(record.accuracy or 0.0, 0.0), 1.0)
    return (accuracy * (1 - accuracy) / record.samples) ** 0.5 if record.samples else 0.0
