"""A stand-in for a latency predictor that is right, or wrong by as much as a test wants, and screens that use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from autocompress.config import RunConfig
from autocompress.exploration.latency_limit.latency_filter import LatencyFilter
from autocompress.exploration.pareto import Constraints
from autocompress.policy import CompressionPolicy
from autocompress.prediction.layer_times import LayerTime
from autocompress.prediction.predictor import Observation, Prediction
from autocompress.space.search_space import Choice
from tests.exploration.conftest import BASELINE, Bench, figures
from tests.prediction import made_up

RATIOS: dict[str, Any] = {"pruning": {"ratios": [0, 0.25, 0.5, 0.75]}}


class Known:
    """Stands in for a `LatencyPredictor`: knows every latency to a given width, and counts what it is asked."""

    def __init__(self, width: float = 0.0, error: float = 0.01, int8: float = 1.0) -> None:
        self.width, self.error, self.int8 = width, error, int8
        self.ready, self.off = True, 1.0
        self.learned: list[Observation] = []
        self.learned_times: list[LayerTime] = []
        self.layout = made_up.LAYOUT
        self.asked = 0

    @property
    def size(self) -> int:
        return len(self.learned)

    def observe(self, observations: Iterable[Observation]) -> None:
        self.learned += observations

    def observe_layers(self, times: Iterable[LayerTime]) -> None:
        self.learned_times += times

    def leave_one_out(self) -> Any:
        return SimpleNamespace(mape=self.error)

    def predict(self, policy: CompressionPolicy) -> Prediction:
        self.asked += 1
        ratio = figures(policy)[1] / figures(CompressionPolicy())[1]
        ratio *= self.off * self.int8 ** len(policy.int8_layers)
        return Prediction(ratio, ratio * (1 - self.width), ratio * (1 + self.width))


def limits(target: str) -> Constraints:
    return Constraints.of(RunConfig(target_latency=target), BASELINE)


def latency_filter(bench: Bench, known: Any = None, target: str = "0.5x", seed: int = 0, **parts: Any) -> LatencyFilter:
    space = bench.space(**(parts or RATIOS))
    return LatencyFilter(known or Known(), space, limits(target), seed)


def ratio(made: LatencyFilter, choices: Mapping[str, Choice]) -> float:
    return Known().predict(made.space.policy(choices)).ratio
