"""A small synthetic task that a network learns in seconds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from autocompress.tasks import ClassificationTask


class Net(nn.Module):
    """Two convolutions with batch-norm on ``(N, 1, 8, 8)``, four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        return self.fc(functional.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def bars(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bars of four directions in noise: ``(count, 1, 8, 8)`` and their classes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.zeros(4, 8, 8)
    shapes[0, 3:5], shapes[1, :, 3:5] = 1, 1
    shapes[2], shapes[3] = torch.eye(8), torch.eye(8).flip(0)
    targets = torch.randint(4, (count,), generator=generator)
    return shapes[targets][:, None] * 2 + torch.randn(count, 1, 8, 8, generator=generator) * 0.5, targets


def untrained(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().eval()


@pytest.fixture(scope="session")
def task() -> ClassificationTask:
    """A task whose model has been trained on its labels."""
    model, (inputs, targets) = untrained(), bars(640, 0)
    optimizer = torch.optim.Adam(model.train().parameters(), 0.01)
    for _ in range(5):
        for x, y in zip(inputs.split(64), targets.split(64), strict=True):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return ClassificationTask(model, bars(640, 0), bars(128, 1), bars(128, 2), name="bars", calibration_size=128)
