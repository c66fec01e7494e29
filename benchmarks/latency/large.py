"""A network of 47 MB, for measuring alone: ResNet-18 with random weights, 224², noise for data."""

from __future__ import annotations

import torch
from torchvision.models import resnet18

from autocompress.tasks import Task, UnlabelledTask


def task() -> Task:
    """Return the network with a hundred samples of noise; nothing it says means anything."""
    torch.manual_seed(0)
    return UnlabelledTask(
        resnet18().eval(), *torch.randn(2, 64, 3, 224, 224), outputs="classes", name="resnet18-random"
    )
