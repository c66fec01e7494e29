"""A percentile of the magnitudes: what lies above is clipped, however large it is."""

from __future__ import annotations

import torch

from autocompress.catalogue import Method
from autocompress.compress.calibrations.base import Calibration, Magnitudes
from autocompress.config import QuantizationConfig

METHOD = Method(
    "percentile",
    "quantization",
    "calibration: a percentile of the magnitudes, 99.99 unless said otherwise",
    "Wu et al., Integer quantization for deep learning inference, 2020",
)


class Percentile(Calibration):
    """The upper edge of the histogram's bin that the percentile falls into.

    Args:
        percentile: Share of all values, zeros included, that are not clipped, in (0, 100].
    """

    def __init__(self, percentile: float) -> None:
        self.percentile = percentile

    def threshold(self, seen: Magnitudes) -> float:
        """See `Calibration.threshold`."""
        reached = seen.counts.double().cumsum(0)
        wanted = reached[-1] * self.percentile / 100
        # Rounding may leave even the last bin short of 100 %.
        place = min(int(torch.searchsorted(reached, wanted)), len(reached) - 1)
        return seen.width * (place + 1)


def _made(config: QuantizationConfig) -> Calibration:
    return Percentile(config.percentile)


CALIBRATIONS = {METHOD.name: _made}
