"""Structured channel pruning: whole channels leave the network, in every layer that shares their axis."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from autocompress.catalogue import Method
from autocompress.compress.base import CompressionContext, Transform, check_names
from autocompress.errors import CompressionError
from autocompress.model.attention import head_axes
from autocompress.model.inventory import CONVOLUTIONS, dependency_graph, in_every_part, output_group, parts_of
from autocompress.policy import CompressionPolicy

METHOD = Method(
    "channels",
    "pruning",
    "whole channels removed in all layers that share them",
    "Li et al., ICLR 2017; Fang et al., DepGraph, CVPR 2023",
    ("openvino", "onnxruntime", "tensorrt", "tensorrt-rtx"),
)


class ChannelPruning(Transform):
    """Remove the least important channels of every group in `policy.pruning`.

    A group of 64 channels with `pruning_ratio` 0.25 keeps the 48 with the highest `context.channel_scores`; where a
    grouped convolution reads or makes them, each of its groups loses the same places, those with the lowest sums.
    Groups inside removed blocks are passed over.
    """

    def apply(self, model: nn.Module, policy: CompressionPolicy, context: CompressionContext) -> nn.Module:
        """See `Transform.apply`."""
        present = dict(model.named_modules())
        # Attention heads are `HeadPruning`'s.
        heads = head_axes(model)
        wanted = {name: ratio for name, ratio in policy.pruning.items() if name in present and name not in heads}
        check_names(policy.pruning, model, policy)
        for name in wanted:
            if not isinstance(present[name], (*CONVOLUTIONS, nn.Linear)):
                kind = type(present[name]).__name__
                raise CompressionError(f"The policy prunes group {name!r}, which is a {kind} and leads no group.")
        if not wanted:
            return model
        model = copy.deepcopy(model)
        graph = dependency_graph(model, context.inputs)
        for name, ratio in wanted.items():
            width = _width(model.get_submodule(name))
            parts = parts_of(graph, model, name, output_group(graph, model, name, range(width)))
            removed = _least_important(width, ratio, context.channel_scores.get(name), parts)
            if not removed:
                continue
            group = output_group(graph, model, name, removed)
            if not graph.check_pruning_group(group):
                raise CompressionError(f"pruning_ratio {ratio} of group {name!r} would leave no channel.")
            group.prune()
        return model


def _width(layer: nn.Module) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def kept_channels(channels: int, ratio: float, parts: int = 1) -> int:
    """Return how many of `channels` stay at `ratio`; at least one in each of `parts` parts, which stay equal."""
    size = channels // parts
    return parts * max(1, size - round(size * ratio))


def kept_indices(channels: int, ratio: float, scores: Tensor | None, parts: int = 1) -> Tensor:
    """Return which of `channels` stay at `ratio`, ascending, by their importance `scores` ``(C,)``."""
    removed = set(_least_important(channels, ratio, scores, parts))
    return torch.tensor([channel for channel in range(channels) if channel not in removed])


def _least_important(channels: int, ratio: float, scores: Tensor | None, parts: int) -> list[int]:
    removed = (channels - kept_channels(channels, ratio, parts)) // parts
    if scores is None:
        size = channels // parts
        return in_every_part(range(size - removed, size), channels, parts)
    if scores.shape != (channels,):
        raise CompressionError(f"Importance has {scores.numel()} entries for {channels} channels.")
    places = torch.argsort(scores.view(parts, -1).sum(0), stable=True)[:removed]
    return in_every_part(places.tolist(), channels, parts)
