"""Fronts of two figures as arithmetic: how far behind one a trial is, and how much area a point adds to one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autocompress.exploration.knapsack.problem import Array


def behind_front(quality: Array, cost: Array) -> Array:
    """Return how much quality each trial lacks to the best that costs no more, `(trials,)`; 0 on the front."""
    spent = np.nan_to_num(cost, nan=np.inf)
    order = np.lexsort((-quality, spent))
    best = np.maximum.accumulate(quality[order]) if len(order) else quality
    found = np.empty_like(best)
    found[order] = best - quality[order]
    return found


def hypervolume_gain(front: Sequence[tuple[float, float]], points: Array, limit: float) -> Array:
    """Return how much area each point would add to a front, alone, `(points,)`.

    Args:
        front: Pairs of share lost and cost, in any order, dominated ones allowed.
        points: `(points, 2)` of the same.
        limit: Cost beyond which nothing counts; shares count up to 1.
    """
    steps: list[tuple[float, float]] = []
    for cost, loss in sorted((cost, max(loss, 0.0)) for loss, cost in front):
        if loss < 1 and cost < limit and (not steps or loss < steps[-1][1]):
            steps.append((cost, loss))
    # Between two costs the front is flat at the loss of the cheaper one; before the first, nothing is known: 1.
    starts = np.array([-np.inf, *(s[0] for s in steps)])
    ends = np.array([*(s[0] for s in steps), limit])
    level = np.array([1.0, *(s[1] for s in steps)])
    lost, spent = np.maximum(points[:, :1], 0.0), points[:, 1:]
    width = np.maximum(ends - np.maximum(starts, spent), 0.0)
    gain: Array = (width * np.maximum(level - lost, 0.0)).sum(1)
    return gain
