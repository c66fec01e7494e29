"""Batch-norm statistics of a compressed network: those of the uncompressed one, changed by what compression changed.

Running statistics were estimated from all training data, and calibration data are few, and may differ from these. So
they are not estimated anew, as recalibration does (Li et al., EagleEye, ECCV 2020): both networks see the same samples,
and a batch-norm's mean and variance move by as much as those of its inputs do. A network that nothing was changed in
stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Variances below this share of their mean are of channels that give nothing.
_DEAD = 1e-8


@dataclass(frozen=True)
class _Statistics:
    """Mean and variance ``(C,)`` of a batch-norm's inputs over samples and positions."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, given: Tensor) -> _Statistics:
        rows = given.detach().float().transpose(0, 1).flatten(1)
        variance, mean = torch.var_mean(rows, 1, correction=0)
        return cls(mean, variance)


class BatchNormTransfer:
    """What the batch-norms of an uncompressed network are given.

    Collect it with `watching` while the network runs, then set compressed forms' statistics with `moving`.

    Args:
        model: The uncompressed network, in eval mode; not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = {name: norm for name, norm in model.named_modules() if _counts(norm)}
        # Of the network as it was: it may be changed later.
        self._parameters = {name: _columns(norm) for name, norm in self._norms.items()}
        self._given: dict[str, _Statistics] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take note of what each batch-norm of the uncompressed network is given first in the block."""

        def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
                if name not in self._given:
                    self._given[name] = _Statistics.of(given[0])

            return hook

        with ExitStack() as hooks:
            for name, norm in self._norms.items():
                hooks.callback(norm.register_forward_pre_hook(watch(name)).remove)
            yield

    @contextmanager
    def moving(self, model: nn.Module) -> Iterator[None]:
        """Move the statistics of a compressed form, in eval mode, by what its batch-norms are given first in the block.

        Each is moved before it normalises, so that what follows sees what it will see. One whose channels cannot be
        told from the uncompressed network's gets the statistics of what it is given.
        """
        moved: set[str] = set()

        def move(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(norm: nn.Module, given: tuple[Any, ...]) -> None:
                if name not in moved:
                    moved.add(name)
                    self._move(name, norm, _Statistics.of(given[0]))

            return hook

        with ExitStack() as hooks:
            for name, norm in model.named_modules():
                if _counts(norm):
                    hooks.callback(norm.register_forward_pre_hook(move(name)).remove)
            yield

    def _move(self, name: str, norm: nn.Module, now: _Statistics) -> None:
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        assert norm.running_mean is not None and norm.running_var is not None
        before = self._given.get(name)
        kept = None if before is None else _kept(self._parameters[name], _columns(norm))
        if before is None or kept is None:
            norm.running_mean.copy_(now.mean)
            norm.running_var.copy_(now.variance)
            return
        mean, variance = before.mean[kept], before.variance[kept]
        alive = variance > _DEAD * (mean.square() + norm.running_var)
        ratio = torch.where(alive, now.variance / variance.where(alive, 1.0), 1.0)
        # How far the samples lie from all training data stays the same, in standard deviations.
        norm.running_mean.copy_(now.mean - (mean - norm.running_mean) * ratio.sqrt())
        norm.running_var.mul_(ratio)


def _counts(norm: nn.Module) -> bool:
    return isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None


def _columns(norm: nn.Module) -> Tensor:
    """Return what tells a batch-norm's channels apart ``(C, 2 or 4)``."""
    state: Mapping[str, Tensor] = dict(norm.state_dict())
    found = [state[key] for key in ("running_mean", "running_var", "weight", "bias") if key in state]
    return torch.stack([column.detach().float().clone() for column in found], 1)


def _kept(whole: Tensor, part: Tensor) -> Tensor | None:
    """Return which channels of `whole` ``(C, K)`` those of `part` ``(c, K)`` are; None where that cannot be told."""
    if whole.shape == part.shape and torch.equal(whole, part):
        return torch.arange(len(whole))
    if whole.shape[1] != part.shape[1]:
        return None
    equal = (part[:, None] == whole[None]).all(2)
    found = equal.float().argmax(1)
    # Channels that are alike in all these may still be given different things.
    return found if bool((equal.sum(1) == 1).all()) else None
