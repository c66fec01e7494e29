"""The machine's pace, as a run's own measurements tell, and what it does to ratios.

A ratio to the baseline of the same minute is not quite free of the minute. Where the uncompressed network waits for
memory and the compressed one does not, neighbours slow the first one alone: over one search of VGG-11 the baseline went
from 0.82 to 0.98 ms and back, candidates hardly changed, and 0.20x in one minute was 0.17x in another. `MachineSpeed`
learns from predicted networks how much of that there is; what is to be inside a limit can then be asked to be so at
every speed the machine may have, going by those that the run has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from autocompress.quantities import Limit
from autocompress.runs.records import MEASURED, Measurement, TrialRecord

# How many standard deviations of log paces from their mean are reckoned with, and which share of either end of the
# measurements counts as no more than the rest: one beside a compiler is not the machine's pace.
_REACH, _EDGE = 2.0, 0.05
# Measurements that the present pace is the median of.
_RECENT = 8
# Before any evidence: standard deviation of the exponent, and what predictions are off by at least.
_EXPONENT, _LEAST_ERROR = 0.5, 0.02
# A prediction this far off (log) says no more than that.
_OUTLIER = 0.1


@dataclass(frozen=True)
class MachineSpeed:
    """How fast the machine has been, and how ratios went with it.

    Attributes:
        usual_ms: Median of the baseline's latencies.
        edges_ms: The baseline's latency when the machine is fast, when it is slow, and at present. None where networks
            are measured on occasions: their intervals hold what other moments do, and would be widened twice.
        exponent: A ratio goes with the baseline's latency to this power: 0 where the machine slows every network alike,
            -1 where it slows the baseline alone.
    """

    usual_ms: float
    edges_ms: tuple[float, ...]
    exponent: float = 0.0

    @classmethod
    def of(cls, records: Sequence[TrialRecord], baseline_ms: float) -> Self:
        """Learn from a run's records, oldest first; those without a measurement on the run's device say nothing.

        Args:
            records: Of trials, fine-tuned ones and repeated measurements included.
            baseline_ms: The baseline's latency where nothing else is known.
        """
        measured = [
            (r.predicted_ratio, m) for r in records if (m := r.measurement) is not None and m.source == MEASURED
        ]
        if not measured:
            return cls(baseline_ms, (baseline_ms,))
        baselines = np.array([m.baseline_ms for _, m in measured])
        usual = float(np.median(baselines))
        logs = np.log(baselines)
        logs = np.clip(logs, *np.quantile(logs, (_EDGE, 1 - _EDGE)))
        middle, reach = float(np.mean(logs)), _REACH * float(np.std(logs))
        edges: tuple[float, ...] = ()
        if not all(m.occasions for _, m in measured):
            edges = float(np.exp(middle - reach)), float(np.exp(middle + reach)), float(np.median(baselines[-_RECENT:]))
        known = [(np.log(m.baseline_ms / usual), np.log(m.ratio / p)) for p, m in measured if p]
        return cls(usual, edges, _exponent(np.array(known)) if known else 0.0)

    def normalise(self, measurement: Measurement) -> float:
        """Return what a measured ratio is multiplied by to be that of the usual pace."""
        return float((self.usual_ms / measurement.baseline_ms) ** self.exponent)

    def limit(self, latency: Limit) -> float:
        """Return the ratio that a network may have at the usual pace, so that it meets a limit at every pace."""
        machine_speeds = np.array(self.edges_ms or (self.usual_ms,))
        ratios = (machine_speeds / self.usual_ms) ** self.exponent
        return latency.value / float(np.max(ratios if latency.relative else ratios * machine_speeds))

    def bound(self, measurement: Measurement, latency: Limit, upper: float) -> float:
        """Return a ratio, or ms for a limit in ms: `upper`, an end of the measured interval, at the worst pace.

        It is never below what was measured.
        """
        machine_speeds = np.array([*self.edges_ms, measurement.baseline_ms]) / measurement.baseline_ms
        return upper * float(np.max(machine_speeds ** (self.exponent + (0 if latency.relative else 1))))


def _exponent(known: np.ndarray) -> float:
    """Return the slope of ``(n, 2)`` log baselines and log ratios over predicted ones, by a Gaussian prior around 0."""
    machine_speed, off = known.T
    middle = np.median(off)
    off = np.clip(off, middle - _OUTLIER, middle + _OUTLIER)
    machine_speed, off = machine_speed - machine_speed.mean(), off - off.mean()
    # Pace and noise together: with few measurements that is cautious, with many it hardly matters.
    variance = max(float(off @ off) / len(off), _LEAST_ERROR**2)
    slope = float(machine_speed @ off) / (float(machine_speed @ machine_speed) + variance / _EXPONENT**2)
    return min(max(slope, -1.0), 1.0)
