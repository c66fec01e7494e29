"""Features: inner outputs of the student, linearly projected, are to be the teacher's (FitNets, Romero et al., 2015).

A projection is a 1x1 convolution (for tokens, a linear layer) from the student's channels to the teacher's, with a
bias. It learns along with the student and is thrown away after training. It starts as the least-squares solution, so
that the first steps teach the student, and a training that is interrupted goes on without it having been kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.catalogue import Method
from autocompress.config import RecoveryConfig
from autocompress.recovery.distillation_points import Place
from autocompress.recovery.distillations.base import Distillation, SoftenedDivergence

METHOD = Method(
    "features",
    "distillation",
    "inner outputs matched through learned 1x1 projections",
    "Romero et al., FitNets, ICLR 2015",
)
# Of the least-squares start: relative to the mean square of the student's channels; and rows looked at.
_RIDGE = 1e-4
_ROWS = 8192
# A teacher's output that never varies teaches nothing; without this its loss would be infinite.
_LEAST_VARIANCE = 1e-6


class Features(Distillation):
    """The squared error of the projected features over the teacher's variance: the share that is not explained.

    The variance makes places, and networks, comparable: FitNets' own loss, half the squared distance, is large where
    features are.
    """

    def __init__(
        self, config: RecoveryConfig, places: Sequence[Place], divergence: SoftenedDivergence | None = None
    ) -> None:
        super().__init__(config, places, divergence)
        self._weights = {p: nn.Parameter(torch.eye(p.teacher_channels, p.student_channels)) for p in self.places}
        self._biases = {p: nn.Parameter(torch.zeros(p.teacher_channels)) for p in self.places}

    def target(self, place: Place, teacher: Tensor) -> Tensor:
        """Return the output as it is, in half precision with the range of floats."""
        return teacher.to(torch.bfloat16)

    def loss(self, place: Place, student: Tensor, target: Tensor) -> Tensor:
        """Return the share of the target's variance, over the batch's positions, that the projection leaves."""
        wanted = place.rows(target).flatten(0, 1)
        found = F.linear(place.rows(student).flatten(0, 1), self._weights[place], self._biases[place])
        variance = (wanted - wanted.mean(0)).square().mean().clamp_min(_LEAST_VARIANCE)
        return (found - wanted).square().mean() / variance

    def start(self, place: Place, student: Tensor, teacher: Tensor) -> None:
        """Solve for the projection that is closest on these outputs."""
        given, wanted = (place.rows(output).flatten(0, 1) for output in (student, teacher))
        step = -(-len(given) // _ROWS)
        given, wanted = given[::step].double(), wanted[::step].double()
        means = given.mean(0), wanted.mean(0)
        given, wanted = given - means[0], wanted - means[1]
        gram = given.T @ given
        ridge = _RIDGE * gram.diagonal().mean() + torch.finfo(torch.float32).tiny
        weight = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), given.T @ wanted).T
        with torch.no_grad():
            self._weights[place].copy_(weight)
            self._biases[place].copy_(means[1] - weight @ means[0])

    def parameters(self) -> list[nn.Parameter]:
        """Return the projections' weights ``(teacher's channels, student's)`` and biases."""
        return [*self._weights.values(), *self._biases.values()]


DISTILLATIONS = {"features": Features}
