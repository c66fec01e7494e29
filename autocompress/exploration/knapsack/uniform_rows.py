"""Uniform rows: every parameter of a kind as far down its list as the others of that kind.

A sum of what choices lose on their own is most often right of these: nothing was picked for being believed too good,
and they tell the kinds apart. Knows positions only.
"""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np

from autocompress.exploration.knapsack.choice_graph import Graph
from autocompress.exploration.knapsack.problem import Index

# Of more combinations, so many are drawn.
_MOST = 500


def uniform_rows(graph: Graph, rng: np.random.Generator) -> list[Index]:
    """Return rows in which all parameters of a kind take choices at one place of their lists, each row once.

    Args:
        graph: Its `kinds` are combined with each other; a list shorter than its kind's longest one gives its nearest.
        rng: Draws the combinations where there are too many.
    """
    kinds = graph.kinds()
    longest = [max(len(graph.choices[i]) for i in members) for members in kinds]
    if prod(longest) > _MOST:
        levels = [tuple(int(rng.integers(count)) for count in longest) for _ in range(_MOST)]
    else:
        levels = list(product(*(range(count) for count in longest)))
    found: dict[bytes, Index] = {}
    for level in levels:
        row = np.zeros(len(graph.names), np.int64)
        for members, place, count in zip(kinds, level, longest, strict=True):
            for i in members:
                row[i] = round(place * (len(graph.choices[i]) - 1) / max(count - 1, 1))
        chosen = graph.read(row)
        settled = None if chosen is None else graph.canonicalise(chosen)
        if settled is not None:
            found[settled.tobytes()] = settled
    return list(found.values())
