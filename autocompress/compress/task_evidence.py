"""Importance of channels by a task's data: what the methods of `importances` are given to judge by."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from autocompress.compress.importance import ChannelScores, score_channels
from autocompress.compress.importances.base import Evidence
from autocompress.model.inventory import Inventory
from autocompress.tasks.base import Task

_BATCH = 256
# Training samples read at once; the largest batch whose loss one may ask for.
_LOSS_BATCH = 128


def channel_scores(task: Task, base: nn.Module, inventory: Inventory, importance: str) -> ChannelScores:
    """Return the importance of every group's channels, as `compress.score_channels`, by a task's data."""

    def losses(batch_size: int) -> Iterator[Tensor]:
        # A task may refuse batches of one sample, which no batch-norm can train on.
        for inputs, targets in task.train_batches(_LOSS_BATCH, 0):
            for x, y in zip(torch.split(inputs, batch_size), torch.split(targets, batch_size), strict=True):
                yield task.loss(base(x), y)

    def outputs() -> Iterator[Tensor]:
        for inputs in task.calibration(_BATCH):
            with torch.no_grad():
                found = base(inputs)
            yield found

    return score_channels(base, task.example_inputs(2), inventory, importance, Evidence(losses, outputs))
