"""What single layers take, learned from the rows of the engines' own profilers.

A profiler times whole microseconds and slows the network down, so its figures are only ever shares of what the network
took (`LayerTime`). They are many, one for each layer of a profiled network, and say what no end-to-end figure says:
how a layer's cost moves with its widths, ranks, dtypes, and with how the tensors around it are kept. One process over
all layers learns which of these matter. The predictor takes their sum and learns from whole networks how far it is off.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from autocompress.graph.layout import Unit
from autocompress.prediction.gaussian_process import GaussianProcess, Matrix, Points, Whole
from autocompress.prediction.layer_features import COORDINATES, UnitTable

# Standard deviation of a profiler's log time: for the whole microseconds it counts in.
_TICK_MS = 3e-4
# Learned from this many rows at most: the time that takes goes with the cube of it.
_MOST = 2000
# Learned anew, and hyperparameters chosen anew, when there are so many times as many rows.
_RELEARN, _RETUNE = 1.15, 1.6
_LENGTH, _AMPLITUDES = 3.0, (-2.0, -3.5, -4.5, -2.0, -4.5)


@dataclass(frozen=True)
class LayerTime:
    """One layer of a measured network.

    Attributes:
        unit: The layer as it was there.
        ratio: Its share of the network's latency, over the uncompressed network's latency of the same run.
        time_ms: The same in ms.
        network: Hash of the policy that made the network.
    """

    unit: Unit
    ratio: float
    time_ms: float
    network: str = ""


class UnitTimes:
    """Predict single layers' times. Numbers are those of the `UnitTable` that it shares with the predictor.

    Attributes:
        factorizations: Those of the layers whose times are known.
    """

    def __init__(self, table: UnitTable) -> None:
        self._table = table
        self.factorizations: set[str] = set()
        self._rows: list[tuple[int, float, float, str]] = []
        self._process = GaussianProcess((COORDINATES, _LENGTH), _AMPLITUDES)
        self._learned, self._tuned = 0, 0
        self._centre, self._width = np.zeros(0), np.zeros(0)
        self._times = np.zeros(0)
        self._left_out: dict[str, dict[int, float]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def observe(self, times: Iterable[LayerTime]) -> None:
        """Learn layers' times."""
        for found in times:
            if found.ratio > 0 and found.time_ms > 0:
                number = self._table.add([found.unit])[0]
                self.factorizations.add(found.unit.factorization)
                variance = (_TICK_MS / found.time_ms) ** 2
                self._rows.append((number, float(np.log(found.ratio)), variance, found.network))

    def refresh(self) -> None:
        """Learn what was observed, once it is enough more than before; at least one row must be known."""
        if self._learned and len(self._rows) < _RELEARN * self._learned:
            return
        rows = self._rows
        if len(rows) > _MOST:
            rows = [rows[i] for i in sorted(np.random.default_rng(0).permutation(len(rows))[:_MOST])]
        numbers = np.array([number for number, *_ in rows])
        logs, noise = (np.array([row[column] for row in rows], np.float64) for column in (1, 2))
        if len(self._rows) >= _RETUNE * self._tuned:
            raw = self._table.coordinates(numbers), self._table.logs(numbers)
            self._centre = np.concatenate([part.mean(0) for part in raw])
            width = np.concatenate([part.std(0) for part in raw])
            self._width = np.where(width > 1e-9, width, 1.0)
            self._process.tune(self._points(numbers), logs, noise)
            self._tuned = len(self._rows)
        self._process.condition(self._points(numbers), logs, noise)
        self._learned = len(self._rows)
        self._times = np.zeros(0)
        owners: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            owners.setdefault(row[3], []).append(index)
        groups = [np.array(found) for found in owners.values()]
        self._left_out = {
            owner: dict(zip((int(n) for n in numbers[group]), np.exp(means), strict=True))
            for owner, group, (means, _) in zip(owners, groups, self._process.left_out(groups), strict=True)
        }

    def ratios(self, numbers: Whole) -> Matrix:
        """Return each unit's predicted time over the uncompressed network's latency ``(n,)``."""
        if len(self._times) < len(self._table):
            self._times = np.concatenate([self._times, np.full(len(self._table) + 256 - len(self._times), np.nan)])
        new = np.unique(numbers[np.isnan(self._times[numbers])])
        if len(new):
            self._times[new] = np.exp(self._process.mean(self._points(new)))
        found: Matrix = self._times[numbers]
        return found

    def without(self, network: str, numbers: Whole) -> Matrix:
        """Return the times of a network's units as all other networks' rows predict them ``(n,)``."""
        times, own = self.ratios(numbers), self._left_out.get(network, {})
        return np.array([own.get(int(number), time) for number, time in zip(numbers, times, strict=True)])

    def covariance(self, numbers: Whole) -> Matrix:
        """Return the covariance of the log times of different units ``(n, n)``."""
        return self._process.moments(self._points(numbers))[1]

    def _points(self, numbers: Whole) -> Points:
        raw = np.column_stack([self._table.coordinates(numbers), self._table.logs(numbers)])
        scaled = (raw - self._centre) / self._width
        linear = np.column_stack([np.ones(len(numbers)), scaled[:, COORDINATES:]])
        return Points(scaled[:, :COORDINATES], linear, self._table.layers(numbers))
