"""Which of two networks is better, and which of many nothing beats: the one definition that every view uses.

A network dominates another when it is no slower, not measurably less accurate, and better in one of these: measurably
more accurate, faster, or at equal latency smaller. Two accuracies on the same samples differ measurably when they
differ by more than the standard error of their difference; below that they are a tie, which latency decides, then
size. Two cautions go with it where the run's limits are known: a network that breaks a limit dominates none that keeps
it (nor, where size is bounded, one that is closer to the bound), and accuracies of networks that fine-tuning has not
settled do not count against settled ones (`Constraints.settled`).

Two records of one policy are one network before and after (more) training: its latency is the same, whatever was
measured, so that a tie goes to the one that was trained longer.

Ties do not chain. Of a hundred networks, each a hair less accurate and a hair faster than the one before, all but the
fastest would be dominated by their neighbours. So a network leaves the front only for one that is on the front: each
step from the fastest on is measurably more accurate than what it is compared with before it, and what is left out is
dominated by something that is shown. (That is the kernel of the relation; dominance follows latency, so it goes in no
circle, and the kernel exists and is unique.)
"""

from __future__ import annotations

from collections.abc import Iterable

from autocompress.exploration.constraints import Constraints, counting
from autocompress.policy import CompressionPolicy
from autocompress.runs.records import TrialRecord

_ROUNDING = 1e-12


def standard_error_of_difference(accuracy: float, samples: int | None) -> float:
    """Return the standard error of the difference of two equally good networks on the same samples.

    With the variance p(1 - p) / n of one accuracy, and the correlation r of which samples the two get right, it is
    the root of 2 (1 - r) p (1 - p) / n. Both are compressions of one network and err on much the same samples; r is
    taken as 1/2, so that it comes to the standard error of one accuracy. Independent networks would have 1.4 times as
    much. One success and one failure are added, so that it is never 0 where all samples are right. For any other mean
    of numbers in [0, 1] it is an upper bound of the same form.

    Args:
        accuracy: Of the less accurate one; values outside [0, 1] count as the nearer end.
        samples: That it is of; None where that is not recorded, for which only equal accuracies tie.
    """
    if not samples:
        return 0.0
    share = (min(max(accuracy, 0.0), 1.0) * samples + 1) / (samples + 2)
    return float((share * (1 - share) / samples) ** 0.5)


def measurably_better(one: TrialRecord, other: TrialRecord) -> bool:
    """Whether a record's accuracy is higher by more than the standard error of the difference."""
    high, low = one.accuracy or 0.0, other.accuracy or 0.0
    return high > low + standard_error_of_difference(low, other.samples) + _ROUNDING


def dominates(
    one: TrialRecord, other: TrialRecord, constraints: Constraints | None = None, *, ties: bool = True
) -> bool:
    """Whether one measured record is better than another, so that nobody would want the other.

    Latencies compare by their ratio to the baseline of the same interleaved run: a machine's speed drifts.

    Args:
        one, other: Complete records.
        constraints: The run's limits; None compares the figures alone.
        ties: False takes every difference of accuracies as it is.
    """
    assert one.measurement is not None and other.measurement is not None
    fast, slow = one.measurement.ratio, other.measurement.ratio
    high, low = one.accuracy or 0.0, other.accuracy or 0.0
    worse = measurably_better(other, one) if ties else high < low
    if one is other or fast > slow or worse:
        return False
    if constraints is not None:
        if not constraints.keeps_what(one, other):
            return False
        if constraints.settled(other) and not constraints.settled(one):
            return False
    if fast < slow or (measurably_better(one, other) if ties else high > low):
        return True
    if measurably_better(other, one):
        return False
    return _last_resort(one) < _last_resort(other)


def pareto_front(
    records: Iterable[TrialRecord], constraints: Constraints | None = None, *, ties: bool = True
) -> list[TrialRecord]:
    """Return the records that no other one of the front dominates, fastest first.

    Args:
        records: Of one run; failed and rejected ones are left out.
        constraints: The run's limits; see the module.
        ties: See `dominates`.
    """
    done = _one_a_network(counting(records), constraints, ties=ties)
    done.sort(key=lambda r: (r.measurement.ratio if r.measurement else 0.0, _last_resort(r)))
    front: list[TrialRecord] = []
    for record in done:
        if not any(dominates(kept, record, constraints, ties=ties) for kept in front):
            # Only one of equal latency can go for what comes after it.
            front = [kept for kept in front if not dominates(record, kept, constraints, ties=ties)]
            front.append(record)
    return front


def _one_a_network(records: list[TrialRecord], constraints: Constraints | None, *, ties: bool) -> list[TrialRecord]:
    """Leave out records of a network that training has made no worse: the one that was trained longer stays."""
    by_policy: dict[CompressionPolicy, list[TrialRecord]] = {}
    for record in records:
        by_policy.setdefault(record.policy, []).append(record)

    def replaced(record: TrialRecord, later: TrialRecord) -> bool:
        trained = later.seconds.get("recovery", 0.0) > record.seconds.get("recovery", 0.0)
        better = measurably_better(record, later) if ties else (record.accuracy or 0.0) > (later.accuracy or 0.0)
        return trained and not better and (constraints is None or constraints.keeps_what(later, record))

    return [r for r in records if not any(replaced(r, other) for other in by_policy[r.policy])]


def _last_resort(record: TrialRecord) -> tuple[float, float, int]:
    """Order records of equal latency and tied accuracy: the smaller one, then the more accurate, then the earlier."""
    size = float("inf") if record.size_bytes is None else float(record.size_bytes)
    return size, -(record.accuracy or 0.0), record.number
