"""A network of 47 MB, for measuring alone: ResNet-18 with random weights, 224², noise for data."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset
from torchvision.models import resnet18

from autocompress.tasks import Task, UnlabelledTask


def task() -> Task:
    """Return the network with a hundred samples of noise; nothing it says means anything."""
    torch.manual_seed(0)
    data = [TensorDataset(torch.randn(count, 3, 224, 224)) for count in (64, 64)]
    return UnlabelledTask(resnet18().eval(), *data, outputs="classes", name="resnet18-random")
