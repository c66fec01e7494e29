"""Second order: the loss without a weight, by the diagonal of the empirical Fisher matrix."""

from __future__ import annotations

import torch
import torch_pruning as tp
from torch import Tensor

from autocompress.catalogue import Method
from autocompress.compress.importances.base import Importance, Subject, each_group

METHOD = Method(
    "fisher",
    "importance",
    "weight² x mean squared gradient of single samples (diagonal Hessian)",
    "LeCun et al., Optimal brain damage, 1990; Theis et al., Fisher pruning, 2018",
)


class Fisher(Importance):
    """Sum over a channel's weights of ``w² x E[g²]``, g the gradients of 256 single samples.

    At a minimum the mean of squared gradients of single samples, the diagonal of the empirical Fisher matrix, stands
    for the diagonal of the Hessian; the gradient of a batch, squared, does not. (Torch-Pruning 1.6's own
    `accumulate_grad` keeps the last gradient alone, so gradients are gathered here.)
    """

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Importance.scores`."""
        found = subject.gradients(torch.square, batch_size=1, batches=256)
        return each_group(subject, tp.importance.GroupHessianImportance(normalizer=None), found)


IMPORTANCES = {METHOD.name: Fisher}
