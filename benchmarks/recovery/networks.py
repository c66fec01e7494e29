"""Small trained networks with every kind of output, on synthetic data that they learn in seconds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.tasks import Adapter, Batch, LabelFreeTask, Task

Metric = Callable[[Tensor, Tensor], float]
Loss = Callable[[Tensor, Tensor], Tensor]
Split = tuple[Tensor, Tensor]
_STEPS, _RATE, _BATCH = 250, 3e-3, 64


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Return the share of right classes, without targets of 255."""
    known = targets != 255
    return float((outputs.argmax(1) == targets)[known].double().mean())


def r2(outputs: Tensor, targets: Tensor) -> float:
    """Return the share of the targets' variance that is explained."""
    error = (outputs - targets).square().sum()
    return float(1 - error / (targets - targets.mean(0)).square().sum())


def f1(outputs: Tensor, targets: Tensor) -> float:
    """Return micro F1 of scores above 0."""
    found, wanted = outputs > 0, targets > 0.5
    return float(2 * (found & wanted).sum() / (found.sum() + wanted.sum()).clamp_min(1))


@dataclass
class Case(Task):
    """One network with its data, trained when it is made.

    Attributes:
        name: Of the kind of output.
        network: Trained from here on.
        data: Gives ``count`` samples of a seed.
        quality, training_loss: The task's metric and loss.
        outputs: See `Task`.
        metric_name: For the table.
        samples: Of the training data.
    """

    name: str
    network: nn.Module
    data: Callable[[int, int], Split]
    quality: Metric
    training_loss: Loss
    outputs: str | Mapping[str, str] = "classes"
    metric_name: str = "accuracy"
    samples: int = 2000

    def __post_init__(self) -> None:
        self._parts = {"train": self.data(2000, 1), "validation": self.data(600, 2), "test": self.data(2000, 3)}
        optimizer = torch.optim.AdamW(self.network.train().parameters(), _RATE)
        x, y = self._parts["train"]
        generator = torch.Generator().manual_seed(0)
        for step in range(_STEPS):
            optimizer.param_groups[0]["lr"] = _RATE * min(1, (step + 1) / 20) * (1 - step / _STEPS)
            rows = torch.randint(len(x), (_BATCH,), generator=generator)
            optimizer.zero_grad()
            self.training_loss(self.network(x[rows]), y[rows]).backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            optimizer.step()
        self.network.eval()
        self._parts["train"] = x[: self.samples], y[: self.samples]

    def model(self) -> nn.Module:
        """See `Task.model`."""
        return copy.deepcopy(self.network)

    def example_inputs(self, batch_size: int = 1) -> Tensor:
        """See `Task.example_inputs`."""
        return self._parts["train"][0][:batch_size]

    def calibration(self, batch_size: int) -> Iterator[Tensor]:
        """See `Task.calibration`."""
        yield from torch.split(self._parts["train"][0][:512], batch_size)

    def train_batches(self, batch_size: int, epoch: int) -> Iterator[Batch]:
        """See `Task.train_batches`."""
        x, y = self._parts["train"]
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for rows in torch.split(order, batch_size):
            if len(rows) == batch_size:
                yield x[rows], y[rows]

    def train_size(self) -> int:
        """See `Task.train_size`."""
        return len(self._parts["train"][0])

    def validation(self, batch_size: int) -> Iterator[Batch]:
        """See `Task.validation`."""
        return self._batches("validation", batch_size)

    def test(self, batch_size: int) -> Iterator[Batch]:
        """See `Task.test`."""
        return self._batches("test", batch_size)

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        """See `Task.metric`."""
        return self.quality(outputs, targets)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Task.loss`."""
        return self.training_loss(outputs, targets)

    def fingerprint(self) -> Mapping[str, str | int | float]:
        """See `Task.fingerprint`."""
        return {"task": self.name}

    def _batches(self, part: str, size: int) -> Iterator[Batch]:
        x, y = self._parts[part]
        yield from zip(torch.split(x, size), torch.split(y, size), strict=True)


# -- data -------------------------------------------------------------------------------------------------------------


def gratings(count: int, seed: int, classes: int = 6, size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Return images ``(N, 1, size, size)`` of sine gratings in noise, their angles and their classes."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (count,), generator=g)
    angle = (y + 0.6 * torch.rand(count, generator=g)) * math.pi / classes
    i = torch.arange(size).float()
    u = angle.cos()[:, None, None] * i[None, :, None] + angle.sin()[:, None, None] * i
    x = torch.sin(0.9 * u + 6.28 * torch.rand(count, 1, 1, generator=g))[:, None]
    return x + 1.5 * torch.randn(x.shape, generator=g), angle, y


def discs(count: int, seed: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Return images of a disc in noise and which pixels are in it."""
    g = torch.Generator().manual_seed(seed)
    centre, radius = torch.rand(count, 2, 1, 1, generator=g) * size, 2 + 4 * torch.rand(count, 1, 1, generator=g)
    i = torch.arange(size).float()
    inside = (i[:, None] - centre[:, 0]) ** 2 + (i - centre[:, 1]) ** 2 < radius**2
    return inside.float()[:, None] + 0.8 * torch.randn(count, 1, size, size, generator=g), inside.long()


def labelled_pixels(count: int, seed: int) -> Split:
    """Return discs whose first rows nobody labelled."""
    x, y = discs(count, seed)
    y[:, :2] = 255
    return x, y


def words(count: int, seed: int, length: int = 16) -> tuple[Tensor, Tensor]:
    """Return token numbers, as floats, and for each whether its word or the one before it is odd."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 60, (count, length), generator=g)
    return x.float(), (x % 2) + 2 * (x.roll(1, 1) % 3 == 0).long()


def tabular(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return 16 features and 3 numbers of them, of scales from 0.1 to 100."""
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(count, 16, generator=g), torch.randn(16, 3, generator=torch.Generator().manual_seed(9))
    y = torch.tanh(x @ w / 2) + 0.5 * x[:, :3] * x[:, 3:6] + 0.05 * torch.randn(count, 3, generator=g)
    return x, y * torch.tensor([0.1, 1.0, 100.0])


# -- networks ---------------------------------------------------------------------------------------------------------


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch-norm, ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def convolutional(outputs: int, *last: nn.Module) -> nn.Sequential:
    """Images to `outputs` numbers."""
    body = block(1, 24), block(24, 48, 2), block(48, 48), block(48, 64, 2)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, outputs), *last)


def to_maps(outputs: int) -> nn.Sequential:
    """Images to maps of the same size."""
    return nn.Sequential(block(1, 24), block(24, 48), block(48, 24), nn.Conv2d(24, outputs, 1))


def perceptron(outputs: int) -> nn.Sequential:
    """Features to numbers; no norm."""
    return nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, outputs))


class Unit(nn.Module):
    """Makes vectors of length 1."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return F.normalize(x, dim=1)


class Transformer(nn.Module):
    """Token numbers to class scores of every position, classes last."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(60, width), nn.Parameter(0.1 * torch.randn(16, width))
        self.norm1, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm2, self.wide, self.narrow = nn.LayerNorm(width), nn.Linear(width, 192), nn.Linear(192, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        h = self.tokens(x.long()) + self.places
        n = self.norm1(h)
        h = h + self.attention(n, n, n, need_weights=False)[0]
        h = h + self.narrow(F.gelu(self.wide(self.norm2(h))))
        return self.head(h)


class Heads(nn.Module):
    """Where a disc is, in pixels, and whether it is large: two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(1, 24), block(24, 48, 2), block(48, 48, 2), nn.Flatten())
        self.where, self.large = nn.Linear(48 * 16, 2), nn.Linear(48 * 16, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """See the class."""
        h = self.body(x)
        return {"where": 16 * self.where(h), "large": self.large(h)}


def disc_heads(count: int, seed: int) -> Split:
    """Return discs with centre of mass and size ``(N, 3)``."""
    x, y = discs(count, seed)
    i, mass = torch.arange(16).float(), y.sum((1, 2)).clamp_min(1)
    centre = torch.stack([(y * i[:, None]).sum((1, 2)) / mass, (y * i).sum((1, 2)) / mass], 1)
    return x, torch.cat([centre, (mass > 40).float()[:, None]], 1)


def heads_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return squared error of pixels and cross-entropy."""
    return F.mse_loss(outputs[:, :2], targets[:, :2]) / 10 + F.cross_entropy(outputs[:, 2:], targets[:, 2].long())


def heads_quality(outputs: Tensor, targets: Tensor) -> float:
    """Return the mean of R2 and accuracy."""
    return (r2(outputs[:, :2], targets[:, :2]) + accuracy(outputs[:, 2:], targets[:, 2].long())) / 2


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return cross-entropy without what nobody labelled."""
    return F.cross_entropy(outputs, targets, ignore_index=255)


def case(name: str, network: nn.Module, data: Any, quality: Metric, loss: Loss, **options: Any) -> Task:
    """Return a trained case."""
    return Case(name, network, data, quality, loss, **options)


def _classes(count: int, seed: int) -> Split:
    x, _, y = gratings(count, seed)
    return x, y


def _angles(count: int, seed: int) -> Split:
    x, angle, _ = gratings(count, seed)
    return x, angle.sin()


def _column(count: int, seed: int) -> Split:
    x, y = tabular(count, seed)
    return x, y[:, 2:]


def _labels(count: int, seed: int) -> Split:
    x, angle, y = gratings(count, seed)
    return x, torch.stack([y % 2, y > 2, angle.sin() > 0.7, angle.cos() > 0.3, y == 4], 1).float()


def _denoise(count: int, seed: int) -> Split:
    x, y = discs(count, seed)
    return x, y[:, None].float() * 5


def _token_quality(outputs: Tensor, targets: Tensor) -> float:
    return accuracy(outputs.movedim(-1, 1), targets)


def _token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.movedim(-1, 1), targets)


def _metric_learning(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return a loss that brings embeddings of one class together."""
    alike = outputs @ outputs.T / 0.2
    same = (targets[:, None] == targets).float().fill_diagonal_(0)
    wanted = same / same.sum(1, keepdim=True).clamp_min(1)
    return F.cross_entropy(alike.masked_fill(torch.eye(len(alike)).bool(), -9.0), wanted)


def _embedding() -> Task:
    inner = case("", convolutional(32, Unit()), _classes, lambda o, t: 0.0, _metric_learning, outputs="values")
    made = LabelFreeTask(inner, "cosine")
    made.name = "embeddings, no labels"
    return made


def _mse(factor: float) -> Loss:
    return lambda outputs, targets: F.mse_loss(outputs, targets) / factor


KINDS: tuple[Callable[[], Task], ...] = (
    lambda: case("class scores", convolutional(6), _classes, accuracy, cross_entropy),
    lambda: case("class scores, 120 samples", convolutional(6), _classes, accuracy, cross_entropy, samples=120),
    lambda: case("class scores of pixels", to_maps(2), labelled_pixels, accuracy, cross_entropy),
    lambda: case(
        "class scores of tokens, last axis", Transformer(), words, _token_quality, _token_loss, outputs="classes_last"
    ),
    lambda: case(
        "labels", convolutional(5), _labels, f1, F.binary_cross_entropy_with_logits, outputs="values", metric_name="F1"
    ),
    lambda: case(
        "regression (N,)", convolutional(1, nn.Flatten(0)), _angles, r2, F.mse_loss, outputs="values", metric_name="R2"
    ),
    lambda: case("regression (N, 1), said to be classes", perceptron(1), _column, r2, _mse(1e3), metric_name="R2"),
    lambda: case(
        "regression (N, 3), three scales", perceptron(3), tabular, r2, _mse(1e3), outputs="values", metric_name="R2"
    ),
    lambda: case("maps of numbers", to_maps(1), _denoise, r2, F.mse_loss, outputs="values", metric_name="R2"),
    _embedding,
    lambda: case(
        "two outputs", Adapter(Heads()), disc_heads, heads_quality, heads_loss, outputs="values",
        metric_name="(R2 + accuracy) / 2",
    ),
)  # fmt: skip
