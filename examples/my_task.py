"""A task of your own, in ten lines: ``autocompress search --task examples.my_task:blobs --target-latency 0.5x``."""

import torch
from torch import nn

from autocompress.tasks import ClassificationTask


def blobs() -> ClassificationTask:
    """Return a small network that tells three clouds of points apart; put your own model and data here."""
    torch.manual_seed(0)  # a resumed search must find the same model and data
    targets = torch.randint(3, (3000,))
    inputs = torch.randn(3000, 16) + targets[:, None]
    model = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[:2000]), targets[:2000]).backward()
        optimizer.step()
    return ClassificationTask(model, train=(inputs[:2000], targets[:2000]), test=(inputs[2000:], targets[2000:]))
