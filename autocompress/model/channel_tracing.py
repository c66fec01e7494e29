"""Torch-Pruning's dependency graph of a model, and what shares a channel with a layer going by it.

The graph guesses, and gives up a whole model for one operation that it does not know: here it gives up what reaches
that operation alone. `channel_groups` believes nothing of it before a copy of the model was pruned so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import index_mapping
from torch_pruning.dependency.group import Group as TracedGroup

from autocompress.errors import CompressionError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def dependency_graph(model: nn.Module, inputs: Tensor) -> Any:
    """Build Torch-Pruning's dependency graph of a model in eval mode; gradients are needed for its tracing.

    Raises:
        CompressionError: The model cannot be traced, data-dependent control flow being the usual reason.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            with _forgiving(model):
                return tp.DependencyGraph().build_dependency(model, inputs[:1], verbose=False)
    except Exception as error:  # the library raises whatever it meets
        raise CompressionError(f"Channel coupling cannot be traced: {type(error).__name__}: {error}") from error
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        _drop_traced(model)


def _drop_traced(model: nn.Module) -> None:
    """Let go of what modules remember of a pass with gradients (tables of biases, say): it cannot be copied."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())
            elif isinstance(value, dict):
                for key in [key for key, kept in value.items() if isinstance(kept, Tensor) and not kept.is_leaf]:
                    del value[key]


def output_group(graph: Any, model: nn.Module, name: str, channels: Sequence[int]) -> Any:
    """Return Torch-Pruning's group for removing output `channels` of layer `name`."""
    module = model.get_submodule(name)
    with _forgiving(model):
        return graph.get_pruning_group(
            module, graph.get_pruner_of_module(module).prune_out_channels, idxs=list(channels)
        )


def parts_of(graph: Any, model: nn.Module, name: str, traced: Any) -> int:
    """Return into how many parts the axis of a layer's outputs falls, each of which must lose the same places.

    Those of grouped convolutions and group norms in it, and halves that are multiplied with each other.

    Args:
        graph: Of `model`.
        model: It.
        name: The layer.
        traced: Its group of all channels.

    Raises:
        CompressionError: Channels go together in other sets.
    """
    parts = 1
    for dependency, _ in traced:
        module = dependency.target.module
        # Of a depthwise convolution each channel is a group of its own, and goes with it.
        if isinstance(module, CONVOLUTIONS) and 1 < module.groups < module.in_channels:
            parts = math.lcm(parts, module.groups)
        elif isinstance(module, nn.GroupNorm):
            parts = math.lcm(parts, module.num_groups)
    layer = model.get_submodule(name)
    channels = len(layer.weight)  # type: ignore[arg-type]
    together: set[int] = set()
    for dependency, indices in output_group(graph, model, name, [0]):
        if dependency.target.module is layer and graph.is_out_channel_pruning_fn(dependency.handler):
            together |= set(indices)
    halves = len(together)
    if sorted(together) != [place * channels // halves for place in range(halves)]:
        raise CompressionError("its channels go together in sets of other places")
    return math.lcm(parts, halves)


def in_every_part(places: Iterable[int], channels: int, parts: int) -> list[int]:
    """Return the channels that are at `places`, counted within a part, in each of `parts` parts of an axis."""
    size = channels // parts
    return sorted(part * size + place for place in places for part in range(parts))


# What Torch-Pruning works out for each operation that moves channels about.
_MAPPINGS = ("concat", "split", "reshape", "unbind", "expand", "slice")
# Dependencies of one group, over the nodes of the graph: each is met a few times, unless channels go round in a ring.
_MOST_MET, _LEAST_BOUND = 8, 500


@contextmanager
def _forgiving(model: nn.Module) -> Iterator[None]:
    """Keep what Torch-Pruning gets wrong about one operation from costing a model all of its groups.

    It divides by a number of channels that it takes to be zero (channel shuffles, windows of attention): such a reshape
    is left unmapped, and what couples wrongly through it fails its trial. It adds up numbers that it does not know
    (states of an LSTM, rotary positions): what reaches such an operation is given up. Where reshapes and concatenations
    form a ring it goes round without end: a group with more channels than any layer has, or many times as many
    dependencies as there are operations, is given up.
    """
    kept = {name: getattr(index_mapping, name) for name in (f"update_{kind}_index_mapping" for kind in _MAPPINGS)}
    flattened, add = index_mapping._FlattenIndexMapping.__call__, TracedGroup.add_dep
    widest = max((max(p.shape[:2]) for p in model.parameters() if p.ndim > 1), default=0)
    most = _LEAST_BOUND + _MOST_MET * sum(1 for _ in model.modules())

    def forgiving(update: Any) -> Any:
        def mapped(graph: Any, node: Any) -> None:
            try:
                update(graph, node)
            except ZeroDivisionError:
                return
            except (TypeError, IndexError, AttributeError, ValueError):
                for dependency in (*node.dependencies, *(d for n in node.inputs for d in n.dependencies)):
                    if node in (dependency.source, dependency.target):
                        dependency.index_mapping[1] = _unknown

        return mapped

    def bounded(mapping: Any, indices: Any) -> Any:
        if len(indices) * (1 if mapping.reverse else mapping._stride) > widest:
            raise CompressionError("it couples more channels than any layer has")
        return flattened(mapping, indices)

    def counted(group: Any, dep: Any, idxs: Any) -> None:
        if len(group) > most:
            raise CompressionError("its channels go round in a ring")
        add(group, dep, idxs)

    for name, update in kept.items():
        setattr(index_mapping, name, forgiving(update))
    index_mapping._FlattenIndexMapping.__call__, TracedGroup.add_dep = bounded, counted
    try:
        yield
    finally:
        for name, update in kept.items():
            setattr(index_mapping, name, update)
        index_mapping._FlattenIndexMapping.__call__, TracedGroup.add_dep = flattened, add


def _unknown(_: Any) -> Any:
    raise CompressionError("its channels go through an operation that could not be followed")
