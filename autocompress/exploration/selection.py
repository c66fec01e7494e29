"""Which network is offered, and which are fine-tuned. Decides on validation data alone.

The result is on the front (`dominance`). Where a network meets every limit, it is the most accurate of these. Where
none does, two answers are true, and both are returned: the fastest within the allowed drop, and the most accurate
within the latency (and size). A network whose accuracy has collapsed is never offered: then the uncompressed one is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autocompress.exploration.constraints import DEFAULT_DROP, LOSSLESS_DROP, ROUNDING, Constraints
from autocompress.exploration.dominance import pareto_front
from autocompress.exploration.latency_limit.machine_speed import MachineSpeed
from autocompress.policy import CompressionPolicy
from autocompress.runs.records import TrialRecord

# Why a record is the best: `Offer.reason`.
MET, WITHIN_DROP, WITHIN_LATENCY, CLOSEST, UNCOMPRESSED = (
    "limits met", "fastest within the drop", "most accurate within the latency", "closest", "uncompressed",
)  # fmt: skip


@dataclass(frozen=True)
class Offer:
    """What a run has to offer.

    Attributes:
        best: What ``best/`` holds; the baseline's own record where no candidate is worth more.
        reason: Why: `MET`, `WITHIN_DROP`, `WITHIN_LATENCY`, `CLOSEST` or `UNCOMPRESSED`.
        fastest_within_drop: The fastest that loses no more than allowed, whatever the latency; None for none, or
            where no drop was given.
        most_accurate_within_latency: The most accurate that keeps the bounds of latency and size, whatever it
            loses; None for none, or where nothing is bounded.
    """

    best: TrialRecord
    reason: str
    fastest_within_drop: TrialRecord | None
    most_accurate_within_latency: TrialRecord | None


def best_record(records: Iterable[TrialRecord], constraints: Constraints, baseline: TrialRecord) -> TrialRecord:
    """Return the record to offer; the baseline's where there is none better. See `offer`."""
    return offer(records, constraints, baseline).best


def offer(records: Iterable[TrialRecord], constraints: Constraints, baseline: TrialRecord) -> Offer:
    """Return what to offer of a run's records.

    1. Within every limit: the most accurate (of those on the front, where each is measurably more accurate than what is
       faster). Without a bound on latency and size: the fastest within the drop.
    2. Else, with a drop allowed: the fastest within it.
    3. Else the most accurate within latency and size.
    4. Else the one closest to these bounds, if it loses little (no more than allowed, or `DEFAULT_DROP` if that is
       more; without an allowed drop, anything short of ruin).
    5. Else the uncompressed network.

    What is offered is not measurably slower than the baseline (`Measurement.verdict`) and never ruined
    (`Constraints.ruin`).
    Rules 2 to 4 count compressed networks alone; an uncompressed trial is what the user had.
    """
    front = _trials_on_front(records, constraints)
    near = [r for r in front if constraints.within_drop(r)]
    inside = [r for r in front if constraints.within_budget(r)]
    fastest = min(near, key=_ratio, default=None)
    accurate = _most_accurate(inside, constraints)
    best, reason = _choose(front, constraints, baseline)
    return Offer(
        best,
        reason,
        fastest if constraints.max_drop is not None else None,
        accurate if constraints.bounded else None,
    )


def _choose(front: Sequence[TrialRecord], constraints: Constraints, baseline: TrialRecord) -> tuple[TrialRecord, str]:
    sound = [r for r in front if not constraints.ruined(r) and r.measurement and r.measurement.verdict != "slower"]
    inside = [r for r in sound if constraints.within_budget(r)]
    near = [r for r in sound if constraints.within_drop(r)]
    if not constraints.bounded:
        meeting = min(near, key=_ratio, default=None)
    else:
        kept = inside if constraints.max_drop is None else [r for r in inside if constraints.within_drop(r)]
        meeting = _most_accurate(kept, constraints)
    if meeting is not None:
        return meeting, MET
    compressed = [r for r in sound if r.policy != baseline.policy]
    answers = (
        (_fastest_allowed(compressed, constraints), WITHIN_DROP),
        (_most_accurate([r for r in compressed if constraints.within_budget(r)], constraints), WITHIN_LATENCY),
        (_closest(compressed, constraints), CLOSEST),
    )
    return next(((record, reason) for record, reason in answers if record is not None), (baseline, UNCOMPRESSED))


