"""From a policy to a latency without building anything, with an interval, learned from networks that were measured.

The layers' times as `layer_times` predicts them are summed; how far that is off, a Gaussian process learns from whole
networks: what runs between layers (counts of conversions, kernels, traffic), and what a network as a whole does
to its layers (a large one finds colder caches). Each measured network is compared with what its layers would be without
its own rows, so that the process learns errors as they will be. Everything is relative to the uncompressed network of
the same interleaved measurement: a machine's speed drifts, ratios do not.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from scipy.stats import kendalltau

from autocompress.graph.layout import Layout, Unit
from autocompress.policy import CompressionPolicy
from autocompress.prediction.gaussian_process import GaussianProcess, Matrix, Points, Whole
from autocompress.prediction.layer_features import UnitTable
from autocompress.prediction.layer_times import LayerTime, UnitTimes

# Fewer networks say nothing of a hundred choices. With a dozen, of uniform policies most of them, networks left out
# were predicted well and the next ones not: off by 45 % on average in one search.
LEAST_NETWORKS = 24
# Relative error of a measurement that cannot be seen in its interval: another process, another place in memory.
_BETWEEN_RUNS = 0.008
_INTERVAL = 1.96
# The network's own coordinates: log of its layers' sum, kernels, logs of arithmetic and weights, int8 layers, changes
# of dtype.
_COORDINATES, _LENGTH = 6, 2.0
_AMPLITUDES = (-5.5, -9.0, -9.0, -5.5, -7.0)
# Beyond so many standard deviations of what was seen, a network is taken to lie there.
_EDGE = 4.0
# Hyperparameters are chosen anew when there are so many times as many networks.
_RETUNE = 1.34


@dataclass(frozen=True)
class Observation:
    """A measured network.

    Attributes:
        policy: What was done to the model.
        ratio: Its latency over the uncompressed network's.
        deviation: Standard deviation of that ratio.
    """

    policy: CompressionPolicy
    ratio: float
    deviation: float

    @classmethod
    def of(cls, policy: CompressionPolicy, ratio: float, low: float, high: float, *, least: float = 0.0) -> Self:
        """Make one from a ratio and its measured 95 % interval; `least` is the smallest relative deviation assumed."""
        return cls(policy, ratio, max((high - low) / (2 * _INTERVAL), least * ratio))


@dataclass(frozen=True)
class Prediction:
    """A predicted ratio to the uncompressed network, and the bounds of its 95 % interval."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class PredictionError:
    """How predictions compare with measurements that they did not know.

    Attributes:
        n: Networks compared.
        mape: Mean absolute error relative to the measured ratio.
        within_10: Share of networks predicted within ±10 %.
        tau: Kendall's rank correlation; None for fewer than two networks, or where all are alike.
        covered: Share of measurements inside the predicted 95 % interval.
    """

    n: int
    mape: float
    within_10: float
    tau: float | None
    covered: float

    @classmethod
    def of(cls, predictions: Sequence[Prediction], measured: Sequence[float]) -> PredictionError:
        """Compare predictions with measured ratios; at least one."""
        found, true = np.array([p.ratio for p in predictions]), np.array(measured)
        errors = np.abs(found / true - 1)
        inside = [p.low <= ratio <= p.high for p, ratio in zip(predictions, measured, strict=True)]
        tau = float(kendalltau(found, true).statistic) if len(true) > 1 else math.nan
        own = None if math.isnan(tau) else tau
        return cls(len(true), float(errors.mean()), float((errors <= 0.10).mean()), own, float(np.mean(inside)))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


