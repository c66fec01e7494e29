"""Geometric median: filters that the others of their layer can stand in for go first."""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.catalogue import Method
from autocompress.compress.importances.base import Importance, Subject
from autocompress.errors import CompressionError
from autocompress.model.inventory import CONVOLUTIONS

METHOD = Method(
    "geometric_median",
    "importance",
    "sum of a filter's distances to the others of its layer (FPGM)",
    "He et al., Filter pruning via geometric median, CVPR 2019",
)


class GeometricMedian(Importance):
    """Sum of Euclidean distances from a filter to all others of its layer, averaged over the group's producers.

    As in the paper, only the layers that make the channels count, not those that read them. (Torch-Pruning 1.6's own
    FPGM takes distances of the squared weights, in which a filter and its negative are one; hence not used.)
    """

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Importance.scores`."""
        found = {}
        for name, group in subject.groups.items():
            about = subject.inventory.groups[name]
            total, layers = torch.zeros(about.channels, dtype=torch.float64), 0
            for item in group.items:
                layer = item.dep.target.module
                if not isinstance(layer, (*CONVOLUTIONS, torch.nn.Linear)):
                    continue
                if not subject.graph.is_out_channel_pruning_fn(item.dep.handler):
                    continue
                # In doubles: equal filters must come out at distance 0 from a product of matrices.
                filters = layer.weight.detach()[item.idxs].flatten(1).double()
                total.index_add_(0, torch.tensor(item.root_idxs), torch.cdist(filters, filters).sum(1))
                layers += 1
            if not layers:
                raise CompressionError(f"Importance {subject.method!r}: group {name!r} has no layer with filters.")
            found[name] = (total / layers).float()
        return found


IMPORTANCES = {METHOD.name: GeometricMedian}