def _fastest_allowed(records: Sequence[TrialRecord], constraints: Constraints) -> TrialRecord | None:
    """Return the fastest within the drop that the user allows; None where none is, or none was given."""
    near = [r for r in records if constraints.max_drop is not None and constraints.within_drop(r)]
    return min(near, key=_ratio, default=None)


def _closest(records: Sequence[TrialRecord], constraints: Constraints) -> TrialRecord | None:
    """Return the closest to the bounds of latency and size of those that lose little; None for none.

    Without these bounds it is the drop alone that is missed: the most accurate.
    """
    if not constraints.bounded:
        return _most_accurate(records, constraints)
    if constraints.max_drop is not None:
        most = max(constraints.max_drop, DEFAULT_DROP) + ROUNDING
        records = [r for r in records if constraints.drop(r) <= most]
    return min(records, key=lambda r: max(constraints.violations(r).values()), default=None)


def most_accurate(records: Iterable[TrialRecord], constraints: Constraints) -> TrialRecord | None:
    """Return the most accurate record within latency and size, whatever it loses: where search and training go on.

    Where nothing is within, the one closest to it; None where nothing finished.
    """
    front = _trials_on_front(records, constraints)
    inside = _most_accurate([r for r in front if constraints.within_budget(r)], constraints)
    if inside is not None or not front:
        return inside
    return min(front, key=lambda r: max(constraints.violations(r).values()))


def _most_accurate(records: Sequence[TrialRecord], constraints: Constraints) -> TrialRecord | None:
    """Return the most accurate of records of one front, settled ones first; None for none."""
    return max(records, key=lambda r: (constraints.settled(r), r.accuracy or 0.0, -_ratio(r)), default=None)


def _trials_on_front(records: Iterable[TrialRecord], constraints: Constraints) -> list[TrialRecord]:
    return pareto_front((r for r in records if r.stage != "baseline"), constraints)


def _ratio(record: TrialRecord) -> float:
    return record.measurement.ratio if record.measurement else 1.0


def is_lossless(record: TrialRecord, baseline: TrialRecord) -> bool:
    """Whether a candidate is as good as the baseline before any fine-tuning."""
    return (baseline.accuracy or 0.0) - (record.accuracy or 0.0) <= LOSSLESS_DROP


def finalists(
    records: Sequence[TrialRecord],
    constraints: Constraints,
    baseline: TrialRecord,
    count: int,
    machine_speed: MachineSpeed,
) -> list[TrialRecord]:
    """Return the candidates worth fine-tuning, most promising first.

    Within the budget (at every pace of the machine, where there are such) half are the most accurate before
    fine-tuning, the others those that keep the most multiply-accumulates: proxy accuracy orders deep cuts badly, and
    capacity is what fine-tuning has to work with.
    Without a budget: the front, from the fastest that keeps half of the baseline's accuracy on; all of it, since
    `promotion` decides. Ties stay, since fine-tuning tells them apart.
    """
    done = [r for r in records if r.state == "complete" and r.stage == "proxy" and r.accuracy is not None]
    if not constraints.bounded:
        floor = 0.5 * (baseline.accuracy or 0.0)
        return [r for r in pareto_front(done, ties=False) if (r.accuracy or 0.0) >= floor]
    inside = constraints.feasible_at_all_speeds(done, machine_speed)
    if not inside:
        return sorted(done, key=lambda r: max(constraints.violations(r).values()))[:1]
    by_accuracy = sorted(inside, key=lambda r: -(r.accuracy or 0.0))
    by_capacity = sorted(by_accuracy[: max(count, len(inside) // 2)], key=lambda r: -(r.macs or 0))
    chosen: dict[CompressionPolicy, TrialRecord] = {}
    for pair in zip(by_accuracy, by_capacity, strict=False):
        for record in pair:
            chosen.setdefault(record.policy, record)
    return list(chosen.values())[:count]
