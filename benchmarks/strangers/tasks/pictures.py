"""Pictures that are not classified: a U-Net on masks, a regression of a pose, several labels at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import DenseNet

from autocompress import Task
from autocompress.config import TaskConfig
from benchmarks.strangers.tasks import drawing
from benchmarks.strangers.tasks.arrays import ArrayTask, drawn
from benchmarks.strangers.tasks.trained import Recipe, trained


class Twice(nn.Sequential):
    """Two convolutions with batch-norm and ReLU."""

    def __init__(self, channels: int, out: int) -> None:
        layers: list[nn.Module] = []
        for width in (channels, out):
            layers += [nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class UNet(nn.Module):
    """A U-Net: four levels, transposed convolutions on the way up, concatenated shortcuts."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(4)]
        self.down = nn.ModuleList([Twice(3, widths[0]), *(Twice(widths[i], widths[i + 1]) for i in range(3))])
        self.rise = nn.ModuleList([nn.ConvTranspose2d(w, w // 2, 2, 2) for w in reversed(widths[1:])])
        self.up = nn.ModuleList([Twice(w, w // 2) for w in reversed(widths[1:])])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, picture: Tensor) -> Tensor:
        """Map pictures ``(N, 3, H, W)`` to scores ``(N, classes, H, W)``."""
        shortcuts: list[Tensor] = []
        x = picture
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            shortcuts.append(x)
        for rise, block, shortcut in zip(self.rise, self.up, reversed(shortcuts[:-1]), strict=True):
            x = block(torch.cat([rise(x), shortcut], 1))
        return self.head(x)


def mean_iou(outputs: Tensor, targets: Tensor) -> float:
    """Return intersection over union, mean over classes; outputs ``(N, classes, H, W)``, targets ``(N, H, W)``."""
    classes = outputs.shape[1]
    pairs = targets.flatten() * classes + outputs.argmax(1).flatten()
    confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes).double()
    hit = confusion.diagonal()
    return float((hit / (confusion.sum(0) + confusion.sum(1) - hit).clamp_min(1)).mean())


def unet(config: TaskConfig) -> Task:
    """Which shape each pixel belongs to."""

    def make(part: str, n: int) -> tuple[Tensor, Tensor]:
        return drawing.shape_scenes(n, 64, part, seed=2, shapes=3)

    data = drawn("shapes-1", config, make, (2500, 300, 600))
    classes = 1 + len(drawing.SHAPES)
    recipe = Recipe(epochs=5, learning_rate=4e-3, batch_size=16, version=2)
    model = trained("unet", config, lambda: UNet(classes), data["train"], loss=F.cross_entropy, recipe=recipe)
    return ArrayTask("unet", model, data, mean_iou, F.cross_entropy, outputs="classes")


class PoseNet(nn.Module):
    """Strided convolutions and two linear layers, with leaky ReLU."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out, stride in ((24, 2), (32, 1), (48, 2), (64, 1), (96, 2), (96, 1), (128, 2)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.LeakyReLU(0.1)]
            channels = out
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * 16, 192), nn.LeakyReLU(0.1), nn.Linear(192, outputs)
        )

    def forward(self, picture: Tensor) -> Tensor:
        """Map pictures ``(N, 3, 64, 64)`` to ``(N, outputs)``."""
        return self.head(self.features(picture))


def _poses(part: str, n: int) -> tuple[Tensor, Tensor]:
    """Return pictures ``(n, 3, 64, 64)`` of a triangle, and its pose ``(n, 6)``.

    The pose is centre x and y, half width and half height (in shares of the picture, about 0 and of spread 1), and
    cosine and sine of the angle.
    """
    generator = drawing.generator_of(part, 3)
    x, y = (drawing.uniform(generator, n, 0.3, 0.7) for _ in range(2))
    a, b = drawing.uniform(generator, n, 0.1, 0.2), drawing.uniform(generator, n, 0.2, 0.3)
    angle = drawing.uniform(generator, n, 0, 2 * torch.pi)
    pose = torch.stack([64 * x, 64 * y, 64 * a, 64 * b, angle], 1)
    triangle = torch.full((n,), drawing.SHAPES.index("triangle"))
    mask = torch.cat(
        [drawing.shape_masks(k, 64, p) for k, p in zip(triangle.split(500), pose.split(500), strict=True)]
    )[:, None]
    background = 0.2 + 0.5 * drawing.photograph_crops(n, 64, part, generator)
    targets = [(x - 0.5) / 0.12, (y - 0.5) / 0.12, (a - 0.15) / 0.03, (b - 0.25) / 0.03, angle.cos(), angle.sin()]
    return drawing.stored(drawing.painted(background, mask, generator)), torch.stack(targets, 1)


def explained(outputs: Tensor, targets: Tensor) -> float:
    """Return R², the share of variance that outputs ``(N, values)`` explain, mean over values; at least 0."""
    missed = (outputs - targets).double().square().sum(0)
    return max(0.0, float((1 - missed / (targets - targets.mean(0)).double().square().sum(0)).mean()))


def regression(config: TaskConfig) -> Task:
    """Where a triangle lies, how large it is, and how it is turned."""
    data = drawn("poses-1", config, _poses, (6000, 1000, 2000))
    recipe = Recipe(epochs=8, learning_rate=3e-3)
    model = trained("regression", config, lambda: PoseNet(6), data["train"], loss=F.smooth_l1_loss, recipe=recipe)
    return ArrayTask("regression", model, data, explained, F.smooth_l1_loss, outputs="values")


def _present(part: str, n: int) -> tuple[Tensor, Tensor]:
    """Return pictures ``(n, 3, 72, 72)`` of several digits, and which of the ten classes are there ``(n, 10)``."""
    pictures, classes, _ = drawing.digit_scenes(n, 72, part, seed=4, cells=3, share=0.4)
    present = F.one_hot(classes + 1, 11)[..., 1:].amax(1).float()
    return pictures, present


def micro_f1(outputs: Tensor, targets: Tensor) -> float:
    """Return F1 over all labels ``(N, labels)`` together; an output above 0 says that its label is there."""
    said, true = outputs > 0, targets > 0.5
    return float(2 * (said & true).sum() / (said.sum() + true.sum()).clamp_min(1))


def multilabel(config: TaskConfig) -> Task:
    """Which digits are in the picture: a DenseNet of torchvision, narrow."""
    data = drawn("present-1", config, _present, (6000, 1000, 2000))
    recipe = Recipe(epochs=8, learning_rate=3e-3)
    model = trained(
        "multilabel", config, lambda: DenseNet(16, (4, 4, 4), 32, num_classes=10), data["train"],
        loss=F.binary_cross_entropy_with_logits, recipe=recipe,
    )  # fmt: skip
    # Sigmoids, one for each label; releases that know no such kind take them for values.
    return ArrayTask("multilabel", model, data, micro_f1, F.binary_cross_entropy_with_logits, outputs="labels")
