"""The best state of a training by the task's own metric, on as much of the validation data as its time allows."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from autocompress.errors import AutoCompressError, NotANumberError, TaskError
from autocompress.recovery.optimizers import state_of
from autocompress.tasks.base import Batch, Task

# Samples of one forward pass, and of an evaluation at most.
_BATCH, _MOST = 32, 2048
# Share of a training's time that one evaluation may take; at least one batch is evaluated.
_SHARE = 0.04
# Inputs are kept in memory up to this, else read again.
_MOST_BYTES = 256 * 2**20


class HeldOut:
    """Evaluates a network's states on the same samples and keeps the best one.

    Args:
        task: Gives validation data and the metric.
        dtype: What forward passes run in under autocast.
        seconds: Of the training whose states are compared.

    Attributes:
        before: Metric of the first state that was looked at; None where the task cannot measure.
        best: The highest of all states.
        seconds: What the last evaluation took.
        sample_seconds: What one sample's forward pass took then; 0 where nothing was evaluated.
    """

    def __init__(self, task: Task, dtype: torch.dtype, seconds: float) -> None:
        self._task, self._dtype = task, dtype
        self._allowed = _SHARE * seconds
        self._kept: list[Batch] | None = []
        self._samples = 0
        self._state: dict[str, Tensor] | None = None
        self.before: float | None = None
        self.best: float | None = None
        self.seconds = self.sample_seconds = 0.0

    def look(self, model: nn.Module) -> bool:
        """Evaluate a network in eval mode as it stands; return whether it is the best so far, a later one at a tie.

        The copy of the state is taken then. A task that cannot measure (no validation data, no labels) has no best.
        """
        started = time.monotonic()
        found = self._metric(model)
        self.seconds = time.monotonic() - started
        if found is None:
            return False
        found = found if math.isfinite(found) else -math.inf
        if self.best is not None and found < self.best:
            return False
        if self.before is None:
            self.before = found
        self.best = found
        self._state = state_of(model)
        return True

    def restore(self, model: nn.Module) -> None:
        """Give a network the best state; it stays as it is where there is none."""
        if self._state is not None:
            model.load_state_dict(self._state)

    def _metric(self, model: nn.Module) -> float | None:
        outputs, targets, spent = [], [], 0.0
        with torch.no_grad(), torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32):
            for inputs, target in self._batches():
                began = time.monotonic()
                outputs.append(model(inputs).float())
                spent += time.monotonic() - began
                targets.append(target)
        if not (samples := sum(map(len, targets))):
            return None
        self.sample_seconds = spent / samples
        try:
            return self._task.metric(torch.cat(outputs), torch.cat(targets))
        except NotANumberError:
            if self.before is None:
                raise
            return -math.inf  # training has spoiled this state
        except TaskError:
            raise
        except AutoCompressError:  # there is nothing to measure by
            return None

    def _batches(self) -> Iterator[Batch]:
        """Yield the samples; the first time those that there is time for."""
        if self._samples and self._kept is not None:
            yield from self._kept
            return
        most, count, started = self._samples or _MOST, 0, time.monotonic()
        for batch in self._task.validation(_BATCH):
            yield batch
            count += len(batch[0])
            if self._kept is not None and not self._samples:
                self._kept.append(batch)
                if sum(inputs.nbytes for inputs, _ in self._kept) > _MOST_BYTES:
                    self._kept = None
            if count >= most or (not self._samples and time.monotonic() - started > self._allowed):
                break
        self._samples = count
