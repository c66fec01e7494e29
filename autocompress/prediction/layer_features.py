"""What of a unit decides its cost, as numbers. Numpy alone.

Counts that hardware is known to spend time on (arithmetic in whole vectors, bytes in and out, kernels started,
conversions), and coordinates in which layers that cost alike lie near each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autocompress.graph.layout import Unit
from autocompress.policy import FACTORIZATIONS
from autocompress.prediction.gaussian_process import Matrix, Whole
from autocompress.prediction.table_rows import OPS

# Widths at which vector and matrix units of present CPUs and GPUs change stride.
_VECTOR, _TILE = 16, 32
# How many numbers `counts`, `coordinates` and `log_amounts` give.
_OTHERS = FACTORIZATIONS[1:]
_COUNTS, COORDINATES, _LOGS = 33, 22 + len(OPS) + len(_OTHERS), 6
# A kind of layer that no table has seen lies so many usual lengths away from all others: it is predicted from its
# arithmetic alone, and with an interval that says so.
_FAR = 10.0

# One coordinate for each: which it is.
_NO_KIND, _NO_FORM = (0.0,) * len(OPS), (0.0,) * len(_OTHERS)
_KINDS = {kind: tuple(float(kind == other) for other in OPS) for kind in OPS}
_FORMS = {name: tuple(_FAR * (name == other) for other in _OTHERS) for name in _OTHERS}


def counts(unit: Unit) -> list[float]:
    """Return kernels, arithmetic, traffic, conversions, ragged widths."""
    q, chain, positions = float(unit.int8), unit.chain, unit.positions
    macs = unit.macs
    vectors = positions * sum(
        (_up(ins, _TILE) if ins > 1 else 1) * _up(outs, _VECTOR) * area * scale for ins, outs, area, scale in chain
    )
    weights = sum(ins * outs * area for ins, outs, area, _ in chain)
    made = positions * sum(outs * scale for _, outs, _, scale in chain)
    traffic = made + positions * unit.in_channels
    depthwise = float(unit.kind == "depthwise")
    ragged = [outs for _, outs, _, _ in chain if outs % _VECTOR]
    around = unit.context
    read, written = positions * unit.in_channels, positions * unit.out_channels
    enters = q * (1 - around.siblings_int8)
    leaves = q * (1 - around.outputs_int8)
    given = (1 - q) * around.outputs_int8
    # A tensor that some readers want in int8 and others do not is kept in both.
    mixed, beyond = 4 * around.outputs_int8 * (1 - around.outputs_int8), around.joins * around.beyond_int8
    return [
        len(chain), q * len(chain), q,
        vectors * (1 - q), vectors * q, macs * (1 - q), macs * q,
        weights * (1 - q), weights * q, traffic * (1 - q), traffic * q,
        enters, enters * read, (1 - q) * around.inputs_int8,
        leaves, leaves * written, given, given * written,
        depthwise * traffic, depthwise * traffic * q,
        len(ragged), positions * sum(ragged), q * positions * sum(ragged),
        float(unit.in_channels % _VECTOR > 0) * read,
        mixed, mixed * written, around.joins, around.joins * written, q * around.joins, q * around.joins * written,
        beyond, beyond * written, (1 - q) * around.siblings_int8 * read,
    ]  # fmt: skip


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def coordinates(unit: Unit) -> list[float]:
    """Return where a unit lies among all others; widths in doublings."""
    (first, second, *_), around = (*unit.ranks, 0, 0), unit.context
    ins, outs = unit.in_channels, unit.out_channels
    return [
        math.log2(ins), math.log2(outs), math.log2(first + 1), math.log2(second + 1),
        len(unit.ranks), unit.int8, unit.sparse, *around,
        # A tensor is kept in int8 alone only when all its readers want that.
        around.siblings_int8 == 1, around.outputs_int8 == 1,
        ins % _VECTOR > 0, outs % _VECTOR > 0, ins % _TILE > 0, outs % _TILE > 0,
        first % _VECTOR > 0, second % _VECTOR > 0,
        math.log2(unit.positions), math.log2(unit.area),
        *_KINDS.get(unit.kind, _NO_KIND), *_FORMS.get(unit.factorization, _NO_FORM),
    ]  # fmt: skip


def log_amounts(unit: Unit) -> list[float]:
    """Return the logs of arithmetic, weights and traffic, and what multiplies a layer's cost: its kernels, int8."""
    chain = unit.chain
    weights = sum([ins * outs * area for ins, outs, area, _ in chain])
    made = unit.positions * sum([outs * scale for _, outs, _, scale in chain])
    kernels = len(chain)
    return [math.log(unit.macs), math.log(weights), math.log(made), kernels, unit.int8, kernels * unit.int8]


class UnitTable:
    """Units, each once, as arrays that grow."""

    def __init__(self) -> None:
        self._index: dict[Unit, int] = {}
        self._names: dict[str, int] = {}
        self._reals = [np.zeros((0, width)) for width in (_COUNTS, COORDINATES, _LOGS)]
        self._layers = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._index)

    def add(self, units: Sequence[Unit]) -> list[int]:
        """Return the units' numbers, new ones taken in."""
        found = []
        for unit in units:
            number = self._index.get(unit)
            if number is None:
                number = self._index[unit] = len(self._index)
                self._put(number, unit)
            found.append(number)
        return found

    def _put(self, number: int, unit: Unit) -> None:
        if number == len(self._layers):
            more = max(256, number)
            self._reals = [np.concatenate([old, np.zeros((more, old.shape[1]))]) for old in self._reals]
            self._layers = np.concatenate([self._layers, np.zeros(more, np.int64)])
        for array, row in zip(self._reals, (counts(unit), coordinates(unit), log_amounts(unit)), strict=True):
            array[number] = row
        self._layers[number] = self._names.setdefault(unit.layer, len(self._names))

    def counts(self, numbers: Whole) -> Matrix:
        """Return ``(n, F)``."""
        return np.asarray(self._reals[0][numbers])

    def coordinates(self, numbers: Whole) -> Matrix:
        """Return ``(n, COORDINATES)``."""
        return np.asarray(self._reals[1][numbers])

    def logs(self, numbers: Whole) -> Matrix:
        """Return the log amounts ``(n, L)``."""
        return np.asarray(self._reals[2][numbers])

    def layers(self, numbers: Whole) -> Whole:
        """Return a number for each unit's layer ``(n,)``."""
        return np.asarray(self._layers[numbers])
