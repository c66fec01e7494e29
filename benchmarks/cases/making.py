"""What the cases are made of: images of gratings, a plain network, training that lasts seconds and is kept, tasks."""

from __future__ import annotations

import copy
import hashlib
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress import ClassificationTask, Task
from autocompress.environment import cache_directory
from autocompress.tasks.cache import store

Data = tuple[Tensor, Tensor]
# Samples of the three data sets.
SIZES = {"train": 1500, "validation": 500, "test": 800}
CLASSES = 6
# Samples of every data set, and no training, while a test makes the cases; None for cases of full size.
_FEW: ContextVar[int | None] = ContextVar("few", default=None)
# Training steps over which the learning rate rises.
_WARMUP = 8


@contextmanager
def few_samples(count: int | None = 48) -> Iterator[None]:
    """Make every case with so many samples a data set, and without training, inside the block; None: as it is."""
    token = _FEW.set(count)
    try:
        yield
    finally:
        _FEW.reset(token)


def sizes(**full: int) -> dict[str, int]:
    """Return samples by data set: those given, else `SIZES`, or those of `few_samples`."""
    few = _FEW.get()
    return {split: few or size for split, size in (full or SIZES).items()}


def gratings(count: int, seed: int, *, classes: int = CLASSES, noise: float = 2.2) -> Data:
    """Return images ``(N, 3, 24, 24)`` of sine gratings under noise, and their orientations ``(N,)``."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, classes, (count,), generator=generator)
    angle = targets * math.pi / classes
    phase = 2 * math.pi * torch.rand(count, generator=generator)
    at = torch.arange(24).float()
    along = torch.cos(angle)[:, None, None] * at[None, :, None] + torch.sin(angle)[:, None, None] * at[None, None, :]
    images = torch.sin(0.9 * along + phase[:, None, None])[:, None].repeat(1, 3, 1, 1)
    return images + noise * torch.randn(images.shape, generator=generator), targets


class Plain(nn.Module):
    """Three convolutions and a linear layer, without a fault of its own."""

    def __init__(self, outputs: int = CLASSES) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 48, 5, padding=2), nn.BatchNorm2d(48)
        self.b, self.nb = nn.Conv2d(48, 64, 3, 2, 1), nn.BatchNorm2d(64)
        self.c, self.nc = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))))
        scores: Tensor = self.fc(F.relu(self.nc(self.c(x))).mean((2, 3)))
        return scores


def fit(
    model: nn.Module,
    data: Data,
    key: str,
    *,
    steps: int = 80,
    rate: float = 2e-3,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> nn.Module:
    """Train for seconds and return the model in eval mode; later calls load the same weights from the cache."""
    if _FEW.get() is not None:
        return model.eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    digest = hashlib.sha256(repr((key, steps, rate, shapes)).encode()).hexdigest()[:12]
    name = f"cases/{key}-{digest}.pt"
    if (cache_directory() / name).exists():
        model.load_state_dict(torch.load(cache_directory() / name, weights_only=True))
        return model.eval()
    inputs, targets = data
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / _WARMUP) * (1 - step / steps)
        rows = torch.randint(0, len(inputs), (48,), generator=generator)
        outputs = model(inputs[rows].clone())
        optimizer.zero_grad()
        loss(outputs[0] if isinstance(outputs, tuple) else outputs, targets[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    written = io.BytesIO()
    torch.save(model.state_dict(), written)
    store(name, written.getvalue())
    return model.eval()


def fitted(network: Callable[[], nn.Module], key: str) -> nn.Module:
    """Return a network trained on the gratings."""
    torch.manual_seed(0)
    return fit(network(), gratings(sizes()["train"], seed=1), key)


def images_task(
    model: nn.Module, name: str, data: Callable[[int, int], Data] = gratings, **options: Any
) -> ClassificationTask:
    """Return the usual task: a classifier of images."""
    splits = {split: data(count, seed) for seed, (split, count) in enumerate(sizes().items(), 1)}
    return ClassificationTask(model, **splits, name=name, **options)


class TensorTask(Task):
    """A task of the user's own on tensors; metric and loss are its subclasses'.

    Args:
        model: Trained.
        data: By data set.
    """

    metric_name = "metric"

    def __init__(self, model: nn.Module, data: dict[str, Data]) -> None:
        self._model, self._data = model, data

    def model(self) -> nn.Module:
        return copy.deepcopy(self._model).eval()

    def _batches(self, split: str, size: int, order: Tensor | None = None) -> Iterator[Data]:
        inputs, targets = self._data[split]
        for rows in (torch.arange(len(inputs)) if order is None else order).split(size):
            yield inputs[rows], targets[rows]

    def example_inputs(self, batch_size: int = 1) -> Tensor:
        return self._data["train"][0][:batch_size]

    def calibration(self, batch_size: int) -> Iterator[Tensor]:
        for inputs, _ in self._batches("train", batch_size, torch.arange(min(512, self.train_size()))):
            yield inputs

    def train_batches(self, batch_size: int, epoch: int) -> Iterator[Data]:
        order = torch.randperm(self.train_size(), generator=torch.Generator().manual_seed(epoch))
        yield from self._batches("train", batch_size, order)

    def train_size(self) -> int:
        return len(self._data["train"][0])

    def validation(self, batch_size: int) -> Iterator[Data]:
        yield from self._batches("validation", batch_size)

    def test(self, batch_size: int) -> Iterator[Data]:
        yield from self._batches("test", batch_size)

    def fingerprint(self) -> dict[str, Any]:
        return {"task": self.name}
