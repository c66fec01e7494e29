"""How a model's weights lie in memory: channels last, in which convolutions on a CPU are fastest, where it takes that.

A forward that uses ``view`` on feature maps or weights takes only the order that tensors are made in.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

# A strided pointwise convolution of fewer channels: channels last and in fp32, torch 2.14's backward pass writes beyond
# what it allocated (2 to 12 channels to 8 crashed within six steps, 16 to 64 in none of 200 shapes; seen in MobileOne).
_FEWEST_STRIDED = 16


def in_fast_layout(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Return `model` itself, its weights laid out channels last, or as they are made where it does not run so.

    Args:
        model: In eval mode; trained and run in either order afterwards.
        inputs: Some that it takes ``(N, ...)``, N from 2 on where it has batch-norms.
    """
    if not any(p.ndim == 4 for p in model.parameters()):
        return model
    if any(map(_overruns, model.modules())):
        return model.to(memory_format=torch.contiguous_format)
    # What does not run in training mode either way (a detector without targets) says nothing of the layout.
    takes = all(
        _runs(model, inputs, torch.channels_last, training=training)
        or not _runs(model, inputs, torch.contiguous_format, training=training)
        for training in (False, True)
    )
    return model.to(memory_format=torch.channels_last if takes else torch.contiguous_format)


def _overruns(module: nn.Module) -> bool:
    """Return whether training a layer channels last would corrupt memory."""
    if not isinstance(module, nn.Conv2d) or module.kernel_size != (1, 1) or max(module.stride) == 1:
        return False
    return module.groups == 1 and module.in_channels < _FEWEST_STRIDED


def _runs(model: nn.Module, inputs: Tensor, layout: torch.memory_format, *, training: bool) -> bool:
    """Return whether a copy of a model runs; neither it nor the caller's random numbers are touched."""
    tried = copy.deepcopy(model).to(memory_format=layout).train(training)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            tried(inputs.contiguous(memory_format=layout) if inputs.ndim == 4 else inputs.clone())
    except Exception:  # noqa: BLE001 - whatever its forward raises; where it does not run at all, another says so
        return False
    return True


def layout_of(model: nn.Module) -> torch.memory_format:
    """Return the order that a model's weights lie in."""
    for parameter in model.parameters():
        if parameter.ndim == 4 and not parameter.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format
