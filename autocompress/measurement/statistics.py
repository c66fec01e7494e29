"""Summaries of latency samples taken in rounds, with bootstrap intervals over rounds.

Iterations of one round share the machine's state (clock, neighbours, caches), so that rounds, not iterations, are the
independent unit: intervals resample rounds. Percentile bootstrap, Efron and Tibshirani 1993, chapter 13.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]

RESAMPLES = 2000
# A round enters the interval of the median as this many quantiles, so that the cost does not grow with iterations.
_QUANTILES = 33
_CONFIDENCE = (2.5, 97.5)
_USUAL = 0.2
_TREND_Z = 3.0
# Fewer rounds than this show no trend beyond three standard deviations, whatever they are.
_TREND_LEAST = 6


def quiet_latency(latencies: Sequence[float]) -> float:
    """Return the latency that the same engine has when nothing disturbs it, from measurements of different moments.

    Their 20th percentile: on a shared machine neighbours take the memory's bandwidth for seconds, half of the time at
    bad hours, and a network that lives on it then takes twice as long; the median says little there.
    """
    return float(np.quantile(np.asarray(latencies, dtype=np.float64), _USUAL, method="lower"))


def ratio_interval(ratios: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Return the median of the rounds' ratios, and the bounds of its bootstrap 95 % interval."""
    values = np.asarray(ratios, dtype=np.float64)
    picks = _picks(len(values), seed)
    low, high = np.percentile(np.median(values[picks], axis=1), _CONFIDENCE)
    return float(np.median(values)), float(low), float(high)


def median_interval(rounds: Sequence[Samples], seed: int = 0) -> tuple[float, float, float]:
    """Return the median of all samples, and the bounds of its bootstrap 95 % interval over rounds."""
    median = float(np.median(np.concatenate(rounds)))
    levels = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    sketch = np.stack([np.quantile(samples, levels) for samples in rounds])
    picks = _picks(len(rounds), seed)
    low, high = np.percentile(np.median(sketch[picks].reshape(len(picks), -1), axis=1), _CONFIDENCE)
    return median, min(float(low), median), max(float(high), median)


def levelled(rounds: Sequence[float], instances: int) -> list[float]:
    """Return factors ``(n,)`` that bring rounds to the mean level of the instances that took turns in them.

    What one instance differs from another by is then no scatter between rounds. Too few rounds stay as they are.
    """
    values = np.asarray(rounds, dtype=np.float64)
    if instances < 2 or len(values) < 2 * instances:
        return [1.0] * len(values)
    levels = [float(np.median(values[number::instances])) for number in range(instances)]
    return [float(np.mean(levels)) / levels[number % instances] for number in range(len(values))]


def drift(values: Sequence[float]) -> float:
    """Return by how much a series rose from its first to its last value, relative to its middle; 0 for mere scatter.

    The slope is Theil and Sen's, the median of all pairs'; it counts when Kendall's test of trend is beyond
    `_TREND_Z` standard deviations (Mann 1945), so that scatter is not called drift.
    """
    series = np.asarray(values, dtype=np.float64)
    count = len(series)
    if count < _TREND_LEAST:
        return 0.0
    first, second = np.triu_indices(count, 1)
    rises = series[second] - series[first]
    z = float(np.sign(rises).sum()) / np.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    slope = float(np.median(rises / (second - first)))
    return slope * (count - 1) / float(np.median(series)) if abs(z) > _TREND_Z else 0.0


def half_width(middle: float, low: float, high: float) -> float:
    """Return an interval's half-width relative to its middle."""
    return (high - low) / (2 * middle) if middle > 0 else float("inf")


def mad(samples: Samples) -> float:
    """Return the median absolute deviation, in the samples' unit, without the factor that makes it a sigma."""
    return float(np.median(np.abs(samples - np.median(samples))))


def _picks(rounds: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, rounds, size=(RESAMPLES, rounds))
