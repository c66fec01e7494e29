"""Small networks with every kind of channel coupling, shaped as torchvision's are."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional


def halve_codes(weight: Tensor, silent: int) -> None:
    """Keep the int8 codes of a layer's weights ``(out, in, ...)`` within ±63, in place.

    The weight of an input channel that is `silent`, always near zero, becomes twice as large as the largest other and
    takes the code 127. Processors without VNNI add two products of uint8 and int8 in 16 bits, which 2 x 255 x 127
    overflows and OpenVINO lets saturate; what a test says of a graph must not hang on that.
    """
    with torch.no_grad():
        weight[:, silent] = 0
        weight[:, silent] = 2.02 * weight.flatten(1).abs().amax(1).reshape(-1, *[1] * (weight.dim() - 2))


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch-norms statistics and weights that matter, in place; return the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            with torch.no_grad():
                module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                for tensor, low in ((module.running_var, 0.5), (module.weight, 0.5), (module.bias, -0.5)):
                    assert tensor is not None
                    tensor.uniform_(low, low + 1, generator=generator)
                assert module.running_mean is not None
                module.running_mean.normal_(0, 0.1, generator=generator)
    return model.eval()


def images(count: int = 2, size: int = 8, seed: int = 0) -> Tensor:
    """``(count, 3, size, size)`` noise, always the same."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], before[name]) for name in before)


class Plain(nn.Module):
    """Conv, batch-norm, pool, conv, linear: nothing coupled but neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(functional.relu(self.bn1(self.conv1(x))))
        return self.fc(functional.relu(self.conv2(x)).mean((2, 3)))


class BasicBlock(nn.Module):
    """As torchvision's: identity shortcut, or a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Residual(nn.Module):
    """Stem, one block with an identity shortcut, one with a projection, head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.same = BasicBlock(width, width)
        self.wider = BasicBlock(width, 2 * width, stride=2)
        self.fc = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.wider(self.same(functional.relu(self.stem(x)))).mean((2, 3)))


class InvertedResidual(nn.Module):
    """As MobileNetV2's: expand, depthwise, project; the shortcut only where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        hidden = 2 * inputs
        self.shortcut = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class Mobile(nn.Module):
    """A chain of inverted residuals: two with a shortcut, one without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.features = nn.Sequential(InvertedResidual(8, 8), InvertedResidual(8, 8))
        self.last = InvertedResidual(8, 16, stride=2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.features(self.stem(x))).mean((2, 3)))


class Concat(nn.Module):
    """Two branches concatenated, read by one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 8, 1)
        self.join = nn.Conv2d(12, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        return self.fc(self.join(x).relu().mean((2, 3)))


class Tokens(nn.Module):
    """Linear layers on ``(N, positions, channels)``, as transformers have."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2).reshape(len(x), 12, 16)
        return self.fc(functional.relu(self.first(x)).mean(1))
