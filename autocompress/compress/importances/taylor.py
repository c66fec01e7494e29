"""First-order Taylor expansion of the loss: what it changes by, to first order, without a channel's weights."""

from __future__ import annotations

import torch
import torch_pruning as tp
from torch import Tensor

from autocompress.catalogue import Method
from autocompress.compress.importances.base import Importance, Subject, each_group

METHOD = Method(
    "taylor",
    "importance",
    "|weight x gradient| of the training loss, summed over a channel's weights",
    "Molchanov et al., Importance estimation for neural network pruning, CVPR 2019",
)


class Taylor(Importance):
    """Sum of ``|w x g|`` over a channel's weights, g the mean gradient over 1,024 training samples.

    Torch-Pruning leaves batch-norm out of it, and so do we.
    """

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Importance.scores`."""
        found = subject.gradients(torch.clone, batch_size=128, batches=8)
        return each_group(subject, tp.importance.GroupTaylorImportance(normalizer=None), found)


IMPORTANCES = {METHOD.name: Taylor}
