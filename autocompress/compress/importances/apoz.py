"""APoZ, average percentage of zeros: channels that a ReLU mostly silences."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from autocompress.catalogue import Method
from autocompress.compress.importances.activation_mean import ActivationMean
from autocompress.compress.importances.activations import Reader
from autocompress.compress.importances.base import Subject, relative

METHOD = Method(
    "apoz",
    "importance",
    "share of activations that are not zero, over calibration data",
    "Hu et al., Network trimming, 2016",
)


class Apoz(ActivationMean):
    """1 - APoZ: the share of activations that are not zero.

    Behind functions that have no zeros (SiLU, GELU) it says nothing; such groups are ordered by the mean activation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[Reader, Tensor] = defaultdict(lambda: torch.zeros(()))

    def observe(self, reader: Reader, values: Tensor, number: int) -> None:
        """See `ActivationImportance.observe`."""
        super().observe(reader, values, number)
        self._alive[reader] = self._alive[reader] + (values != 0).sum((0, 2)).double()

    def result(self, reader: Reader) -> Tensor:
        """See `ActivationImportance.result`."""
        return (self._alive[reader] / self._counts[reader]).float()

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Importance.scores`."""
        found = super().scores(subject)
        for name, scores in found.items():
            if bool((scores == 1).all()):
                subject.notes[name] = "none of its activations is ever zero; their mean was taken"
                readers = [reader for reader in self._alive if reader.group == name]
                found[name] = relative(torch.stack([super(Apoz, self).result(r) for r in readers]).mean(0))
        return found


IMPORTANCES = {METHOD.name: Apoz}
