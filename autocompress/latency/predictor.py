"""From a policy to a latency without building anything, with an interval, learned from networks that were measured.

Latency is a sum over units (`latency.units`) plus what every call costs; a Gaussian process with the prior of
`latency.kernel_model` learns both from end-to-end ratios, so that fusion, conversions of layout and the overhead of the
engine are in it as far as the measured networks show them. Everything is relative to the uncompressed network of the
same interleaved measurement: a machine's speed drifts, ratios do not. (Rasmussen and Williams, Gaussian Processes for
Machine Learning, 2006; leave-one-out figures by their equation 5.12.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.stats import kendalltau

from autocompress.latency.kernel_model import Matrix, UnitTable, departures
from autocompress.latency.unit_times import LayerTime, UnitTimes
from autocompress.latency.units import Layout, Unit
from autocompress.policy import CompressionPolicy

# Fewer networks say nothing of a hundred choices.
LEAST_NETWORKS = 24
# Log of the variance of each part of the prior, relative to that of the measured ratios, and of the noise.
_START = np.log([1.0, 0.2, 0.1, 0.1, 0.01])
_SPREAD = 1.5
# Networks used to choose the variances: their number sets the cost, and they are five numbers only.
_TUNED_ON = 250
_TUNING_STEPS = 160
# Relative error of a measurement that cannot be seen in its interval: another process, another place in memory.
_BETWEEN_RUNS = 0.008
_INTERVAL = 1.96
# Sums of the profiler's times among the features, and how much more they are trusted than counts are.
_SUMS, _TRUST = 2, 4.0


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
        self._fitted: _Fit | None = None
        self._variances = _START
        self._tuned_at = 0

    @property
    def size(self) -> int:
        """Measured networks known."""
        return len(self._observations)

    @property
    def ready(self) -> bool:
        """Whether enough is known to predict at all."""
        return self.size >= LEAST_NETWORKS

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
            raise ValueError(f"{self.size} measured networks are too few to predict from; {LEAST_NETWORKS} are needed.")
        if self._fitted is None:
            observations = list(self._observations.values())
            table = self._table
            counts = [table.add(self.layout.units(o.policy)) for o in observations]
            # The variances change little once they are known: chosen anew when a third more has been seen.
            tune = len(observations) > 1.34 * self._tuned_at
            self._fitted = _Fit(table, self._times, counts, observations, self._variances, tune=tune)
            if tune:
                self._variances, self._tuned_at = self._fitted.variances, len(observations)
        return self._fitted


class _Fit:
    """The posterior given a set of networks."""

    def __init__(
        self,
        table: UnitTable,
        times: UnitTimes,
        numbers: Sequence[Sequence[int]],
        observations: Sequence[Observation],
        variances: Matrix,
        *,
        tune: bool,
    ) -> None:
        self._table, self._times = table, times
        self._ratios = np.array([o.ratio for o in observations])
        own = np.array([o.deviation for o in observations])
        # One bad measurement must not count as much as a good one.
        self._noise = own**2 + (_BETWEEN_RUNS * self._ratios) ** 2
        self._mean = float(self._ratios.mean())
        # Also the variance of the part that all networks have in common.
        self._scale = max(float(self._ratios.var()), 1e-8)
        counts = np.zeros((len(observations), len(table)))
        for row, units in enumerate(numbers):
            np.add.at(counts[row], np.asarray(units), 1.0)
        used = np.flatnonzero(counts.any(0))
        self._counts = counts[:, used]
        _, coordinates, classes, layers = table.arrays()
        totals = self._counts @ self._features(used)
        # Per class of units: how often each network has each, and where they lie.
        self._classes: dict[int, tuple[Matrix, tuple[Matrix, NDArray[np.int64]]]] = {}
        for number in np.unique(classes[used]):
            members = np.flatnonzero(classes[used] == number)
            known = (coordinates[used[members]], layers[used[members]])
            self._classes[int(number)] = (self._counts[:, members] * self._sizes(used[members]), known)
        self._centre, self._width = totals.mean(0), totals.std(0) + 1e-12
        # A count that hardly varies over the networks cannot be told from the constant.
        self._varies = totals.std(0) > 1e-9 * (np.abs(totals).mean(0) + 1e-12)
        self._boost = np.ones(totals.shape[1])
        self._boost[-_SUMS:] = _TRUST
        self._linear = self._standard(totals)
        smooth = [np.zeros((len(observations), len(observations))) for _ in range(3)]
        for share, known in self._classes.values():
            for number, part in enumerate(departures(known, known)):
                smooth[number] += share @ part @ share.T
        parts = [self._linear @ self._linear.T, *smooth]
        self._norms = np.array([max(float(np.mean(np.diag(part))), 1e-12) for part in parts])
        self._parts = [part / norm for part, norm in zip(parts, self._norms, strict=True)]
        self.variances = self._tuned(variances) if tune else variances
        amounts = np.exp(self.variances) * self._scale
        self._amounts = amounts
        covariance = self._covariance(self.variances, slice(None))
        self._factor = cho_factor(covariance, lower=True)
        self._weights = cho_solve(self._factor, self._ratios - self._mean)
        # Per unit, by its number: its covariance with every network; filled as policies are asked for.
        self._met = np.zeros(len(table), bool)
        self._across = np.zeros((len(table), len(observations)))

    def _standard(self, totals: Matrix, whole: float = 1.0) -> Matrix:
        return np.where(self._varies, (totals - whole * self._centre) / self._width * self._boost, 0.0)

    def _sizes(self, numbers: NDArray[np.int64]) -> Matrix:
        """Return how much each unit takes ``(n,)``, roughly: what departs from expectation is a share of that."""
        return self._times.ratios(numbers) if len(self._times) else np.ones(len(numbers))

    def _features(self, numbers: NDArray[np.int64]) -> Matrix:
        """Return what the linear part weighs of each unit ``(n, F)``, the profiler's times last."""
        features = self._table.arrays()[0][numbers]
        times = self._times.ratios(numbers)
        int8 = features[:, 2]
        return np.column_stack([features, times, times * int8])

    def _covariance(self, variances: Matrix, part: slice) -> Matrix:
        amounts = np.exp(variances) * self._scale
        total = sum(a * p[part, part] for a, p in zip(amounts, self._parts, strict=False))
        ratios, noise = self._ratios[part], self._noise[part]
        result: Matrix = np.asarray(total) + self._scale + np.diag(noise + amounts[-1] * (ratios / self._mean) ** 2)
        return result

    def _tuned(self, start: Matrix) -> Matrix:
        """Return the variances of highest marginal likelihood under a wide prior around the usual ones."""
        part = slice(0, _TUNED_ON)
        wanted = self._ratios[part] - self._mean

        def loss(variances: Matrix) -> float:
            try:
                lower = cholesky(self._covariance(variances, part), lower=True)
            except LinAlgError:
                return 1e12
            white = solve_triangular(lower, wanted, lower=True)
            prior = (((variances - _START) / _SPREAD) ** 2).sum()
            return float(0.5 * white @ white + np.log(np.diag(lower)).sum() + 0.5 * prior)

        found = minimize(
            loss, start, method="Nelder-Mead", options={"maxfev": _TUNING_STEPS, "xatol": 0.05, "fatol": 0.05}
        )
        result: Matrix = np.asarray(found.x)
        return result

    # -- asking -------------------------------------------------------------------------------------------------------

    def moments(self, units: Sequence[Unit]) -> tuple[float, float]:
        """Return mean and standard deviation of the true ratio of a network of these units."""
        across, own = self._covariances(units)
        mean = self._mean + float(across @ self._weights)
        explained = float(across @ cho_solve(self._factor, across))
        return mean, float(np.sqrt(max(own - explained, 0.0)))

    def predict(self, units: Sequence[Unit]) -> Prediction:
        """Return the prediction of what would be measured."""
        mean, deviation = self.moments(units)
        # A ratio far below all that was seen is a guess; it is positive all the same.
        mean = max(mean, 0.1 * float(self._ratios.min()))
        noise = (self._amounts[-1] / self._mean**2 + _BETWEEN_RUNS**2) * mean**2
        half = _INTERVAL * float(np.sqrt(deviation**2 + noise))
        return Prediction(mean, max(mean - half, 0.0), mean + half)

    def difference(self, units: Sequence[Unit], others: Sequence[Unit]) -> tuple[float, float]:
        """Return mean and standard deviation of the true ratio of `units` less that of `others`."""
        amounts = Counter(units)
        amounts.subtract(others)
        apart = {unit: amount for unit, amount in amounts.items() if amount}
        if not apart:
            return 0.0, 0.0
        across, own = self._covariances(list(apart), np.array(list(apart.values()), np.float64), whole=0.0)
        explained = float(across @ cho_solve(self._factor, across))
        return float(across @ self._weights), float(np.sqrt(max(own - explained, 0.0)))

    def _covariances(
        self, units: Sequence[Unit], amounts: Matrix | None = None, whole: float = 1.0
    ) -> tuple[Matrix, float]:
        """Return the covariance of a new network with the known ones ``(n,)``, and with itself.

        Or of a sum of units by `amounts`, in which what all networks have in common is `whole` times.
        """
        numbers = np.asarray(self._table.add(units))
        times = np.ones(len(numbers)) if amounts is None else amounts
        if len(self._table) > len(self._met):
            # Room to grow, so that not every new unit copies what is known.
            more = len(self._table) + 256 - len(self._met)
            self._met = np.concatenate([self._met, np.zeros(more, bool)])
            self._across = np.concatenate([self._across, np.zeros((more, self._across.shape[1]))])
        if not self._met[numbers].all():
            self._meet(np.unique(numbers[~self._met[numbers]]))
        _, coordinates, classes, layers = self._table.arrays()
        smooth = times @ self._across[numbers]
        linear = self._standard(times @ self._features(numbers), whole)
        amount = self._amounts[0] / self._norms[0]
        mine = (coordinates[numbers], layers[numbers])
        sizes = self._sizes(numbers)
        alike = np.outer(sizes, sizes) * (classes[numbers][:, None] == classes[numbers][None])
        mixed = self._mixed(departures(mine, mine)) * alike
        own = amount * float(linear @ linear) + whole**2 * self._scale + float(times @ mixed @ times)
        return amount * (self._linear @ linear) + smooth + whole * self._scale, own

    def _mixed(self, parts: tuple[Matrix, Matrix, Matrix]) -> Matrix:
        scales = self._amounts[1:4] / self._norms[1:4]
        return np.asarray(scales[0] * parts[0] + scales[1] * parts[1] + scales[2] * parts[2])

    def _meet(self, numbers: NDArray[np.int64]) -> None:
        """Work out the covariance of new units with every known network."""
        _, coordinates, classes, layers = self._table.arrays()
        for number in np.unique(classes[numbers]):
            mine = numbers[classes[numbers] == number]
            if int(number) in self._classes:
                share, known = self._classes[int(number)]
                parts = self._mixed(departures((coordinates[mine], layers[mine]), known))
                self._across[mine] = self._sizes(mine)[:, None] * (parts @ share.T)
        self._met[numbers] = True

    def leave_one_out(self) -> PredictionError:
        """Return the error of each network's prediction from all others, the variances kept."""
        inverse = cho_solve(self._factor, np.eye(len(self._ratios)))
        spread = np.diag(inverse)
        means = self._ratios - self._weights / spread
        halves = _INTERVAL * np.sqrt(1 / spread)
        predictions = [Prediction(float(m), float(m - h), float(m + h)) for m, h in zip(means, halves, strict=True)]
        return PredictionError.of(predictions, [float(r) for r in self._ratios])
