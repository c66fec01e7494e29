"""Batch-norm recalibration: the running statistics of a changed network, estimated anew from unlabelled data.

After Li et al., EagleEye (ECCV 2020): without it the proxy accuracy of pruned networks hardly orders them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autocompress.catalogue import Method

METHOD = Method(
    "recalibration",
    "recovery",
    "batch-norm statistics estimated anew after every change",
    "Li et al., EagleEye, ECCV 2020",
)

# The least that batch-norms follow their batches by in training: PyTorch's default.
_MOMENTUM = 0.1


def fast_dtype(model: nn.Module | None = None, inputs: Tensor | None = None) -> torch.dtype:
    """Return what forward passes run in under autocast: bfloat16 where the processor computes in it, else float32.

    Args:
        model: In eval mode; given with `inputs` ``(N, ...)``, it is tried: some layers have no kernel for bfloat16.
        inputs: Some that it takes.
    """
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if not native:
        return torch.float32
    if model is not None and inputs is not None:
        try:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                model(inputs[:2].clone())
        except Exception:  # noqa: BLE001 - whatever the user's forward raises; where it does not run, another says so
            return torch.float32
    return torch.bfloat16


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the batch-norms of `model` that normalise by running statistics."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]


@contextmanager
def recalibrating(model: nn.Module) -> Iterator[None]:
    """Re-estimate every batch-norm's mean and variance from what `model` is given in the block; changes it in place.

    A cumulative average over all batches; weights stay. Until the end of the block batch-norms normalise by the batch,
    then `model` is in eval mode.
    """
    norms = batch_norms(model)
    momenta = [m.momentum for m in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()


@contextmanager
def following(model: nn.Module) -> Iterator[None]:
    """Have batch-norms in training mode follow their batches in the block, whatever momentum they came with.

    Converted networks come with 0, whose statistics stay what they were for other weights, or with None, the average
    over all batches of a training that is long over; 0.01 follows too slowly for a training of a hundred steps.
    """
    norms = batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = max(norm.momentum or 0.0, _MOMENTUM)
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Re-estimate every batch-norm's mean and variance over `batches` of inputs ``(N, ...)``; see `recalibrating`.

    Models without batch-norm are left alone.
    """
    if not batch_norms(model):
        return
    with recalibrating(model), torch.no_grad():
        for inputs in batches:
            # One sample has no variance (and a short last batch would count as much as a full one).
            if len(inputs) > 1:
                model(inputs)
