"""The task's own loss on labels beside what the teacher says, where there are labels and a loss that fits them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from autocompress.errors import TaskError
from autocompress.tasks.base import Task
from autocompress.tasks.divergence import ClassScores


class LabelLoss:
    """A task's loss on labels, on the scale of its divergence.

    Squared errors of prices and of angles are of any size. So that `RecoveryConfig.alpha` means the same for each, the
    loss is scaled by how much both say is lost when a network answers every sample alike. Cross-entropy stays as it is.

    Args:
        task: Gives the loss.
        on_message: Called with why labels are not used, where a loss says so by failing.
    """

    def __init__(self, task: Task, on_message: Callable[[str], None] = lambda text: None) -> None:
        self._task, self._on_message = task, on_message
        scores = not task.has_own_divergence and isinstance(task.found_divergence(), ClassScores)
        self._scale: float | None = 1.0 if scores else None
        # The default, cross-entropy, is of class scores on axis 1; of anything else it would be a number without sense.
        default = not task.has_own_loss
        self.used = task.labelled and (not default or task.found_divergence() == ClassScores())

    def __call__(self, outputs: Tensor, targets: Tensor, reference: Callable[[], Tensor]) -> Tensor | None:
        """Return the scaled loss of outputs ``(N, ...)`` for labels ``(N, ...)``, or None where there is none.

        Args:
            outputs: Of the student.
            targets: Labels.
            reference: Gives the teacher's outputs for the same inputs.
        """
        if not self.used:
            return None
        try:
            loss = self._task.loss(outputs, targets)
            if self._scale is None:
                self._scale = self._measured(targets, reference().float())
        except Exception as error:  # noqa: BLE001 - the user's loss, on the user's labels
            self.used = False
            # The guard of a user's task has named the loss already.
            own = isinstance(error, TaskError)
            said = str(error) if own else f"the task's loss raised {type(error).__name__}: {error}"
            self._on_message(f"Labels are not learned from: {said}")
            return None
        return self._scale * loss

    @torch.no_grad()
    def _measured(self, targets: Tensor, reference: Tensor) -> float:
        alike = reference.mean(0, keepdim=True).expand_as(reference).contiguous()
        moved = float(self._task.divergence(alike, reference))
        lost = float(self._task.loss(alike, targets)) - float(self._task.loss(reference, targets))
        scale = moved / lost if lost > 0 else 1.0
        return scale if math.isfinite(scale) and scale > 0 else 1.0
