"""Networks whose norms, slopes and weights are tied to the channels in ways of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from autocompress import ClassificationTask
from benchmarks.cases.making import CLASSES, fitted, images_task


class SlopeBlock(nn.Module):
    """A residual block of face recognition backbones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.n1, self.c1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.act, self.n2 = nn.PReLU(width), nn.BatchNorm2d(width)
        self.c2, self.n3 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.n3(self.c2(self.act(self.n2(self.c1(self.n1(x))))))
        return added


class Slopes(nn.Module):
    """PReLU with one slope a channel behind convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.act = nn.Conv2d(3, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.PReLU(48)
        self.blocks = nn.Sequential(SlopeBlock(48), SlopeBlock(48))
        self.down, self.act2 = nn.Conv2d(48, 64, 3, 2, 1), nn.PReLU(64)
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.act(self.bn(self.stem(x))))
        scores: Tensor = self.fc(self.act2(self.down(x)).mean((2, 3)))
        return scores


class ChannelNorm(nn.Module):
    """A LayerNorm over channels, written by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        normal = (x - mean) / (variance + 1e-6).sqrt()
        return normal * self.gain.view(1, -1, 1, 1) + self.shift.view(1, -1, 1, 1)


class GatedBlock(nn.Module):
    """NAFNet's block: gates by halves, and a scale of each channel on both residuals."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.n1, self.n2 = ChannelNorm(width), ChannelNorm(width)
        self.widen = nn.Conv2d(width, 2 * width, 1)
        self.dw = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.attend, self.mix = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.ffn_in, self.ffn_out = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(width, width, 1)
        self.beta = nn.Parameter(0.5 * torch.ones(1, width, 1, 1))
        self.gamma = nn.Parameter(0.5 * torch.ones(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.dw(self.widen(self.n1(x))).chunk(2, 1)
        y = p * q
        y = self.mix(y * self.attend(F.adaptive_avg_pool2d(y, 1)))
        x = x + self.beta * y
        p, q = self.ffn_in(self.n2(x)).chunk(2, 1)
        added: Tensor = x + self.gamma * self.ffn_out(p * q)
        return added


class HandWrittenNorm(nn.Module):
    """Two of NAFNet's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.intro, self.blocks = nn.Conv2d(3, 48, 3, padding=1), nn.Sequential(GatedBlock(48), GatedBlock(48))
        self.tail, self.fc = nn.Conv2d(48, 48, 3, 2, 1), nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(F.relu(self.tail(self.blocks(self.intro(x)))).mean((2, 3)))
        return scores


class GroupBlock(nn.Module):
    """A residual block with GroupNorm."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(groups, width)
        self.c2, self.n2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(groups, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.n2(self.c2(F.relu(self.n1(self.c1(x))))))


class GroupNorms(nn.Module):
    """32 groups of 64 channels, then 8 groups of 96."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, 64, 3, 2, 1, bias=False), nn.GroupNorm(32, 64)
        self.b1 = GroupBlock(64, 32)
        self.down, self.nd = nn.Conv2d(64, 96, 3, 2, 1, bias=False), nn.GroupNorm(8, 96)
        self.b2, self.fc = GroupBlock(96, 8), nn.Linear(96, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b1(F.relu(self.n0(self.stem(x))))
        scores: Tensor = self.fc(self.b2(F.relu(self.nd(self.down(x)))).mean((2, 3)))
        return scores


class Parametrized(nn.Module):
    """weight_norm on convolutions, spectral_norm on a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = weight_norm(nn.Conv2d(3, 48, 3, padding=1)), weight_norm(nn.Conv2d(48, 64, 3, 2, 1))
        self.c, self.mid = nn.Conv2d(64, 64, 3, padding=1), spectral_norm(nn.Linear(64, 64))
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))))
        scores: Tensor = self.fc(F.relu(self.mid(x.mean((2, 3)))))
        return scores


class StandardizedConv2d(nn.Conv2d):
    """Standardizes its weight in forward, by view, as BiT does."""

    def forward(self, input: Tensor) -> Tensor:
        flat = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        scale = flat.view(flat.size(0), -1).std(1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(input, flat / scale, self.bias, self.stride, self.padding, self.dilation, self.groups)


class WeightStandardized(nn.Module):
    """Standardized convolutions, each with GroupNorm behind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = StandardizedConv2d(3, 32, 5, padding=2), nn.GroupNorm(8, 32)
        self.b, self.nb = StandardizedConv2d(32, 64, 3, 2, 1), nn.GroupNorm(8, 64)
        self.c, self.nc = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))))
        scores: Tensor = self.fc(F.relu(self.nc(self.c(x))).mean((2, 3)))
        return scores


class WithoutStatistics(nn.Module):
    """BatchNorm that keeps no running statistics: what it gives depends on the other samples of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 48, 5, padding=2), nn.BatchNorm2d(48, track_running_stats=False)
        self.b, self.nb = nn.Conv2d(48, 64, 3, 2, 1), nn.BatchNorm2d(64, track_running_stats=False)
        self.c, self.fc = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))))
        scores: Tensor = self.fc(F.relu(self.c(x)).mean((2, 3)))
        return scores


def slopes() -> ClassificationTask:
    """PReLU with one slope a channel."""
    return images_task(fitted(Slopes, "slopes"), "slopes")


def hand_written_norm() -> ClassificationTask:
    """A hand-written LayerNorm over channels, gates by halves, parameters of each channel on residuals."""
    return images_task(fitted(HandWrittenNorm, "hand-written-norm"), "hand-written-norm")


def group_norm() -> ClassificationTask:
    """GroupNorm behind convolutions that are pruned."""
    return images_task(fitted(GroupNorms, "group-norm"), "group-norm")


def parametrized() -> ClassificationTask:
    """Weights behind torch.nn.utils.parametrizations."""
    return images_task(fitted(Parametrized, "parametrized"), "parametrized")


def weight_standardized() -> ClassificationTask:
    """Convolutions that standardize their weights in forward."""
    return images_task(fitted(WeightStandardized, "weight-standardized"), "weight-standardized")


def batch_norm_without_statistics() -> ClassificationTask:
    """BatchNorm without running statistics."""
    return images_task(fitted(WithoutStatistics, "batch-norm-without-statistics"), "batch-norm-without-statistics")
