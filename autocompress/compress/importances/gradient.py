"""Magnitude of stochastic gradients: which channels training still wants to move."""

from __future__ import annotations

import torch
import torch_pruning as tp
from torch import Tensor

from autocompress.catalogue import Method
from autocompress.compress.importances.base import Importance, Subject, each_group

METHOD = Method(
    "gradient",
    "importance",
    "|gradient| of small training batches, averaged, without the weight itself",
    "the criterion that Evci et al., RigL, ICML 2020, grow connections by",
)


class StochasticGradient(Importance):
    """Sum over a channel's weights of the mean of ``|g|`` over 32 batches of 32 samples.

    The absolute value is taken batch by batch: at a minimum gradients cancel over the data, and their noise is what
    is left to see.
    """

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Importance.scores`."""
        found = subject.gradients(torch.abs, batch_size=32, batches=32)
        # The L1 norm of gradients that stand in the weights' place.
        with torch.no_grad():
            for name, parameter in subject.copy.named_parameters():
                if name in found:
                    parameter.copy_(found[name])
        return each_group(subject, tp.importance.GroupMagnitudeImportance(p=1, normalizer=None))


IMPORTANCES = {METHOD.name: StochasticGradient}
