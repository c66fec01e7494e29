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


def half_width(middle: float, low: float, high: float) -> float:
    """Return an interval's half-width relative to its middle."""
    return (high - low) / (2 * middle) if middle > 0 else float("inf")


def mad(samples: Samples) -> float:
    """Return the median absolute deviation, in the samples' unit, without the factor that makes it a sigma."""
    return float(np.median(np.abs(samples - np.median(samples))))


def _picks(rounds: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, rounds, size=(RESAMPLES, rounds))
