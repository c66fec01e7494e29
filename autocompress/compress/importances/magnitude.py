"""Magnitude of weights, L1 or L2: the control that is hard to beat."""

from __future__ import annotations

import torch_pruning as tp
from torch import Tensor

from autocompress.catalogue import Method
from autocompress.compress.importances.base import Importance, Subject, each_group

_LI, _HAN = "Li et al., Pruning filters for efficient ConvNets, ICLR 2017", "Han et al., NeurIPS 2015"
METHODS = (
    Method("magnitude", "importance", "L2 norm of a channel's weights, relative to its group's mean", _LI),
    Method("magnitude_l1", "importance", "L1 norm of a channel's weights, relative to its group's mean", _LI),
    Method("magnitude_global", "importance", "L2 norm of a channel's weights, groups compared as they are", _HAN),
    Method("magnitude_l1_global", "importance", "L1 norm of a channel's weights, groups compared as they are", _HAN),
)


class Magnitude(Importance):
    """Sum of ``|w|^p`` of a channel, averaged over its layers.

    The power is what adds up over layers; it orders the channels of one layer as the norm does.

    Args:
        p: 1 or 2.
    """

    def __init__(self, p: int) -> None:
        self.p = p

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Importance.scores`."""
        return each_group(subject, tp.importance.GroupMagnitudeImportance(p=self.p, normalizer=None))


class GlobalMagnitude(Magnitude):
    """The same, unnormalised: where groups are compared, those of small weights lose most of their channels."""

    compares = True


IMPORTANCES = {
    "magnitude": lambda: Magnitude(2),
    "magnitude_l1": lambda: Magnitude(1),
    "magnitude_global": lambda: GlobalMagnitude(2),
    "magnitude_l1_global": lambda: GlobalMagnitude(1),
}
