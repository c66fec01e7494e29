"""What a layer is fitted to: output positions drawn at random, and what the weights see there."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress.model.channel_tracing import CONVOLUTIONS

WeightLayer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear

# Rows of a fit, output positions of all samples together, and values of its inputs and of its outputs at most.
ROWS, VALUES = 4096, 2**22


def places(
    layer: nn.Module, output: Tensor, generator: torch.Generator, values: int = VALUES
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return places of a layer's output, at most `ROWS` in random order, and the rows there.

    Args:
        layer: A convolution or a linear layer.
        output: What it gave.
        generator: Draws the places.
        values: Of all rows at most.

    Returns:
        Indices ``(R,)`` of sample, and for convolutions of each axis, of each place; ``(R, C)`` values there.
    """
    # Channels come second of a convolution, last of a linear layer, whatever lies between.
    last = output.movedim(1, -1) if isinstance(layer, CONVOLUTIONS) else output
    *sizes, channels = last.shape
    count = min(ROWS, max(1, values // channels))
    chosen = torch.randperm(math.prod(sizes), generator=generator)[:count]
    found = tuple(torch.unravel_index(chosen, sizes))
    return found, last[found]


def patches(layer: WeightLayer, given: Tensor, places: tuple[Tensor, ...]) -> Tensor | None:
    """Return what the layer's weights are multiplied with at these places ``(R, K)``; None where shapes differ.

    Those of a grouped convolution are of all its groups, one after another.
    """
    if isinstance(layer, nn.Linear):
        return given[places].float() if given.dim() - 1 == len(places) else None
    axes = len(layer.kernel_size)
    if isinstance(layer.padding, str) or len(places) != 1 + axes:
        return None
    sample, *at = places
    # Padding is told from the last axis on.
    edges = [size for padding in reversed(layer.padding) for size in (padding, padding)]
    padded = functional.pad(given, edges) if any(edges) else given
    first = [place * stride for place, stride in zip(at, layer.stride, strict=True)]
    pieces = []
    # Channels last, so that what is indexed comes in the places' order.
    padded = padded.movedim(1, -1)
    for offsets in itertools.product(*map(range, layer.kernel_size)):
        there = [f + offset * gap for f, offset, gap in zip(first, offsets, layer.dilation, strict=True)]
        pieces.append(padded[sample, *there])
    return torch.stack(pieces, 2).flatten(1).float()
