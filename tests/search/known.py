"""A stand-in for a latency predictor that is right, or wrong by as much as a test wants."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from autocompress.latency.predictor import Observation, Prediction
from autocompress.policy import CompressionPolicy
from tests.search.conftest import figures


class Known:
    """Stands in for a `LatencyPredictor`: knows every latency to a given width, and counts what it is asked."""

    def __init__(self, width: float = 0.0, error: float = 0.01, int8: float = 1.0) -> None:
        self.width, self.error, self.int8 = width, error, int8
        self.ready, self.off = True, 1.0
        self.learned: list[Observation] = []
        self.asked = 0

    @property
    def size(self) -> int:
        return len(self.learned)

    def observe(self, observations: Iterable[Observation]) -> None:
        self.learned += observations

    def leave_one_out(self) -> Any:
        return SimpleNamespace(mape=self.error)

    def predict(self, policy: CompressionPolicy) -> Prediction:
        self.asked += 1
        ratio = figures(policy)[1] / figures(CompressionPolicy())[1]
        ratio *= self.off * self.int8 ** len(policy.int8_layers)
        return Prediction(ratio, ratio * (1 - self.width), ratio * (1 + self.width))
