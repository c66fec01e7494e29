"""Ways to write a layer as a chain of thinner ones. A new one is a new file, and a name in `policy.FACTORIZATIONS`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from autocompress.compress.factorizations.base import Factor, Factorization, rank_at, ratio_of_energy
from autocompress.compress.factorizations.cp import Cp
from autocompress.compress.factorizations.spatial_svd import SpatialSvd
from autocompress.compress.factorizations.svd import Svd
from autocompress.compress.factorizations.tucker2 import Tucker2

FACTORIZATIONS: Mapping[str, Factorization] = {made.name: made for made in (Svd(), Tucker2(), SpatialSvd(), Cp())}

__all__ = [
    "FACTORIZATIONS",
    "Factor",
    "Factorization",
    "factorization_of",
    "rank_at",
    "ratio_of_energy",
]


def factorization_of(name: str, kernel: tuple[int, ...]) -> Factorization:
    """Return the factorization that `name`, of `policy.FACTORIZATIONS`, is for a layer with this kernel.

    A matrix has one low-rank form, whatever a kernel's would be: its truncated SVD.
    """
    return FACTORIZATIONS["svd" if math.prod(kernel) == 1 else name]
