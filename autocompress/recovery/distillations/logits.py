"""Outputs: the student's class probabilities, softened, are to be the teacher's (Hinton et al., 2015)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from autocompress.methods import Method
from autocompress.recovery.distillations.base import Distillation
from autocompress.recovery.places import Place

METHOD = Method(
    "logits",
    "distillation",
    "outputs of the uncompressed model matched, with temperature and alpha",
    "Hinton et al., Distilling the knowledge in a neural network, 2015",
)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the KL divergence of the softened outputs ``(N, classes)``, times temperature squared; lower is closer."""
    return temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.log_softmax(teacher / temperature, 1),
        log_target=True,
        reduction="batchmean",
    )


class Logits(Distillation):
    """The KL divergence of softened outputs."""

    intermediate = False

    def target(self, place: Place, teacher: Tensor) -> Tensor:
        """Return the outputs themselves."""
        return teacher.float()

    def loss(self, place: Place, student: Tensor, target: Tensor) -> Tensor:
        """Return `distillation_loss` at the configured temperature."""
        return distillation_loss(student, target, self.config.temperature)


DISTILLATIONS = {"logits": Logits}
