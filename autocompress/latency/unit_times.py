"""What single layers take, learned from the rows of the engines' own profilers.

A profiler times whole microseconds and slows the network down, so its figures are only ever shares of what the network
took (`LayerTime`). They are many, one for each layer of a profiled network, and say what no end-to-end figure says:
how one layer's cost moves with its widths, ranks and dtypes. The predictor takes their sum for a first guess and
learns from whole networks how far it is off.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from autocompress.latency.kernel_model import Matrix, UnitTable, departures
from autocompress.latency.units import Unit

# Variances of the three smooth parts of a layer's log time around the linear fit of all layers of its kind.
_PARTS = (0.10, 0.05, 0.02)
# Standard deviation of a profiler's log time: relative, and for the whole microseconds it counts in.
_RELATIVE, _TICK_MS = 0.06, 4e-4
_RIDGE = 1e-2


@dataclass(frozen=True)
class LayerTime:
    """One layer of a measured network.

    Attributes:
        unit: The layer as it was there.
        ratio: Its share of the network's latency, over the uncompressed network's latency of the same run.
        time_ms: The same in ms.
    """

    unit: Unit
    ratio: float
    time_ms: float


class UnitTimes:
    """Predict single layers' times. Numbers are those of the `UnitTable` that it shares with the predictor."""

    def __init__(self, table: UnitTable) -> None:
        self._table = table
        self._times: dict[int, list[tuple[float, float]]] = {}
        self._fits: dict[int, tuple[tuple[Matrix, NDArray[np.int64]], Matrix]] | None = None
        self._slopes: dict[float, Matrix] = {}
        self._known = np.zeros(0)

    def __len__(self) -> int:
        return len(self._times)

    def observe(self, times: Iterable[LayerTime]) -> None:
        """Learn layers' times."""
        for found in times:
            if found.ratio > 0 and found.time_ms > 0:
                number = self._table.add([found.unit])[0]
                variance = _RELATIVE**2 + (_TICK_MS / found.time_ms) ** 2
                self._times.setdefault(number, []).append((float(np.log(found.ratio)), variance))
        self._fits = None

    def ratios(self, numbers: NDArray[np.int64]) -> Matrix:
        """Return each unit's predicted time over the uncompressed network's latency ``(n,)``; 0 when none is known."""
        if not self._times:
            return np.zeros(len(numbers))
        if self._fits is None:
            self._fit()
        if len(self._known) < len(self._table):
            more = np.full(len(self._table) + 256 - len(self._known), np.nan)
            self._known = np.concatenate([self._known, more])
        new = np.unique(numbers[np.isnan(self._known[numbers])])
        if len(new):
            self._known[new] = self._predict(new)
        found: Matrix = self._known[numbers]
        return found

    def _fit(self) -> None:
        self._known = np.zeros(0)
        numbers = np.array(sorted(self._times))
        logs = np.empty(len(numbers))
        noise = np.empty(len(numbers))
        for index, number in enumerate(numbers):
            values, variances = np.array(self._times[int(number)]).T
            weights = 1 / variances
            logs[index] = float((weights * values).sum() / weights.sum())
            # The count in whole microseconds errs alike every time: repeats do not average it out.
            noise[index] = float(variances.min())
        _, coordinates, classes, layers = self._table.arrays()
        kinds = self._table.kinds()
        rest = logs.copy()
        self._slopes = {}
        for kind in np.unique(kinds[numbers]):
            rows = kinds[numbers] == kind
            features = _log_features(self._table, numbers[rows])
            penalty = _RIDGE * rows.sum() * np.eye(features.shape[1])
            penalty[0, 0] = 0.0
            slopes = np.linalg.solve(
                features.T @ features + penalty + 1e-9 * np.eye(len(penalty)), features.T @ logs[rows]
            )
            self._slopes[float(kind)] = slopes
            rest[rows] -= features @ slopes
        self._fits = {}
        for number in np.unique(classes[numbers]):
            rows = classes[numbers] == number
            known = (coordinates[numbers[rows]], layers[numbers[rows]])
            covariance = _mixed(departures(known, known)) + np.diag(noise[rows])
            self._fits[int(number)] = (known, cho_solve(cho_factor(covariance, lower=True), rest[rows]))

    def _predict(self, numbers: NDArray[np.int64]) -> Matrix:
        _, coordinates, classes, layers = self._table.arrays()
        kinds = self._table.kinds()
        logs = np.zeros(len(numbers))
        for kind in np.unique(kinds[numbers]):
            rows = kinds[numbers] == kind
            slopes = self._slopes.get(float(kind))
            if slopes is None:
                # No layer of this kind was ever timed: nothing is said of it.
                logs[rows] = -np.inf
                continue
            logs[rows] = _log_features(self._table, numbers[rows]) @ slopes
        for number in np.unique(classes[numbers]):
            found = (self._fits or {}).get(int(number))
            if found is not None:
                rows = classes[numbers] == number
                mine = (coordinates[numbers[rows]], layers[numbers[rows]])
                logs[rows] += _mixed(departures(mine, found[0])) @ found[1]
        result: Matrix = np.exp(logs)
        return result


def _mixed(parts: tuple[Matrix, Matrix, Matrix]) -> Matrix:
    return np.asarray(_PARTS[0] * parts[0] + _PARTS[1] * parts[1] + _PARTS[2] * parts[2])


def _log_features(table: UnitTable, numbers: NDArray[np.int64]) -> Matrix:
    """Return ``(n, F)``: a constant, logs of the amounts of work, and what is either so or not."""
    features = table.arrays()[0][numbers]
    return np.column_stack([np.ones(len(numbers)), table.logs(numbers), features[:, [0, 1, 2, 10, 12, 13, 15, 20]]])
