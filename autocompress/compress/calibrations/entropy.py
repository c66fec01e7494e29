"""The least information lost: Kullback-Leibler divergence of the clipped histogram and of its few-level form."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autocompress.catalogue import Method
from autocompress.compress.calibrations.base import Calibration, Magnitudes
from autocompress.config import QuantizationConfig

METHOD = Method(
    "entropy",
    "quantization",
    "calibration: the least Kullback-Leibler divergence of the histograms",
    "Migacz, 8-bit inference with TensorRT, GTC 2017",
)
# Thresholds are tried every so many bins.
_STRIDE = 8


class Entropy(Calibration):
    """Migacz's: for every threshold, clipped values join the last bin, and the bins within are merged into levels.

    128 levels for signed tensors, as in the source, 256 for unsigned ones, which have as many codes. Zero has a code
    of its own whatever the threshold, and after a ReLU most values are zero: the first bin counts as the second does
    (as in NVIDIA's pytorch-quantization), or it alone would decide. A tensor with no value but in the last bin, or
    fewer bins than levels, is not clipped. Of equals, the largest threshold.
    """

    def threshold(self, seen: Magnitudes) -> float:
        """See `Calibration.threshold`."""
        counts = seen.counts.double().numpy().copy()
        counts[0] = counts[1]
        levels, bins = seen.levels + 1, len(counts)
        best, found = np.inf, bins
        for kept in range(bins, levels - 1, -_STRIDE):
            lost = divergence(counts, kept, levels)
            if lost < best:
                best, found = lost, kept
        return seen.width * found


def divergence(counts: NDArray[np.float64], kept: int, levels: int) -> float:
    """Return how much is lost in nats when `counts` ``(bins,)`` are clipped to `kept` bins and merged into `levels`.

    Infinite where something was clipped onto an empty bin.
    """
    clipped = counts[:kept].copy()
    filled = clipped > 0
    clipped[-1] += counts[kept:].sum()
    # Level l takes the bins from ceil(l * kept / levels) on.
    starts = -(-np.arange(levels) * kept // levels)
    sizes = np.diff(starts, append=kept)
    merged = np.add.reduceat(counts[:kept], starts) / np.maximum(np.add.reduceat(filled.astype(np.float64), starts), 1)
    spread = np.repeat(merged, sizes) * filled
    if not spread.any() or (clipped[-1] > 0 and not filled[-1]):
        return float("inf")
    wanted, had = clipped / clipped.sum(), spread / spread.sum()
    return float((wanted[filled] * np.log(wanted[filled] / had[filled])).sum())


def _made(config: QuantizationConfig) -> Calibration:
    return Entropy()


CALIBRATIONS = {METHOD.name: _made}
