"""Latencies from a latency table alone, of a device that is not here or is not asked: predicted, and labelled so."""

from __future__ import annotations

from dataclasses import dataclass

from autocompress.policy import CompressionPolicy
from autocompress.prediction.predictor import LatencyPredictor
from autocompress.runs.records import Measurement


@dataclass(frozen=True)
class RemoteDevicePredictor:
    """What a table says of a device that is not here, or is not asked.

    Attributes:
        predictor: Of the model's compressed forms there.
        dense_dtype: What layers that are not quantized run in.
        baseline_ms: The uncompressed network's latency there.
    """

    predictor: LatencyPredictor
    dense_dtype: str
    baseline_ms: float

    def measurement(self, policy: CompressionPolicy, *, batch_size: int, threads: int) -> Measurement:
        """Return the predicted latency of a policy, labelled so."""
        if policy == CompressionPolicy(dense_dtype=self.dense_dtype):
            ratio = (1.0, 1.0, 1.0)
        else:
            found = self.predictor.predict(policy)
            ratio = (found.ratio, found.low, found.high)
        return Measurement.predicted(ratio, self.baseline_ms, batch_size=batch_size, threads=threads)
