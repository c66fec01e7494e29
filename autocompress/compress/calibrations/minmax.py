"""The whole range: nothing is clipped."""

from __future__ import annotations

from autocompress.catalogue import Method
from autocompress.compress.calibrations.base import Calibration, Magnitudes
from autocompress.config import QuantizationConfig

METHOD = Method(
    "minmax",
    "quantization",
    "calibration: the largest magnitude, nothing is clipped",
    "Jacob et al., CVPR 2018",
)


class MinMax(Calibration):
    """The largest magnitude seen."""

    def threshold(self, seen: Magnitudes) -> float:
        """See `Calibration.threshold`."""
        return seen.top


def _made(config: QuantizationConfig) -> Calibration:
    return MinMax()


CALIBRATIONS = {METHOD.name: _made}
