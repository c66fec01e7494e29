"""The smallest squared error of rounding and clipping together."""

from __future__ import annotations

import torch

from autocompress.catalogue import Method
from autocompress.compress.calibrations.base import Calibration, Magnitudes
from autocompress.config import QuantizationConfig

METHOD = Method(
    "mse",
    "quantization",
    "calibration: the smallest mean squared error, the default",
    "Nagel et al., A white paper on neural network quantization, 2021",
)
# Thresholds tried, as fractions of the largest magnitude seen.
_CLIPS = torch.linspace(0.3, 1.0, 57)


class MeanSquaredError(Calibration):
    """Of 57 thresholds, the one whose codes are nearest to the centres of the bins, weighted by their counts."""

    def threshold(self, seen: Magnitudes) -> float:
        """See `Calibration.threshold`."""
        values = (torch.arange(len(seen.counts)) + 0.5) * seen.width
        steps = (_CLIPS * seen.top / seen.levels)[:, None]
        rounded = (values / steps).round().clamp_max(seen.levels) * steps
        errors = ((rounded - values).square() * seen.counts).sum(1)
        return float(_CLIPS[errors.argmin()]) * seen.top


def _made(config: QuantizationConfig) -> Calibration:
    return MeanSquaredError()


CALIBRATIONS = {METHOD.name: _made}
