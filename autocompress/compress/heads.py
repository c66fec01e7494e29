"""Attention heads: whole heads leave an attention module, in all of its projections."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.dependency import Dependency
from torch_pruning.dependency import Group as TracedGroup

from autocompress.catalogue import Method
from autocompress.compress.base import CompressionContext, Transform, check_names
from autocompress.compress.pruning import kept_indices
from autocompress.model.attention import HeadAxis, head_axes, keep_heads
from autocompress.model.channel_groups import ChannelGroup
from autocompress.policy import CompressionPolicy

METHOD = Method(
    "attention_heads",
    "pruning",
    "whole heads removed from query, key, value and output projections",
    "Michel et al., Are sixteen heads really better than one, NeurIPS 2019",
    ("openvino", "onnxruntime", "tensorrt", "tensorrt-rtx"),
)


class HeadPruning(Transform):
    """Remove the least important heads of every group of heads in `policy.pruning`.

    Twelve heads with `pruning_ratio` 0.25 keep the nine with the highest `context.channel_scores`, one at least.
    """

    def apply(self, model: nn.Module, policy: CompressionPolicy, context: CompressionContext) -> nn.Module:
        """See `Transform.apply`."""
        check_names(policy.pruning, model, policy)
        axes = head_axes(model)
        wanted = {name: ratio for name, ratio in policy.pruning.items() if name in axes}
        if not wanted:
            return model
        model = copy.deepcopy(model)
        for name, ratio in wanted.items():
            kept = kept_indices(axes[name].heads, ratio, context.channel_scores.get(name))
            keep_heads(model, axes[name], kept.tolist())
        return model


def traced_heads(graph: Any, model: nn.Module, axis: HeadAxis) -> TracedGroup:
    """Return the channels of all heads as Torch-Pruning's group of an axis as long as what the output projection reads.

    It is what importances of channels are given. Where one projection makes queries, keys and values, it is in the
    group three times.

    Args:
        graph: Torch-Pruning's dependency graph of `model`.
        model: The model.
        axis: One of its `head_axes`.
    """
    (size,) = {len(heads) // axis.heads for heads in axis.read.values()}
    group = TracedGroup()
    group._DG = graph
    # Torch-Pruning takes the length of the axis from the first of a group.
    for layers, outputs in ((axis.made, True), (axis.read, False)):
        for layer, heads in layers.items():
            module = model.get_submodule(layer)
            pruner = graph.get_pruner_of_module(module)
            handler = pruner.prune_out_channels if outputs else pruner.prune_in_channels
            node = graph.module2node[module]
            for indices in _turns(heads, size):
                group.add_dep(Dependency(handler, handler, node, node), indices)
                group.items[-1].root_idxs = list(range(len(indices)))
    return group


def _turns(heads: tuple[int, ...], size: int) -> list[list[int]]:
    """Return the channels of a projection, `size` of every head at a time, ordered by head."""
    of_head: dict[int, list[int]] = {}
    for channel, head in enumerate(heads):
        of_head.setdefault(head, []).append(channel)
    times = len(of_head[0]) // size
    return [
        [channel for head in sorted(of_head) for channel in of_head[head][turn * size : (turn + 1) * size]]
        for turn in range(times)
    ]


def scores_of_heads(scores: Tensor, group: ChannelGroup) -> Tensor:
    """Return scores ``(heads,)`` from those of the channels that the output projection reads ``(heads x size,)``."""
    heads = torch.tensor(group.heads[group.consumers[0]])
    return torch.zeros(group.channels, dtype=scores.dtype).index_add_(0, torch.sort(heads).values, scores)
