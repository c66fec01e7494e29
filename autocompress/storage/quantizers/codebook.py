"""K-means weight sharing: the weights of a tensor become the centroids of their clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.catalogue import Method
from autocompress.errors import ConfigError, nearest
from autocompress.storage.quantizers.base import Levels, StorageQuantizer

METHOD = Method(
    name="codebook",
    family="storage",
    summary="Weights of a tensor share the centroids of their k-means clusters",
    source="Han, Mao & Dally, Deep Compression, ICLR 2016",
)

INITIALIZATIONS = ("linear", "density", "random")
_ITERATIONS = 300


class Codebook(StorageQuantizer):
    """Lloyd's k-means in one dimension.

    Args:
        initialization: Centroids begin evenly spaced between the least and the greatest weight (``"linear"``, which
            keeps the few large weights and is what the paper found best), at quantiles (``"density"``), or at
            weights drawn at random.
        seed: Of the random initialization.
    """

    method = METHOD
    SCALED = False

    def __init__(self, initialization: str = "linear", seed: int = 0) -> None:
        if initialization not in INITIALIZATIONS:
            raise ConfigError(
                f"Unknown initialization {initialization!r} of codebooks.{nearest(initialization, INITIALIZATIONS)}"
            )
        self.initialization, self.seed = initialization, seed

    def _fit(self, values: Tensor, weight_bits: int) -> Levels:
        # Double precision: sums over millions of float32 weights would move centroids by rounding alone.
        ordered = values.double().sort().values
        centroids = self._start(ordered, 2**weight_bits)
        sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
        for _ in range(_ITERATIONS):
            # In one dimension a cluster is a run of the sorted values, so a step costs k searches, not n * k distances.
            edges = torch.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
            edges = torch.cat([edges.new_zeros(1), edges, edges.new_tensor([len(ordered)])])
            counts = edges.diff()
            means = sums[edges].diff() / counts.clamp_min(1)
            moved = torch.where(counts > 0, means, centroids)
            if torch.equal(moved, centroids):
                break
            centroids = moved
        return Levels.nearest(centroids, values)

    def _start(self, ordered: Tensor, count: int) -> Tensor:
        if self.initialization == "linear":
            return torch.linspace(float(ordered[0]), float(ordered[-1]), count, dtype=torch.float64)
        if self.initialization == "density":
            places = (torch.arange(count, dtype=torch.float64) + 0.5) / count * len(ordered)
            return ordered[places.long()]
        generator = torch.Generator().manual_seed(self.seed)
        return ordered[torch.randperm(len(ordered), generator=generator)[:count].sort().values]
