"""Classifiers of handwritten digits on photographs: ViT, ConvNeXt, MobileNetV3, a ResNet with GroupNorm, two inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timm.layers import GroupNorm
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v3_small

from autocompress import ClassificationTask, Task
from autocompress.config import TaskConfig
from autocompress.tasks import Adapter, InputSpec, pack
from benchmarks.strangers.tasks import drawing
from benchmarks.strangers.tasks.arrays import drawn
from benchmarks.strangers.tasks.trained import Recipe, as_float, trained

SIZE = 48
_SIZES = (6000, 1000, 2000)


def vit(config: TaskConfig) -> Task:
    """A vision transformer of timm, patches of 8 × 8 pixels, four blocks."""
    build = partial(
        VisionTransformer, img_size=SIZE, patch_size=8, embed_dim=128, depth=4, num_heads=4, mlp_ratio=2, num_classes=10
    )
    return _digits(
        "vit", config, build, Recipe(epochs=24, learning_rate=1e-3, weight_decay=0.05, batch_size=32, version=2)
    )


def convnext(config: TaskConfig) -> Task:
    """A ConvNeXt of timm, narrow, its stem of patches of 2 × 2 pixels."""
    build = partial(ConvNeXt, depths=(2, 2, 4, 2), dims=(24, 48, 96, 192), patch_size=2, num_classes=10)
    return _digits("convnext", config, build, Recipe(epochs=12, learning_rate=4e-3, weight_decay=0.05))


def mobilenetv3(config: TaskConfig) -> Task:
    """Return torchvision's MobileNetV3-Small: depthwise convolutions, squeeze-and-excitation, hard swish."""
    return _digits("mobilenetv3", config, partial(mobilenet_v3_small, num_classes=10), Recipe(epochs=8))


def groupnorm_resnet(config: TaskConfig) -> Task:
    """A ResNet of timm with GroupNorm in place of batch-norm."""
    build = partial(
        ResNet, BasicBlock, (1, 2, 2, 1), num_classes=10, channels=(32, 64, 96, 128), stem_width=32,
        norm_layer=partial(GroupNorm, num_groups=8),
    )  # fmt: skip
    return _digits("groupnorm-resnet", config, build, Recipe(epochs=5))


def _digits(name: str, config: TaskConfig, build: Callable[[], nn.Module], recipe: Recipe) -> Task:
    def make(part: str, n: int) -> tuple[Tensor, Tensor]:
        return drawing.digit_pictures(n, SIZE, part, seed=0)

    data = drawn("digits-1", config, make, _SIZES)
    model = trained(name, config, build, data["train"], loss=F.cross_entropy, recipe=recipe)
    return ClassificationTask(model, train=data["train"], validation=data["validation"], test=data["test"], name=name)


class PointedAt(nn.Module):
    """Reads the digit of a picture that a vector points at: convolutions, and a small network for the vector."""

    def __init__(self) -> None:
        super().__init__()

        def block(channels: int, out: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.SiLU()]

        self.picture = nn.Sequential(
            *block(3, 24, 2), *block(24, 48, 1), *block(48, 64, 2), *block(64, 96, 1), *block(96, 128, 2)
        )
        self.pointer = nn.Sequential(nn.Linear(16, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.mixed = nn.Sequential(nn.Linear(128 * 16 + 128, 256), nn.SiLU(), nn.Linear(256, 128), nn.SiLU())
        self.head = nn.Linear(128, 10)

    def forward(self, picture: Tensor, pointer: Tensor) -> Tensor:
        """Map pictures ``(N, 3, 64, 64)`` and vectors ``(N, 16)`` to class scores ``(N, 10)``."""
        seen = F.adaptive_avg_pool2d(self.picture(picture), 4).flatten(1)
        return self.head(self.mixed(torch.cat([seen, self.pointer(pointer)], 1)))


_SPECS = (InputSpec("picture", (3, 64, 64)), InputSpec("pointer", (16,)))


def _pointed_at(part: str, n: int) -> tuple[Tensor, Tensor]:
    """Return pictures of four digits with a noisy vector that points at one of them, and that one's class."""
    pictures, classes, _ = drawing.digit_scenes(n, 64, part, seed=5, cells=2, share=1.0)
    generator = drawing.generator_of(part, 6)
    directions = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    which = torch.randint(4, (n,), generator=generator)
    vector = directions[which] + 0.3 * torch.randn(n, 16, generator=generator)
    return pack({"picture": as_float(pictures), "pointer": vector}, _SPECS), classes[torch.arange(n), which]


def two_inputs(config: TaskConfig) -> Task:
    """A picture and a vector go in, packed in one tensor."""
    data = drawn("pointed-at-1", config, _pointed_at, (6000, 1000, 2000))
    model = trained(
        "two-inputs",
        config,
        lambda: Adapter(PointedAt(), _SPECS),
        data["train"],
        loss=F.cross_entropy,
        recipe=Recipe(epochs=6),
    )
    return ClassificationTask(
        model, train=data["train"], validation=data["validation"], test=data["test"], name="two-inputs"
    )
