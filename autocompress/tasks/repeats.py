"""Whether a task gives the same data and weights each time it is asked, by checksums of a few of them."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterable
from contextlib import suppress

import torch
from torch import Tensor, nn

# Samples of a reading that are remembered, and bytes of each: what is drawn anew or shuffled differs at once.
_ROWS, _BYTES = 32, 2**16


def checksum(tensor: Tensor) -> int:
    """Return a checksum of a tensor's first bytes, which its shape is part of."""
    part = tensor.detach().reshape(-1)[: _BYTES // max(1, tensor.element_size())].cpu().contiguous()
    return zlib.crc32(part.view(torch.uint8).numpy().tobytes(), len(tensor) if tensor.ndim else 0)


class Repeats:
    """Remembers the first reading of every data set and compares later ones with it."""

    def __init__(self) -> None:
        self._rows: dict[Hashable, list[int]] = {}
        self._totals: dict[Hashable, int] = {}
        self._weights: dict[str, int] | None = None

    def reading(self, key: Hashable, batch_size: int) -> Reading:
        """Return what compares one reading of the data set `key` with the first, in whatever batches that was."""
        return Reading(self._rows.setdefault(key, []), self._totals, (key, batch_size))

    def changed_weight(self, model: nn.Module) -> str | None:
        """Return the name of a weight that is another than in the first model seen; None where all are the same."""
        found: dict[str, int] = {}
        for name, value in model.state_dict().items():
            # Of weights that hold no plain numbers nothing can be told.
            with suppress(RuntimeError, TypeError, NotImplementedError, AttributeError):
                found[name] = checksum(value)
        if self._weights is None:
            self._weights = found
            return None
        return next((name for name, value in found.items() if self._weights.get(name, value) != value), None)


class Reading:
    """One reading of a data set.

    Args:
        rows: Checksums of its first samples, filled by the first reading.
        totals: How many samples each data set has, once one was read to its end.
        key: Of the data set and the batch size: a loader may leave out what fills no batch.
    """

    def __init__(self, rows: list[int], totals: dict[Hashable, int], key: Hashable) -> None:
        self._rows, self._totals, self._key, self._at = rows, totals, key, 0

    def changed(self, tensors: Iterable[Tensor]) -> int | None:
        """Take in the next batch, tensors ``(N, ...)``; return the first sample that differs from the first reading."""
        parts = list(tensors)
        differs = None
        for row in range(max(0, min(len(parts[0]), _ROWS - self._at))):
            found = zlib.crc32(b"".join(checksum(part[row]).to_bytes(4, "little") for part in parts))
            at = self._at + row
            if at == len(self._rows):
                self._rows.append(found)
            elif differs is None and self._rows[at] != found:
                differs = at
        self._at += len(parts[0])
        return differs

    def ended(self) -> int | None:
        """Say that the reading came to its end; return how many samples the first had, where this one has another.

        Of a first reading that did not come to its end, at least so many are known.
        """
        if not self._at and self._rows:
            return len(self._rows)
        first = self._totals.setdefault(self._key, self._at)
        return first if first != self._at else None
