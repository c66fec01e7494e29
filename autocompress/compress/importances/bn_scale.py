"""Batch-norm scale: the factor that a channel leaves its batch-norm with."""

from __future__ import annotations

import torch
import torch_pruning as tp
from torch import Tensor

from autocompress.catalogue import Method
from autocompress.compress.importances.base import Importance, Subject, relative

METHOD = Method(
    "bn_scale",
    "importance",
    "|scale| of a channel in its batch-norms, groups compared as they are",
    "Liu et al., Network slimming, ICCV 2017",
)


class BatchNormScale(Importance):
    """Mean of ``|scale|`` over the batch-norms of a channel.

    The paper trains with an L1 penalty on the scales first; this takes them as they are. A group without batch-norm
    is ordered by the L1 norm of its weights, as many times the mean scale of the other groups as it is its own mean.
    """

    compares = True

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Importance.scores`."""
        scale = tp.importance.BNScaleImportance(normalizer=None)
        weights = tp.importance.GroupMagnitudeImportance(p=1, normalizer=None)
        found = {name: scale(group) for name, group in subject.groups.items()}
        known = [scores for scores in found.values() if scores is not None]
        usual = torch.cat(known).mean() if known else torch.tensor(1.0)
        for name, scores in found.items():
            if scores is None:
                subject.notes[name] = "it has no batch-norm with a scale; the L1 norm of its weights was taken"
                found[name] = usual * relative(weights(subject.groups[name]))
        return {name: scores.detach().float() for name, scores in found.items()}


IMPORTANCES = {METHOD.name: BatchNormScale}
