"""A process that keeps one processor busy while it is told to: ``python -m autocompress.measurement.load``.

Beside it a network's latency is that of a shared core: on hyper-threads they share its units and caches, elsewhere the
last cache and the memory. It computes on what lies in a cache and moves what does not, half of the time each. It reads
one letter at a time, ``b`` to begin and ``e`` to end, and ends when stdin closes.
"""

from __future__ import annotations

import os
import sys
import threading

import numpy as np

# Products of matrices that stay in the second cache, and copies of what does not fit in it, for about as long.
_SIZE, _PRODUCTS, _BYTES = 192, 12, 8 * 2**20


def main(cpu: str) -> None:
    """Obey until stdin closes."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(cpu)})
    told = threading.Event()
    threading.Thread(target=_work, args=(told,), daemon=True).start()
    while letter := os.read(0, 1):
        if letter == b"b":
            told.set()
        else:
            told.clear()
        os.write(1, letter)


def _work(told: threading.Event) -> None:
    factor = np.full((_SIZE, _SIZE), 1 / _SIZE, dtype=np.float32)
    product = factor.copy()
    moved = np.ones(_BYTES // 8, dtype=np.float64)
    place = np.empty_like(moved)
    while told.wait():
        for _ in range(_PRODUCTS):
            product = factor @ product
        np.copyto(place, moved)


if __name__ == "__main__":
    main(sys.argv[1])
