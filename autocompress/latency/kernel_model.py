"""The prior of the latency predictor: how alike the costs of two units are. Numpy alone.

A unit's cost is a sum of a linear part, over counts that hardware is known to spend time on (arithmetic in whole
vectors, bytes in and out, kernels started, conversions), and of smooth departures from it over its widths, ranks and
dtypes, shared within a class of layers and, smaller, of the layer's own. Gaussian processes of this additive form:
Duvenaud, Nickisch, Rasmussen, Additive Gaussian Processes, NeurIPS 2011.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.latency.units import Unit

Matrix = NDArray[np.float64]

# Widths at which vector and matrix units of present CPUs and GPUs change stride.
_VECTOR, _TILE = 16, 32
# Length scales of the smooth parts, in doublings of a width.
_SMOOTH, _ROUGH = 1.5, 0.75


def linear_features(unit: Unit) -> list[float]:
    """Return the counts that the linear part weighs: kernels, arithmetic, traffic, conversions, ragged widths."""
    q, chain, positions = float(unit.int8), unit.chain, unit.positions
    macs = unit.macs
    vectors = positions * sum(
        (_up(ins, _TILE) if ins > 1 else 1) * _up(outs, _VECTOR) * area for ins, outs, area in chain
    )
    weights = sum(ins * outs * area for ins, outs, area in chain)
    written = positions * sum(outs for _, outs, _ in chain)
    traffic = written + positions * unit.in_channels
    depthwise = float(unit.kind == "depthwise")
    ragged = [outs for _, outs, _ in chain if outs % _VECTOR]
    enters = q * (1 - unit.inputs_int8)
    leaves = q * (1 - unit.outputs_int8)
    given = (1 - q) * unit.outputs_int8
    return [
        len(chain), q * len(chain), q,
        vectors * (1 - q), vectors * q, macs * (1 - q), macs * q,
        weights * (1 - q), weights * q, traffic * (1 - q), traffic * q,
        enters, enters * positions * unit.in_channels, (1 - q) * unit.inputs_int8,
        leaves, leaves * positions * unit.out_channels, given, given * positions * unit.out_channels,
        depthwise * traffic, depthwise * traffic * q,
        len(ragged), positions * sum(ragged), q * positions * sum(ragged),
        float(unit.in_channels % _VECTOR > 0) * positions * unit.in_channels,
    ]  # fmt: skip


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _coordinates(unit: Unit) -> list[float]:
    """Return where a unit lies among others of its class; distances of 1 are a doubling of a width."""
    ranks = (*unit.ranks, 0, 0)
    widths = (unit.in_channels, unit.out_channels)
    return [
        *(math.log2(width) for width in widths),
        *(0.7 * math.log2(rank + 1) for rank in ranks[:2]),
        1.5 * unit.int8, 0.8 * unit.inputs_int8, 0.8 * unit.outputs_int8,
        *(float(width % _VECTOR > 0) for width in widths),
        *(0.5 * float(width % _TILE > 0) for width in widths),
        float(ranks[0] % _VECTOR > 0),
    ]  # fmt: skip


class UnitTable:
    """Units, each once, as arrays that grow."""

    def __init__(self) -> None:
        self.index: dict[Unit, int] = {}
        self._numbers: tuple[dict[Any, int], dict[Any, int], dict[Any, int]] = ({}, {}, {})
        # Linear features, coordinates; class, layer and kind.
        self._reals: list[Matrix] = []
        self._whole = np.zeros((0, 3), np.int64)

    def __len__(self) -> int:
        return len(self.index)

    def add(self, units: Sequence[Unit]) -> list[int]:
        """Return the units' numbers, new ones taken in."""
        found = []
        for unit in units:
            number = self.index.get(unit)
            if number is None:
                number = self.index[unit] = len(self.index)
                keys = ((unit.kind, unit.area, unit.groups, unit.positions, unit.role), unit.layer, unit.kind)
                named = [known.setdefault(key, len(known)) for known, key in zip(self._numbers, keys, strict=True)]
                self._put(number, linear_features(unit), _coordinates(unit), named)
            found.append(number)
        return found

    def _put(self, number: int, features: list[float], coordinates: list[float], named: list[int]) -> None:
        if number == len(self._whole):
            more = max(256, number)
            if not self._reals:
                self._reals = [np.zeros((0, len(features))), np.zeros((0, len(coordinates)))]
            self._reals = [np.concatenate([old, np.zeros((more, old.shape[1]))]) for old in self._reals]
            self._whole = np.concatenate([self._whole, np.zeros((more, 3), np.int64)])
        self._reals[0][number], self._reals[1][number], self._whole[number] = features, coordinates, named

    def kinds(self) -> NDArray[np.int64]:
        """Return a number for each unit's kind of layer ``(U,)``."""
        return self._whole[: len(self), 2]

    def logs(self, numbers: NDArray[np.int64]) -> Matrix:
        """Return the logs of the units' arithmetic in whole vectors, traffic and weights ``(n, 3)``."""
        features = self._reals[0][numbers]
        # Each is split into dense and int8 columns, of which one is 0.
        return np.log(np.stack([features[:, a] + features[:, a + 1] for a in (3, 9, 7)], axis=1))

    def arrays(self) -> tuple[Matrix, Matrix, NDArray[np.int64], NDArray[np.int64]]:
        """Return linear features ``(U, F)``, coordinates ``(U, D)``, classes ``(U,)`` and layers ``(U,)``."""
        count = len(self)
        return self._reals[0][:count], self._reals[1][:count], self._whole[:count, 0], self._whole[:count, 1]


def departures(
    left: tuple[Matrix, NDArray[np.int64]], right: tuple[Matrix, NDArray[np.int64]]
) -> tuple[Matrix, Matrix, Matrix]:
    """Return the covariances ``(U, V)`` of the three smooth parts, each of variance 1, of units of one class.

    `left` and `right` are coordinates and layers of U and of V units.
    """
    x, y = left[0], right[0]
    squares = np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T, 0.0)
    rough = np.exp(-np.sqrt(squares) / _ROUGH)
    return np.exp(-squares / (2 * _SMOOTH**2)), rough, rough * (left[1][:, None] == right[1][None])
