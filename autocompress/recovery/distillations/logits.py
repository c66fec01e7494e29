"""Outputs: the student is to give what the teacher gives, by the task's divergence (Hinton et al., 2015)."""

from __future__ import annotations

from torch import Tensor

from autocompress.catalogue import Method
from autocompress.recovery.distillation_points import Place
from autocompress.recovery.distillations.base import Distillation

METHOD = Method(
    "logits",
    "distillation",
    "outputs matched by the task's divergence, with temperature and alpha",
    "Hinton et al., Distilling the knowledge in a neural network, 2015",
)


class Logits(Distillation):
    """The task's divergence of the outputs."""

    intermediate = False

    def target(self, place: Place, teacher: Tensor) -> Tensor:
        """Return the outputs themselves."""
        return teacher.float()

    def loss(self, place: Place, student: Tensor, target: Tensor) -> Tensor:
        """Return the divergence, of class scores at the configured temperature."""
        return self.divergence(student, target, self.config.temperature)


DISTILLATIONS = {"logits": Logits}
