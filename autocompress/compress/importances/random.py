"""Random order: the control that every importance must beat."""

from __future__ import annotations

import torch_pruning as tp
from torch import Tensor

from autocompress.catalogue import Method
from autocompress.compress.importances.base import Importance, Subject, each_group

METHOD = Method(
    "random", "importance", "the control: another order at every call", "Mittal et al., WACV 2018: it does well"
)


class Random(Importance):
    """Uniform in [0, 1), from torch's generator."""

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Importance.scores`."""
        return each_group(subject, tp.importance.RandomImportance())


IMPORTANCES = {METHOD.name: Random}
