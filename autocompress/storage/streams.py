"""From a tensor to coded bytes and back, exactly: every value has the bits it had.

Of each tensor every form is tried that can hold it, and the smallest is kept. Forms look at bit patterns alone, so
shared and pruned weights are found wherever they come from, and NaN, minus zero and any dtype survive.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.documents import RAW
from autocompress.errors import ConfigError, VerificationError, nearest
from autocompress.storage.coders import CODERS, Coder, Symbols, encode_smallest
from autocompress.storage.scaled import Scaled, find_scaled

_FORMS = ("raw", "shared", "planes", "sparse", "scaled")
# More distinct values than this are not called shared: an index would be wider than a byte.
MAX_LEVELS = 256
# The most symbols of any stream that this package writes.
_MOST_SYMBOLS = 2**16
# Alphabets tried for the gaps between weights that stay; the last symbol stands for a gap that goes on.
_GAP_ALPHABETS = (8, 16, 32, 64, 128, 256)
# Bytes of a tensor below which no expansion is worth a thought.
_EXPANDS = 2**16
# Counting distinct values of a sample tells a tensor that is not shared without sorting all of it.
_SAMPLE = 4096
# Most bytes of tensors that one byte of a file may stand for, and how many are free. Zeros, or one value throughout,
# take no bytes at all: without a bound a file of kilobytes would ask for all memory there is.
MOST_EXPANSION, FREE_BYTES = 4096, 16 * 2**20
# With fewer zeros than this leaves, positions take more than the zeros do.
_SPARSE = 0.95

Patterns = NDArray[np.unsignedinteger[Any]]


@dataclass
class Coded:
    """Bytes and how to read them.

    Attributes:
        form: The JSON that a container keeps.
        payload: The bytes.
    """

    form: dict[str, Any]
    payload: bytes

    @property
    def size(self) -> int:
        """What it takes in a file, about: of small tensors the description is no small part."""
        return len(self.payload) + len(json.dumps(self.form))


def encode(patterns: Patterns, shape: tuple[int, ...], coders: tuple[str, ...]) -> Coded:
    """Encode the bit patterns ``(n,)`` of a tensor of `shape` in the smallest form."""
    best = _values(patterns, coders)
    if patterns.size and np.count_nonzero(patterns) <= _SPARSE * patterns.size:
        orders = ("rows",) if len(shape) < 2 else ("rows", "columns")
        for order in orders:
            found = _sparse(patterns, shape, order, coders)
            best = min(best, found, key=lambda coded: coded.size)
    if patterns.nbytes > MOST_EXPANSION * len(best.payload) and patterns.nbytes > _EXPANDS:
        # A bit for each value at least, so that a reader can tell this from a file that was made to harm.
        return _values(patterns, ("raw",))
    if len(shape) > 1 and (scaled := _scaled(patterns, shape, coders)) is not None:
        best = min(best, scaled, key=lambda coded: coded.size)
    return best


def decode(form: dict[str, Any], payload: bytes, shape: tuple[int, ...], itemsize: int) -> Patterns:
    """Return the bit patterns ``(n,)`` that `encode` was given.

    Raises:
        ConfigError: A form or a coder is unknown to this release.
        VerificationError: The payload is not what the form says.
    """
    try:
        count = math.prod(shape)
        reader = _Reader(payload)
        kind = form["form"]
        if kind == "scaled":
            found = _read_scaled(form, reader, count)
        elif kind != "sparse":
            found = _read_values(form, reader, count, itemsize)
        else:
            places = _read_gaps(form["gaps"], reader, count)
            ordered = np.zeros(count, f"<u{itemsize}")
            ordered[places] = _read_values(form["values"], reader, len(places), itemsize)
            found = ordered if form["order"] == "rows" else ordered.reshape(_turned(shape)).T.reshape(-1)
        reader.finish()
    except RAW as error:
        raise VerificationError(f"A tensor's description does not fit its bytes ({error!r}).") from error
    except BaseException as error:
        # What Rust raises where the coder's own checks fail; it is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise VerificationError("A tensor's description does not fit its bytes: they are no coded stream.") from error
    if len(found) != count:
        raise VerificationError(f"A tensor's description does not fit its bytes: {len(found)} values, not {count}.")
    return np.ascontiguousarray(found)


def stages(patterns: Patterns) -> tuple[int, int, int | None]:
    """Return what a tensor takes before entropy coding: bytes pruned, bytes shared, and its distinct non-zero values.

    Pruned: non-zero values and raw gaps, where that is less than all values. Shared: the same with raw indices in place
    of values. None levels: more than can be shared.
    """
    raw = CODERS["raw"]
    places, tried = _gaps(patterns)
    positions = min(raw.size(symbols, alphabet) for alphabet, symbols in tried)
    pruned = min(patterns.nbytes, positions + len(places) * patterns.itemsize)
    levels = _levels(patterns[places])
    if levels is None:
        return pruned, pruned, None
    table, every = len(levels) * patterns.itemsize, len(levels) + (len(places) < len(patterns))
    shared = table + min(positions + raw.size(places, len(levels)), raw.size(patterns.astype(np.int64), every))
    return pruned, min(pruned, shared), len(levels)


# -- values -------------------------------------------------------------------------------------------------------


def _values(patterns: Patterns, coders: tuple[str, ...]) -> Coded:
    raw = patterns.astype(patterns.dtype.newbyteorder("<")).tobytes()
    found = [Coded({"form": "raw"}, raw)]
    if not patterns.size:
        return found[0]
    levels = _levels(patterns)
    if levels is not None:
        found.append(_shared(patterns, levels, coders))
    else:
        found.append(_planes(patterns, coders))
    return min(found, key=lambda coded: coded.size)


def _levels(patterns: Patterns) -> Patterns | None:
    """Return the distinct patterns, ascending, or None where there are more than `MAX_LEVELS`."""
    if len(np.unique(patterns[:_SAMPLE])) > MAX_LEVELS:
        return None
    levels = np.unique(patterns)
    return levels if len(levels) <= MAX_LEVELS else None


def _shared(patterns: Patterns, levels: Patterns, coders: tuple[str, ...]) -> Coded:
    table = levels.astype(levels.dtype.newbyteorder("<")).tobytes()
    indices = np.searchsorted(levels, patterns).astype(np.int64)
    stream, data = _stream(indices, len(levels), coders)
    return Coded({"form": "shared", "levels": len(levels), "indices": stream}, table + data)


def _planes(patterns: Patterns, coders: tuple[str, ...]) -> Coded:
    """Code the first, second, … bytes of all values apart: exponents take few values, mantissas any."""
    planes = patterns.astype(patterns.dtype.newbyteorder("<")).view(np.uint8).reshape(len(patterns), -1).T
    coded = [_stream(plane.astype(np.int64), 256, coders) for plane in planes]
    payload = b"".join(data for _, data in coded)
    return Coded({"form": "planes", "bytes": [stream for stream, _ in coded]}, payload)


def _read_values(form: dict[str, Any], reader: _Reader, count: int, itemsize: int) -> Patterns:
    kind = form["form"]
    if kind == "raw":
        return np.frombuffer(reader.take(count * itemsize), f"<u{itemsize}")
    if kind == "shared":
        levels = np.frombuffer(reader.take(form["levels"] * itemsize), f"<u{itemsize}")
        found: Patterns = levels[_read(form["indices"], reader, count, len(levels))]
        return found
    if kind == "planes":
        planes = [_read(stream, reader, count, 256).astype(np.uint8) for stream in form["bytes"]]
        return np.stack(planes, axis=1).reshape(-1).view(f"<u{itemsize}")
    raise ConfigError(f"Unknown form {kind!r} of a tensor.{nearest(str(kind), _FORMS)}")


def _scaled(patterns: Patterns, shape: tuple[int, ...], coders: tuple[str, ...]) -> Coded | None:
    """Code integers times a scale per slice, where values are that and too many for one table of levels."""
    if _levels(patterns[patterns != 0]) is not None:
        return None
    found = find_scaled(patterns, int(np.prod(shape[1:], dtype=np.int64)))
    if found is None:
        return None
    low, high = int(found.codes.min()), int(found.codes.max())
    stream, data = _stream(found.codes - low, high - low + 1, coders)
    form = {"form": "scaled", "slice": found.slice, "low": low, "codes": high - low + 1, "indices": stream}
    return Coded(form, found.scales.astype("<f4").tobytes() + data)


def _read_scaled(form: dict[str, Any], reader: _Reader, count: int) -> Patterns:
    slices = -(-count // _within(form["slice"], 1, max(count, 1)))
    scales = np.frombuffer(reader.take(4 * slices), "<f4").astype(np.float32)
    codes = _read(form["indices"], reader, count, form["codes"]) + form["low"]
    return Scaled(form["slice"], scales, codes).patterns()


# -- positions ----------------------------------------------------------------------------------------------------


def _sparse(patterns: Patterns, shape: tuple[int, ...], order: str, coders: tuple[str, ...]) -> Coded:
    ordered = patterns if order == "rows" else patterns.reshape(shape[0], -1).T.reshape(-1)
    places, tried = _gaps(ordered)
    sizes = [min(CODERS[name].size(symbols, alphabet) for name in coders) for alphabet, symbols in tried]
    alphabet, symbols = tried[int(np.argmin(sizes))]
    stream, data = _stream(symbols, alphabet, coders)
    values = _values(ordered[places], coders)
    form = {
        "form": "sparse", "order": order, "values": values.form,
        "gaps": {"alphabet": alphabet, "symbols": len(symbols), **stream},
    }  # fmt: skip
    return Coded(form, data + values.payload)


def _gaps(ordered: Patterns) -> tuple[Symbols, list[tuple[int, Symbols]]]:
    """Return where `ordered` is not zero, and the gaps before those places as symbols of every alphabet."""
    places = np.flatnonzero(ordered)
    gaps = np.diff(places, prepend=-1) - 1
    return places, [(alphabet, _symbols(gaps, alphabet)) for alphabet in _GAP_ALPHABETS]


def _symbols(gaps: Symbols, alphabet: int) -> Symbols:
    """Return gaps as symbols: ``alphabet - 1`` for as many zeros and no weight, as often as needed, then the rest."""
    last = alphabet - 1
    ends = np.cumsum(gaps // last + 1) - 1
    symbols = np.full(int(ends[-1]) + 1 if len(ends) else 0, last, dtype=np.int64)
    symbols[ends] = gaps % last
    return symbols


def _read_gaps(form: dict[str, Any], reader: _Reader, count: int) -> Symbols:
    alphabet = _within(form["alphabet"], 2, _MOST_SYMBOLS)
    # Each stands for a value, or for a zero at least.
    _within(form["symbols"], 0, count)
    symbols = _read(form, reader, form["symbols"], alphabet)
    weight = symbols < alphabet - 1
    places: Symbols = np.cumsum(symbols + weight)[weight] - 1
    return places


def _turned(shape: tuple[int, ...]) -> tuple[int, int]:
    return int(np.prod(shape[1:], dtype=np.int64)), shape[0]


# -- streams ------------------------------------------------------------------------------------------------------


def _stream(symbols: Symbols, alphabet: int, coders: tuple[str, ...]) -> tuple[dict[str, Any], bytes]:
    name, data = encode_smallest(symbols, alphabet, coders)
    return {"coder": name, "size": len(data)}, data


def _read(stream: dict[str, Any], reader: _Reader, count: int, alphabet: int) -> Symbols:
    _within(alphabet, 0, _MOST_SYMBOLS)
    return coder(stream["coder"]).decode(reader.take(stream["size"]), count, alphabet)


def _within(value: Any, least: int, most: int) -> int:
    if not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{value!r} is not a number from {least} to {most}")
    return value


def coder(name: str) -> Coder:
    """Return the coder of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in CODERS:
        raise ConfigError(f"Unknown coder {name!r}.{nearest(str(name), CODERS)}")
    return CODERS[name]


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        if count < 0 or len(found) != count:
            raise ValueError(f"{count} bytes wanted, {len(found)} left")
        self._at += count
        return found

    def finish(self) -> None:
        if self._at != len(self._data):
            raise ValueError(f"{len(self._data) - self._at} bytes left over")
