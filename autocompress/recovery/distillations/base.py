"""The `Distillation` interface: one loss between what a teacher and a student give at the same places."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from autocompress.config import RecoveryConfig
from autocompress.recovery.distillation_points import Place
from autocompress.tasks.divergence import ClassScores

# Of a student's outputs, the teacher's, and a temperature: see `Task.softened_divergence`.
SoftenedDivergence = Callable[[Tensor, Tensor, float], Tensor]


class Distillation(abc.ABC):
    """One way in which a student is to be like its teacher.

    Args:
        config: Temperature.
        places: Where the two are compared; of methods that are `intermediate` those that `suits` lets through.
        divergence: How far outputs are apart, as the task says.

    Attributes:
        intermediate: Whether it compares places inside the networks; else their outputs alone.
        weight: Of its loss where the run file gives none.
    """

    intermediate: bool = True
    weight: float = 1.0

    def __init__(
        self, config: RecoveryConfig, places: Sequence[Place], divergence: SoftenedDivergence | None = None
    ) -> None:
        self.config = config
        self.divergence = divergence or ClassScores()
        self.places = tuple(places)

    @staticmethod
    def suits(place: Place) -> bool:
        """Return whether there is something to compare at a place."""
        return True

    @abc.abstractmethod
    def target(self, place: Place, teacher: Tensor) -> Tensor:
        """Return what is kept of the teacher's output ``(N, ...)``: as much as the loss needs, ``(N, ...)``."""

    @abc.abstractmethod
    def loss(self, place: Place, student: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss of a student's output ``(N, ...)``, a mean over samples; lower is closer."""

    def start(self, place: Place, student: Tensor, teacher: Tensor) -> None:  # noqa: B027 - most learn nothing
        """Set what the method learns for a place from both networks' outputs ``(N, ...)`` before training."""

    def parameters(self) -> list[nn.Parameter]:
        """Return what is learned beside the student, and thrown away after training."""
        return []
