"""Networks as training, freezing, tracing or pruning left them, or that compute something else while they train."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from autocompress import ClassificationTask
from benchmarks.cases.making import CLASSES, Plain, fitted, images_task


class AuxiliaryHead(Plain):
    """Gives scores and auxiliary scores while training, scores alone otherwise, as Inception and GoogLeNet do."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        x = F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))))
        scores: Tensor = self.fc(F.relu(self.nc(self.c(x))).mean((2, 3)))
        return (scores, self.aux(x.mean((2, 3)))) if self.training else scores


class NoGradBackbone(nn.Module):
    """A backbone under torch.no_grad in forward, and a shortcut whose branch is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            *(nn.Conv2d(3, 48, 5, padding=2), nn.BatchNorm2d(48), nn.ReLU()),
            *(nn.Conv2d(48, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU()),
        )
        self.c, self.d = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone(x)
        y = F.relu(self.c(x))
        y = F.relu(y + self.d(y.detach()))
        scores: Tensor = self.fc(y.mean((2, 3)))
        return scores


class TwoBranches(nn.Module):
    """RepVGG's block: two branches while training; in eval mode one kernel made of both, for functional conv2d."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.big, self.small = nn.Conv2d(ins, outs, 3, stride, 1), nn.Conv2d(ins, outs, 1, stride)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return F.relu(self.big(x) + self.small(x))
        weight = self.big.weight + F.pad(self.small.weight, [1, 1, 1, 1])
        assert self.big.bias is not None and self.small.bias is not None
        return F.relu(F.conv2d(x, weight, self.big.bias + self.small.bias, self.stride, 1))


class Reparametrized(nn.Module):
    """Two such blocks between layers that are modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, 32, 5, padding=2), nn.BatchNorm2d(32)
        self.r1, self.r2 = TwoBranches(32, 64, 2), TwoBranches(64, 64, 1)
        self.tail, self.fc = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.r2(self.r1(F.relu(self.n0(self.stem(x)))))
        scores: Tensor = self.fc(F.relu(self.tail(x)).mean((2, 3)))
        return scores


def auxiliary_head() -> ClassificationTask:
    """A tuple in training mode, a tensor in eval mode."""
    return images_task(fitted(AuxiliaryHead, "auxiliary-head"), "auxiliary-head")


def no_grad_backbone() -> ClassificationTask:
    """A backbone that no gradient goes through."""
    return images_task(fitted(NoGradBackbone, "no-grad-backbone"), "no-grad-backbone")


def reparametrized() -> ClassificationTask:
    """Another computation in eval mode, of functional convolutions."""
    return images_task(fitted(Reparametrized, "reparametrized"), "reparametrized")


def frozen() -> ClassificationTask:
    """Every parameter frozen, as one does for inference."""
    return images_task(fitted(Plain, "plain").requires_grad_(False), "frozen")


def compiled() -> ClassificationTask:
    """A model that went through torch.compile."""
    return images_task(torch.compile(fitted(Plain, "plain"), backend="eager"), "compiled")  # type: ignore[arg-type]


def traced() -> ClassificationTask:
    """A model that went through torch.jit.trace."""
    return images_task(torch.jit.trace(fitted(Plain, "plain"), torch.zeros(1, 3, 24, 24)), "traced")


def pruning_masks() -> ClassificationTask:
    """Pruned by torch.nn.utils.prune before, with the masks still there."""
    model = fitted(Plain, "plain")
    for layer in (model.b, model.c):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    with torch.no_grad():
        model(torch.zeros(1, 3, 24, 24))
    return images_task(model, "pruning-masks")
