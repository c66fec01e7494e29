"""Values that are small integers times one scale per slice: found from their bits alone, and given back to the bit.

A quantizer that has a scale of its own for every channel or group leaves more values than a table holds, but few codes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.storage.coders import Symbols

Patterns = NDArray[np.unsignedinteger[Any]]

# Slices of consecutive values that are looked for, beside those of a whole row.
GROUPS = (512, 256, 128, 64, 32, 16)
# As wide as an alphabet may be.
_MOST_CODES = 256
# The smallest magnitude of a slice is this many times its scale, at most; groups of a few values seldom hold a one.
_MULTIPLES = range(1, 128)
_LEAST = np.finfo(np.float32).tiny
# The quotient, and its neighbours below and above: the product that it is of was rounded.
_STEPS = (None, 0, math.inf)
# A few slices tell most tensors that are nothing of the kind.
_SAMPLE = 16


@dataclass(frozen=True)
class Scaled:
    """Codes and scales.

    Attributes:
        slice: Values of one scale, the last slice may have fewer.
        scales: Float32 ``(slices,)``, above 0.
        codes: Of every value ``(n,)``.
    """

    slice: int
    scales: NDArray[np.float32]
    codes: Symbols

    def patterns(self) -> Patterns:
        """Return the bit patterns ``(n,)``: products in single precision."""
        scales = np.repeat(self.scales, self.slice)[: len(self.codes)]
        return (self.codes.astype(np.float32) * scales).view(np.uint32)


def find_scaled(patterns: Patterns, row: int) -> Scaled | None:
    """Return float32 values ``(n,)`` by codes, in the longest slices that do; None where none do.

    Args:
        patterns: Their bits.
        row: Values of one channel.
    """
    if patterns.itemsize != 4 or not patterns.size:
        return None
    values = np.ascontiguousarray(patterns).view(np.float32)
    if not np.isfinite(values).all():
        return None
    for length in sorted({row, *(group for group in GROUPS if group < len(values))}, reverse=True):
        sample = values[: _SAMPLE * length]
        if len(np.unique(sample[:length])) > _MOST_CODES or _coded(sample, length) is None:
            continue
        if (found := _coded(values, length)) is not None:
            return found
    return None


def _coded(values: NDArray[np.float32], length: int) -> Scaled | None:
    slices = -(-len(values) // length)
    table = np.zeros((slices, length), np.float32)
    table.reshape(-1)[: len(values)] = values
    least = np.where(table == 0, np.float32(np.inf), np.abs(table)).min(1)
    least[np.isinf(least)] = 1.0
    scales, left = np.zeros(slices, np.float32), np.arange(slices)
    for multiple, step in itertools.product(_MULTIPLES, _STEPS):
        scale = (least[left] / np.float32(multiple)).astype(np.float32)
        if step is not None:
            scale = np.nextafter(scale, np.float32(step))
        fits = _fit(table[left], scale)
        scales[left[fits]] = scale[fits]
        left = left[~fits]
        if not len(left):
            break
    else:
        return None
    codes = _codes(table, scales).astype(np.int64).reshape(-1)[: len(values)]
    return Scaled(length, scales, codes) if int(codes.max() - codes.min()) < _MOST_CODES else None


def _codes(rows: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.float64]:
    codes: NDArray[np.float64] = np.rint(rows.astype(np.float64) / np.maximum(scales, _LEAST)[:, None])
    return codes + 0.0  # no code is minus zero


def _fit(rows: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return of which rows all values are small integers times the scale, to the bit: minus zero is none."""
    codes = _codes(rows, scales)
    small = np.abs(codes).max(1) < _MOST_CODES
    again = np.where(small[:, None], codes, 0).astype(np.float32) * scales[:, None]
    same = (again.view(np.uint32) == rows.view(np.uint32)).all(1)
    fits: NDArray[np.bool_] = same & small & (scales > 0)
    return fits
