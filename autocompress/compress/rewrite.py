"""Equivalent forms of modules that hide their channels, so that pruning can see through them.

A parameter-free "option A" shortcut (He et al., 2016) picks every second pixel and pads channels with zeros. It equals
a strided 1x1 convolution with a 0/1 weight; written so, the residual streams on both sides can be pruned, and
fine-tuning may use the new weight. torch's own multi-head attention holds its projections as bare parameters; with
layers in their place (`model.attention.plain`) its heads can be pruned, and they can be int8 and of low rank.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from autocompress.model.attention.plain import plain
from autocompress.tasks.cifar_models import OptionAShortcut


def rewrite(model: nn.Module) -> nn.Module:
    """Return a copy of `model` that computes the same, padded shortcuts as 1x1 convolutions, attention by layers."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        written: nn.Module | None = None
        if isinstance(module, OptionAShortcut):
            written = _as_convolution(module)
        elif isinstance(module, nn.MultiheadAttention) and name:
            written = plain(module)
        if written is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, written)
    return model.eval()


def _as_convolution(shortcut: OptionAShortcut) -> nn.Conv2d:
    width_in, width_out = shortcut.in_channels, shortcut.out_channels
    convolution = nn.Conv2d(width_in, width_out, 1, stride=shortcut.stride, bias=False)
    before = (width_out - width_in) // 2
    with torch.no_grad():
        convolution.weight.zero_()
        convolution.weight[before : before + width_in, :, 0, 0] = torch.eye(width_in)
    return convolution
