"""LAMP: magnitude relative to all that would still be there when a channel's turn comes."""

from __future__ import annotations

import torch_pruning as tp
from torch import Tensor

from autocompress.catalogue import Method
from autocompress.compress.importances.base import Importance, Subject, each_group

METHOD = Method(
    "lamp",
    "importance",
    "squared L2 norm over those of all channels as large, for a global threshold",
    "Lee et al., Layer-adaptive sparsity for the magnitude-based pruning, ICLR 2021",
)


class Lamp(Importance):
    """Squared norm of a channel over the sum of those of its group that are not smaller.

    The paper scores single weights; here the squared L2 norm of a channel, averaged over its layers, takes the weight's
    place, as in Torch-Pruning. Within a group the order is that of `magnitude`: what LAMP decides is how groups
    compare, that is, the ratios of a global threshold. The largest channel of every group scores 1.
    """

    compares = True

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Importance.scores`."""
        # Where a whole group is zero, 0 / 0: its channels are worth nothing.
        return {n: s.nan_to_num(0.0) for n, s in each_group(subject, tp.importance.LAMPImportance()).items()}


IMPORTANCES = {METHOD.name: Lamp}
