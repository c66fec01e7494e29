"""Early rejection: a candidate whose first look cannot reach what others have is not built, checked and measured.

The decision uses intervals, so that what might still count goes on: the upper end of the accuracy seen, and the lower
end of the latency predicted.
"""

from __future__ import annotations

from collections.abc import Iterable

from autocompress.exploration.pareto import Constraints, counting
from autocompress.prediction.predictor import Prediction
from autocompress.runs.records import TrialRecord
from autocompress.tasks.validation import ProxyEstimate

# Candidates inside the limit before any is rejected, as a multiple of those that will be fine-tuned.
_ENOUGH = 2


def cannot_win(
    seen: ProxyEstimate, predicted: Prediction, records: Iterable[TrialRecord], constraints: Constraints, finalists: int
) -> bool:
    """Whether a candidate can neither be offered nor be fine-tuned, as far as its first look tells.

    With a latency limit all candidates compete for the same place: fine-tuning takes the best `finalists` and none of
    the worse half (see `pareto.finalists`). Without one, a candidate counts on the front, so one that was measured
    must be faster than this one is certain to be, and at least as accurate as it may be.

    Args:
        seen: The candidate's accuracy.
        predicted: Its latency.
        records: Of this run.
        constraints: Whose latency limit counts.
        finalists: How many are fine-tuned.
    """
    known = [r for r in counting(records) if r.stage == "proxy"]
    if constraints.latency is None:
        faster = [r for r in known if r.measurement is not None and r.measurement.ratio_high <= predicted.low]
        return any((r.accuracy or 0.0) >= seen.high for r in faster)
    inside = sorted((r.accuracy or 0.0 for r in known if constraints.within_budget(r)), reverse=True)
    if len(inside) < _ENOUGH * finalists:
        return False
    return seen.high < inside[max(finalists, len(inside) // 2) - 1]
