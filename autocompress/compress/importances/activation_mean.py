"""Mean activation: channels that say little."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from autocompress.catalogue import Method
from autocompress.compress.importances.activations import ActivationImportance, Reader

METHOD = Method(
    "activation_mean",
    "importance",
    "mean |activation| over calibration data",
    "Molchanov et al., Pruning for resource efficient inference, ICLR 2017",
)


class ActivationMean(ActivationImportance):
    """Mean of ``|a|`` over samples and positions."""

    def __init__(self) -> None:
        self._sums: dict[Reader, Tensor] = defaultdict(lambda: torch.zeros(()))
        self._counts: dict[Reader, int] = defaultdict(int)

    def observe(self, reader: Reader, values: Tensor, number: int) -> None:
        """See `ActivationImportance.observe`."""
        self._sums[reader] = self._sums[reader] + values.abs().sum((0, 2)).double()
        self._counts[reader] += values.shape[0] * values.shape[2]

    def result(self, reader: Reader) -> Tensor:
        """See `ActivationImportance.result`."""
        return (self._sums[reader] / self._counts[reader]).float()


IMPORTANCES = {METHOD.name: ActivationMean}