class LatencyPredictor:
    """Predict the latency of any compressed form of one model on one device and engine.

    Args:
        layout: The model's structure.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._observations: dict[CompressionPolicy, Observation] = {}
        self._table = UnitTable()
        self._times = UnitTimes(self._table)
        self._process = GaussianProcess((_COORDINATES, _LENGTH), _AMPLITUDES)
        self._tuned_at = 0
        self._fitted: _Fit | None = None

    @property
    def size(self) -> int:
        """Measured networks known."""
        return len(self._observations)

    @property
    def ready(self) -> bool:
        """Whether enough is known to predict at all: of whole networks, and of layers."""
        return self.size >= LEAST_NETWORKS and len(self._times) > 0

    def observe(self, observations: Iterable[Observation]) -> None:
        """Learn measured networks; one seen before is replaced."""
        for observation in observations:
            self._observations[observation.policy] = observation
        self._fitted = None

    def observe_layers(self, times: Iterable[LayerTime]) -> None:
        """Learn the times of single layers of measured networks."""
        self._times.observe(times)
        self._fitted = None

    def predict(self, policy: CompressionPolicy) -> Prediction:
        """Return the predicted ratio; `ready` must hold.

        Raises:
            ValueError: Too few networks are known.
        """
        return self._fit().predict(self.layout.units(policy))

    def moments(self, policy: CompressionPolicy) -> tuple[float, float]:
        """Return the predicted ratio and its standard deviation, measurement noise left out.

        Raises:
            ValueError: Too few networks are known.
        """
        return self._fit().moments(self.layout.units(policy))

    def difference(self, policy: CompressionPolicy, other: CompressionPolicy) -> tuple[float, float]:
        """Return by how much the ratio of `policy` is above that of `other`, and the standard deviation of that.

        What both have in common is equally wrong in both, so this is known far better than either.

        Raises:
            ValueError: Too few networks are known.
        """
        return self._fit().difference(self.layout.units(policy), self.layout.units(other))

    def leave_one_out(self) -> PredictionError:
        """Return the error of predicting each known network from all the others."""
        return self._fit().leave_one_out()

    def _fit(self) -> _Fit:
        if not self.ready:
            raise ValueError(
                f"{self.size} measured networks and {len(self._times)} layers' times are too few to predict from; "
                f"{LEAST_NETWORKS} networks and the times of some layers are needed."
            )
        if self._fitted is None:
            observations = list(self._observations.values())
            tune = len(observations) >= _RETUNE * self._tuned_at
            if tune:
                self._tuned_at = len(observations)
            self._times.refresh()
            self._fitted = _Fit(self.layout, self._table, self._times, self._process, observations, tune=tune)
        return self._fitted


class _Fit:
    """What a set of networks says."""

    def __init__(
        self,
        layout: Layout,
        table: UnitTable,
        times: UnitTimes,
        process: GaussianProcess,
        observations: Sequence[Observation],
        *,
        tune: bool,
    ) -> None:
        self._table, self._times, self._process = table, times, process
        sums: list[float] = []
        features: list[Matrix] = []
        coordinates: list[Matrix] = []
        for observation in observations:
            units = layout.units(observation.policy)
            numbers = np.asarray(table.add(units))
            found = self._described(units, numbers, times.without(observation.policy.hash, numbers))
            sums.append(found[0])
            features.append(found[1])
            coordinates.append(found[2])
        self._ratios = np.array([o.ratio for o in observations])
        own = np.array([o.deviation for o in observations]) / self._ratios
        self._scales = [_Scale(np.array(features)), _Scale(np.array(coordinates))]
        points = self._points(np.array(features), np.array(coordinates))
        self._errors = np.log(self._ratios / np.array(sums))
        noise = own**2 + _BETWEEN_RUNS**2
        if tune:
            process.tune(points, self._errors, noise)
        process.condition(points, self._errors, noise)

    def _described(self, units: Sequence[Unit], numbers: Whole, times: Matrix) -> tuple[float, Matrix, Matrix]:
        """Return the sum of the layers' times, all counts over it, and where the network lies among others."""
        total = float(times.sum())
        counts, logs = self._table.counts(numbers), self._table.logs(numbers)
        int8 = [unit.int8 for unit in units]
        place = [
            math.log(total), counts[:, 0].sum(), math.log(np.exp(logs[:, 0]).sum()), math.log(np.exp(logs[:, 1]).sum()),
            sum(int8), sum(one != other for one, other in itertools.pairwise(int8)),
        ]  # fmt: skip
        return total, counts.sum(0) / total, np.array(place, np.float64)

    def _points(self, features: Matrix, coordinates: Matrix) -> Points:
        linear, smooth = (scale(part) for scale, part in zip(self._scales, (features, coordinates), strict=True))
        constant = np.ones((len(linear), 1))
        return Points(smooth, np.column_stack([constant, linear]), np.arange(len(linear)))

    # -- asking -------------------------------------------------------------------------------------------------------

    def _moments(self, networks: Sequence[Sequence[Unit]]) -> tuple[Matrix, Matrix]:
        """Return ratios ``(n,)`` and the covariance of their logs, but for what the layers' sums do not know."""
        found = []
        for units in networks:
            numbers = np.asarray(self._table.add(units))
            found.append(self._described(units, numbers, self._times.ratios(numbers)))
        sums, features, coordinates = zip(*found, strict=True)
        means, covariance = self._process.moments(self._points(np.array(features), np.array(coordinates)))
        return np.array(sums) * np.exp(means), covariance

    def moments(self, units: Sequence[Unit]) -> tuple[float, float]:
        """Return mean and standard deviation of the true ratio of a network of these units."""
        ratios, covariance = self._moments([units])
        unknown = self._unknown(dict(Counter(units)), float(ratios[0]), units)
        return float(ratios[0]), math.sqrt(max(float(covariance[0, 0]), 0.0) * float(ratios[0]) ** 2 + unknown)

    def predict(self, units: Sequence[Unit]) -> Prediction:
        """Return the prediction of what would be measured."""
        ratios, covariance = self._moments([units])
        ratio = float(ratios[0])
        variance = max(float(covariance[0, 0]), 0.0) + self._process.noise + _BETWEEN_RUNS**2
        # How far off layers' sums are was learned from networks that have no such layers.
        strange = Counter(unit for unit in units if unit.factorization not in self._times.factorizations)
        if strange:
            variance += self._unknown(dict(strange), ratio, units) / ratio**2
        half = _INTERVAL * math.sqrt(variance)
        return Prediction(ratio, ratio * math.exp(-half), ratio * math.exp(half))

    def difference(self, units: Sequence[Unit], others: Sequence[Unit]) -> tuple[float, float]:
        """Return mean and standard deviation of the true ratio of `units` less that of `others`."""
        amounts = Counter(units)
        amounts.subtract(others)
        apart = {unit: amount for unit, amount in amounts.items() if amount}
        if not apart:
            return 0.0, 0.0
        ratios, covariance = self._moments([units, others])
        signed = ratios * np.array([1.0, -1.0])
        unknown = self._unknown(apart, float(ratios[0]), units)
        return float(signed.sum()), math.sqrt(max(float(signed @ covariance @ signed), 0.0) + unknown)

    def _unknown(self, amounts: dict[Unit, int], ratio: float, units: Sequence[Unit]) -> float:
        """Return the variance of so much of each unit that comes from not knowing the layers' times.

        They are scaled as in the network of `units` whose ratio is given.
        """
        numbers = np.asarray(self._table.add(list(amounts)))
        whole = np.asarray(self._table.add(units))
        scale = ratio / float(self._times.ratios(whole).sum())
        weights = np.array(list(amounts.values())) * self._times.ratios(numbers) * scale
        return max(float(weights @ self._times.covariance(numbers) @ weights), 0.0)

    def leave_one_out(self) -> PredictionError:
        """Return the error of each network's prediction from all others, the hyperparameters kept."""
        found = self._process.left_out([np.array([index]) for index in range(len(self._ratios))])
        sums = self._ratios / np.exp(self._errors)
        predictions = []
        for total, (mean, variance) in zip(sums, found, strict=True):
            ratio, half = float(total * np.exp(mean[0])), _INTERVAL * math.sqrt(float(variance[0]))
            predictions.append(Prediction(ratio, ratio * math.exp(-half), ratio * math.exp(half)))
        return PredictionError.of(predictions, [float(ratio) for ratio in self._ratios])


class _Scale:
    """Brings columns to a spread of 1, and what lies far out to the edge: there a straight line leads anywhere.

    A column that hardly varies is left out, as it cannot be told from a constant.
    """

    def __init__(self, values: Matrix) -> None:
        self._centre, self._width = values.mean(0), values.std(0)
        self._varies = self._width > 1e-9 * (np.abs(values).mean(0) + 1e-12)

    def __call__(self, values: Matrix) -> Matrix:
        scaled = np.where(self._varies, (values - self._centre) / (self._width + 1e-300), 0.0)
        return np.clip(scaled, -_EDGE, _EDGE)
