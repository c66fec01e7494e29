"""Sequences: a line of digits read by a CRNN, and a signal cut into its kinds by a temporal convolutional network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress import Task
from autocompress.config import TaskConfig
from benchmarks.strangers.tasks import drawing
from benchmarks.strangers.tasks.arrays import ArrayTask, drawn
from benchmarks.strangers.tasks.trained import Recipe, trained


def scores_per_position(outputs: Tensor, targets: Tensor) -> float:
    """Return the share of positions ``(N, T)`` whose highest score ``(N, classes, T)`` is the right one's."""
    return float((outputs.argmax(1) == targets).double().mean())


class CRNN(nn.Module):
    """Convolutions down to a row of features, a bidirectional LSTM along it, scores at every position."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for out, pool in ((24, (2, 2)), (48, (2, 2)), (96, (2, 1)), (128, (2, 1))):
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            layers += [nn.MaxPool2d(pool)]
            channels = out
        self.features = nn.Sequential(*layers)
        self.lstm = nn.LSTM(channels * 2, 96, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * 96, classes)

    def forward(self, line: Tensor) -> Tensor:
        """Map lines ``(N, 1, 32, 128)`` to scores ``(N, classes, 32)``."""
        features = self.features(line).flatten(1, 2).transpose(1, 2)
        return self.head(self.lstm(features)[0]).transpose(1, 2)


def _lines(part: str, n: int) -> tuple[Tensor, Tensor]:
    """Return grey lines ``(n, 1, 32, 128)`` of up to eight digits, and the class of every fourth column ``(n, 32)``.

    Class 0 is no digit, others are the digit + 1. They stand at irregular distances, on photographs.
    """
    generator = drawing.generator_of(part, 8)
    images, classes = drawing.digits(part)
    line = 0.28 + 0.45 * drawing.photograph_crops(n, 128, part, generator)[:, :, 48:80]
    labels = torch.zeros(n, 128, dtype=torch.int64)
    edge = drawing.uniform(generator, n, 0, 12)
    for _ in range(8):
        width = drawing.uniform(generator, n, 13, 19)
        there = (torch.rand(n, generator=generator) < 0.85) & (edge + width < 128)
        chosen = torch.randint(len(images), (n,), generator=generator)
        x, half = edge + width / 2, width * 0.72
        y = 16 + drawing.uniform(generator, n, -3, 3)
        mask = drawing.warped(images[chosen], (32, 128), torch.stack([x, y, half], 1), generator)
        mask = mask * there[:, None, None, None]
        line = drawing.painted(line, mask, generator, noise=0.0)
        columns = (mask[:, 0] > 0.4).any(1)
        labels = torch.where(columns, classes[chosen][:, None] + 1, labels)
        edge = edge + width + drawing.uniform(generator, n, 0, 3)
    line = line.mean(1, keepdim=True)
    line += 0.03 * torch.randn(line.shape, generator=generator)
    return drawing.stored(line), labels[:, 2::4].contiguous()


def crnn(config: TaskConfig) -> Task:
    """A line of digits, a class at every position."""
    data = drawn("lines-1", config, _lines, (5000, 800, 1500))
    recipe = Recipe(epochs=4, learning_rate=3e-3)
    model = trained("crnn", config, lambda: CRNN(11), data["train"], loss=F.cross_entropy, recipe=recipe)
    return ArrayTask("crnn", model, data, scores_per_position, F.cross_entropy, outputs="classes")


class Dilated(nn.Module):
    """Two causal convolutions with a shortcut around them."""

    def __init__(self, channels: int, out: int, dilation: int) -> None:
        super().__init__()
        self.pad = nn.ConstantPad1d((4 * dilation, 0), 0.0)
        self.first = nn.Conv1d(channels, out, 5, dilation=dilation)
        self.second = nn.Conv1d(out, out, 5, dilation=dilation)
        self.norms = nn.ModuleList([nn.BatchNorm1d(out), nn.BatchNorm1d(out)])
        self.shortcut = nn.Conv1d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, signal: Tensor) -> Tensor:
        """Map ``(N, channels, T)`` to ``(N, out, T)``."""
        inner = F.relu(self.norms[0](self.first(self.pad(signal))))
        inner = F.relu(self.norms[1](self.second(self.pad(inner))))
        return F.relu(inner + self.shortcut(signal))


class TCN(nn.Module):
    """A temporal convolutional network, dilated twice as much in every block."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths = [channels, 32, 48, 64, 64, 96, 96]
        self.blocks = nn.Sequential(*(Dilated(widths[i], widths[i + 1], 2**i) for i in range(len(widths) - 1)))
        self.head = nn.Conv1d(widths[-1], classes, 1)

    def forward(self, signal: Tensor) -> Tensor:
        """Map signals ``(N, channels, T)`` to scores ``(N, classes, T)``."""
        return self.head(self.blocks(signal))


KINDS = ("sine", "square", "sawtooth", "chirp", "noise", "bursts", "silence", "two tones")


def _signals(part: str, n: int) -> tuple[Tensor, Tensor]:
    """Return signals ``(n, 4, 256)``, noisy copies seen by four sensors, and which of `KINDS` every sample is of."""
    generator = drawing.generator_of(part, 9)
    time = torch.arange(256.0)
    signal, labels = torch.zeros(n, 256), torch.zeros(n, 256, dtype=torch.int64)
    start = torch.zeros(n)
    while bool((start < 256).any()):
        length = drawing.uniform(generator, n, 30, 90)
        kind = torch.randint(len(KINDS), (n,), generator=generator)
        frequency = drawing.uniform(generator, n, 0.04, 0.16)[:, None]
        phase = drawing.uniform(generator, n, 0, 1)[:, None]
        turns = frequency * (time - start[:, None]) + phase
        swept = turns + 0.0012 * (time - start[:, None]) ** 2
        noise = torch.randn(n, 256, generator=generator)
        waves = torch.stack(
            [
                (2 * torch.pi * turns).sin(),
                (2 * torch.pi * turns).sin().sign(),
                2 * (turns % 1) - 1,
                (2 * torch.pi * swept).sin(),
                noise,
                (turns % 1 < 0.15).float() * 1.6 * noise.sign(),
                torch.zeros(n, 256),
                0.6 * ((2 * torch.pi * turns).sin() + (2 * torch.pi * 2.7 * turns).sin()),
            ],
            1,
        )
        inside = (time >= start[:, None]) & (time < (start + length)[:, None])
        gain = drawing.uniform(generator, n, 0.6, 1.4)[:, None]
        signal = torch.where(inside, gain * waves[torch.arange(n), kind], signal)
        labels = torch.where(inside, kind[:, None], labels)
        start = start + length
    mixture = torch.tensor([1.0, -0.8, 0.6, 0.4])
    sensors = signal[:, None] * mixture[:, None]
    return sensors + 0.25 * torch.randn(n, 4, 256, generator=generator), labels


def tcn(config: TaskConfig) -> Task:
    """Which kind of signal it is, at every moment."""
    data = drawn("signals-1", config, _signals, (4000, 600, 1200))
    recipe = Recipe(epochs=4, learning_rate=3e-3)
    model = trained("tcn", config, lambda: TCN(4, len(KINDS)), data["train"], loss=F.cross_entropy, recipe=recipe)
    return ArrayTask("tcn", model, data, scores_per_position, F.cross_entropy, outputs="classes")
