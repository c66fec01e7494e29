"""Structured channel pruning: whole channels leave the network, in every layer that shares their axis."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from autocompress.compress.base import CompressionContext, Transform, check_names
from autocompress.errors import CompressionError
from autocompress.inventory import CONVOLUTIONS, dependency_graph, output_group
from autocompress.methods import Method
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

    A group of 64 channels with `pruning_ratio` 0.25 keeps the 48 with the highest `context.channel_scores`. Groups
    inside removed blocks are passed over.
    """

    def apply(self, model: nn.Module, policy: CompressionPolicy, context: CompressionContext) -> nn.Module:
        """See `Transform.apply`."""
        present = dict(model.named_modules())
        wanted = {name: ratio for name, ratio in policy.pruning.items() if name in present}
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
            removed = _least_important(_width(model.get_submodule(name)), ratio, context.channel_scores.get(name))
            group = output_group(graph, model, name, removed)
            if not removed:
                continue
            if not graph.check_pruning_group(group):
                raise CompressionError(f"pruning_ratio {ratio} of group {name!r} would leave no channel.")
            group.prune()
        return model


def _width(layer: nn.Module) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def kept_channels(channels: int, ratio: float) -> int:
    """Return how many of `channels` stay at `ratio`; at least one."""
    return max(1, channels - round(channels * ratio))


def kept_indices(channels: int, ratio: float, scores: Tensor | None) -> Tensor:
    """Return which of `channels` stay at `ratio`, ascending, by their importance `scores` ``(C,)``."""
    removed = set(_least_important(channels, ratio, scores))
    return torch.tensor([channel for channel in range(channels) if channel not in removed])


def _least_important(channels: int, ratio: float, scores: Tensor | None) -> list[int]:
    removed = channels - kept_channels(channels, ratio)
    if scores is None:
        return list(range(channels - removed, channels))
    if scores.shape != (channels,):
        raise CompressionError(f"Importance has {scores.numel()} entries for {channels} channels.")
    return sorted(int(i) for i in torch.argsort(scores, stable=True)[:removed])
