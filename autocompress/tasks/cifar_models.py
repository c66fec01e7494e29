"""The CIFAR networks of the ``cifar10`` task: ResNet-20/32/44/56 and VGG-11, for 32x32 images.

ResNets follow He et al., "Deep residual learning" (2015), section 4.2, with parameter-free (option A) shortcuts.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional


class OptionAShortcut(nn.Module):
    """Take every `stride`-th pixel and pad the new channels with zeros, half before and half after.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; a doubling pads a quarter of the new width on each side.
        stride: Step between the pixels taken.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N, out_channels, H / stride, W / stride)``."""
        before = (self.out_channels - self.in_channels) // 2
        after = self.out_channels - self.in_channels - before
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, after))

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else OptionAShortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N, out_channels, H / stride, W / stride)``."""
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet of ``6 * blocks + 2`` layers: three stages of 16, 32 and 64 channels."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(N, classes)`` of images ``(N, 3, 32, 32)``."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(self.pool(out).flatten(1))  # type: ignore[no-any-return]


class VGG11(nn.Module):
    """VGG-11 with batch-norm for 32x32 images: torchvision's ``features``, then one linear layer."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):  # 0 is a max-pool
            if width == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(N, classes)`` of images ``(N, 3, 32, 32)``."""
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


CIFAR_MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: ResNet(3),
    "resnet32": lambda: ResNet(5),
    "resnet44": lambda: ResNet(7),
    "resnet56": lambda: ResNet(9),
    "vgg11_bn": VGG11,
}


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))
