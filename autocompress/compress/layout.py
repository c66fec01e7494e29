"""How a model's weights lie in memory: channels last, in which convolutions on a CPU are fastest, where it takes that.

A forward that uses ``view`` on feature maps or weights takes only the order that tensors are made in.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def in_fast_layout(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Return `model` itself, its weights laid out channels last, or as they are made where it does not run so.

    Args:
        model: In eval mode; trained and run in either order afterwards.
        inputs: Some that it takes ``(N, ...)``, N from 2 on where it has batch-norms.
    """
    if not any(p.ndim == 4 for p in model.parameters()):
        return model
    tried = copy.deepcopy(model).to(memory_format=torch.channels_last)
    fast = inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs
    takes = True
    try:
        with torch.no_grad():
            for training in (False, True):
                tried.train(training)(fast.clone())
    except Exception:  # noqa: BLE001 - whatever its forward raises; where it does not run at all, another says so
        takes = False
    return model.to(memory_format=torch.channels_last if takes else torch.contiguous_format)


def layout_of(model: nn.Module) -> torch.memory_format:
    """Return the order that a model's weights lie in."""
    for parameter in model.parameters():
        if parameter.ndim == 4 and not parameter.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format
