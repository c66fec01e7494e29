"""Which candidate is fine-tuned next where the whole front is wanted: the one that gains most for its seconds.

What fine-tuning makes of a candidate is not known before, but it closes about the same share of the gap to the
uncompressed network for all of them: that share is assumed at first, and learned from every candidate that was
fine-tuned. The gain is the hypervolume that the candidate would then add to the front; the seconds of an epoch go with
its multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

import numpy as np

from autocompress.exploration.knapsack.hypervolume import hypervolume_gain
from autocompress.runs.records import TrialRecord

# Share of the gap that fine-tuning is taken to close while nothing is known.
_CLOSED = 0.7
# Of the time of one epoch, what does not grow with the network: data, teacher, building, scoring.
_FIXED = 0.3


class Promotion:
    """Choose among candidates, and learn from what became of them.

    Args:
        baseline: The uncompressed model, which fine-tuning leads towards.
        records: All finished candidates: the front that is to grow.
    """

    def __init__(self, baseline: TrialRecord, records: Iterable[TrialRecord]) -> None:
        self._whole, self._macs = baseline.accuracy or 1.0, baseline.macs or 1
        self._front = [self._point(r, r.accuracy) for r in records if r.accuracy is not None and r.measurement]
        self._shares: list[float] = []

    def next(self, candidates: Sequence[TrialRecord]) -> TrialRecord:
        """Return the candidate with the largest expected gain of hypervolume per second; the first of equals."""
        points = np.array([self._point(c, self._expected(c)) for c in candidates])
        gains = hypervolume_gain(self._front, points, 1.0)
        costs = np.array([_FIXED + (c.macs or self._macs) / self._macs for c in candidates])
        return candidates[int(np.argmax(gains / costs))]

    def learn(self, before: TrialRecord, after: TrialRecord) -> None:
        """Take note of what fine-tuning made of a candidate."""
        assert before.accuracy is not None and after.accuracy is not None
        gap = self._whole - before.accuracy
        if gap > 0:
            self._shares.append(min(max((after.accuracy - before.accuracy) / gap, 0.0), 1.0))
        self._front.append(self._point(after, after.accuracy))

    @property
    def closed(self) -> float:
        """Share of the gap to the uncompressed network that fine-tuning closes, as far as is known."""
        return fmean([_CLOSED, *self._shares])

    def _expected(self, candidate: TrialRecord) -> float:
        accuracy = candidate.accuracy or 0.0
        return accuracy + self.closed * max(self._whole - accuracy, 0.0)

    def _point(self, record: TrialRecord, accuracy: float | None) -> tuple[float, float]:
        """Return the share of the accuracy that is lost, and the latency ratio."""
        assert record.measurement is not None
        return 1 - (accuracy or 0.0) / self._whole, record.measurement.ratio
