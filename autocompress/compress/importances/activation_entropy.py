"""Entropy of activations: channels that say the same of every sample."""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.catalogue import Method
from autocompress.compress.importances.activations import ActivationImportance, Reader

METHOD = Method(
    "activation_entropy",
    "importance",
    "entropy of a channel's mean activation from sample to sample",
    "Luo & Wu, An entropy-based pruning method for CNN compression, 2017",
)
BINS = 100


class ActivationEntropy(ActivationImportance):
    """Entropy, in nats, of the histogram over samples of a channel's globally averaged activation.

    `BINS` bins between the smallest and the largest value of the channel, found in a first pass over the data, so that
    memory does not grow with them. A channel that is the same for all samples scores 0.
    """

    passes = 2

    def __init__(self) -> None:
        self._low: dict[Reader, Tensor] = {}
        self._high: dict[Reader, Tensor] = {}
        self._counts: dict[Reader, Tensor] = {}

    def observe(self, reader: Reader, values: Tensor, number: int) -> None:
        """See `ActivationImportance.observe`."""
        pooled = values.mean(2)
        if number == 0:
            low, high = pooled.amin(0), pooled.amax(0)
            self._low[reader] = torch.minimum(self._low.get(reader, low), low)
            self._high[reader] = torch.maximum(self._high.get(reader, high), high)
            return
        low, high = self._low[reader], self._high[reader]
        width = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
        bins = ((pooled - low) / width * BINS).long().clamp_(0, BINS - 1)
        counts = self._counts.setdefault(reader, torch.zeros(len(low), BINS))
        counts.scatter_add_(1, bins.T, torch.ones_like(pooled.T))

    def result(self, reader: Reader) -> Tensor:
        """See `ActivationImportance.result`."""
        counts = self._counts[reader]
        shares = counts / counts.sum(1, keepdim=True)
        return -torch.xlogy(shares, shares).sum(1)


IMPORTANCES = {METHOD.name: ActivationEntropy}
