"""Channels that can only be pruned together, through residual, concat and depthwise connections.

The coupling is Torch-Pruning's dependency graph (Fang et al., DepGraph, CVPR 2023). That graph guesses at reshapes and
concatenations, so a group is believed only after a copy of the model with it pruned has run, has kept its output shape,
and gives what the whole model gives with the same channels silenced. A group that fails is left alone, and named.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.errors import CompressionError
from autocompress.model.channel_tracing import CONVOLUTIONS, dependency_graph, in_every_part, output_group, parts_of

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
# What has parameters of each channel that go with it, and makes no channels of its own.
_FOLLOWERS = (*NORMS, nn.modules.instancenorm._InstanceNorm, nn.PReLU)


# Why the channels of a last layer stay.
ITS_OUTPUT = "its channels are the model's output"
_UNREAD = "no layer that can be pruned reads its channels"


@dataclass(frozen=True)
class Layer:
    """One convolution, linear layer or LSTM.

    Attributes:
        name: Qualified module name.
        kind: ``"conv"``, ``"pointwise"`` (1x1), ``"depthwise"``, ``"grouped"``, ``"linear"`` or ``"lstm"``.
        in_channels, out_channels: Width of its channel axes.
        kernel: Spatial kernel size; empty for linear layers and LSTMs.
        macs: Multiply-accumulates for one sample.
        params: Parameters, bias included.
        factorizable: Whether a low-rank form exists (not for depthwise and grouped layers, nor for subclasses, whose
            forward may do something else with the weight).
        quantizable: Whether int8 can be simulated and exported (no subclasses).
        groups: Into how many its channels are divided, as torch counts them; 1 for linear layers.
        stride: Of a convolution; empty for linear layers.
        rewritten: Whether the user's model computes it by bare parameters, and `compress.rewrite` made a layer of them.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    macs: int
    params: int
    factorizable: bool
    quantizable: bool
    groups: int = 1
    stride: tuple[int, ...] = ()
    rewritten: bool = False


@dataclass(frozen=True)
class ChannelGroup:
    """Layers coupled by one shared channel axis, which can only be pruned together; or the heads of one attention.

    Attributes:
        name: The first layer, in the model's order, whose output channels belong to the axis.
        channels: Length of the axis. Of attention heads: how many there are, each one channel here.
        producers: Layers whose output channels are pruned.
        consumers: Layers whose input channels are pruned with them.
        multiples: Consumer to how many of its input channels go with one channel of the axis: more than one behind a
            flatten, or where a layer reads the axis twice.
        parts: Into how many equal parts the axis falls, each of which loses the same places: the groups of a grouped
            convolution or of a group norm in it.
        heads: Of attention heads alone: layer to the head that each of its output channels (producers) or input
            channels (consumers) belongs to.
    """

    name: str
    channels: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    multiples: Mapping[str, int] = field(default_factory=dict)
    parts: int = 1
    heads: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def outputs_of(self, producer: str, kept: Collection[int]) -> list[int]:
        """Return which output channels of a producer are left when of the axis only `kept` are, ascending."""
        heads = self.heads.get(producer)
        return sorted(kept) if heads is None else [row for row, head in enumerate(heads) if head in kept]

    def outputs_each(self, producer: str) -> int:
        """Return how many output channels of a producer go with one channel of the axis."""
        return len(self.heads.get(producer, ())) // self.channels or 1


def _shared_norm(traced: Any, names: Mapping[nn.Module, str]) -> str | None:
    """Return a group norm that divides this axis together with others (behind a concatenation), or None.

    What is left of the axis would fall into other groups than before.
    """
    for dependency, indices in traced:
        module = dependency.target.module
        if isinstance(module, nn.GroupNorm) and module.num_groups > 1 and len(indices) != module.num_channels:
            return names.get(module)
    return None


def _half(group: ChannelGroup) -> list[int]:
    """Return half of a group's channels, drawn at random: a regular half may fit a model that no other half fits."""
    size = group.channels // group.parts
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(0))[: max(1, size // 2)]
    return in_every_part(drawn.tolist(), group.channels, group.parts)


def coupled_groups(
    model: nn.Module,
    inputs: Tensor,
    layers: Mapping[str, Layer],
    skipped: dict[str, str],
    heads: Collection[str] = (),
) -> dict[str, ChannelGroup]:
    """Return the groups of channels of `model` (eval mode; not changed) whose pruning is known to work, by name.

    Args:
        model: Network.
        inputs: Its example inputs ``(N, ...)``.
        layers: What may be pruned.
        skipped: Takes what is left alone, with the reason.
        heads: Layers whose outputs are attention heads, which lose whole heads or nothing.
    """
    try:
        graph = dependency_graph(model, inputs)
    except CompressionError as error:
        skipped["(channels)"] = str(error)
        return {}
    # A module that nothing is known of may read what no layer reads; without one that is the output, in any shape.
    unknown = any("(" not in name for name in skipped)
    given = _output_shape(model, inputs[:1]) if unknown else None
    names = {module: name for name, module in model.named_modules()}
    order = {name: index for index, name in enumerate(layers)}
    groups: dict[str, ChannelGroup] = {}
    seen: set[str] = set()
    for name, layer in layers.items():
        if name in seen or name in heads:
            continue
        try:
            traced = output_group(graph, model, name, range(layer.out_channels))
            parts = parts_of(graph, model, name, traced)
        except Exception as error:  # noqa: BLE001 - one group that cannot be traced is left alone, and named
            skipped[f"{name} (channels)"] = _untraced(error)
            continue
        producers: set[str] = set()
        consumers: set[str] = set()
        foreign: set[str] = set()
        widths: dict[str, int] = {}
        for dependency, indices in traced:
            target = names.get(dependency.target.module)
            if target is None:
                continue
            is_output = graph.is_out_channel_pruning_fn(dependency.handler)
            if target in layers:
                (producers if is_output else consumers).add(target)
                if not is_output:
                    widths[target] = widths.get(target, 0) + len(indices)
            elif not isinstance(dependency.target.module, _FOLLOWERS):
                foreign.add(target)
        # A depthwise layer's input axis is its output axis: it is a member, not a consumer.
        consumers = {c for c in consumers if c not in producers or layers[c].kind != "depthwise"}
        seen |= producers
        members = sorted(producers, key=order.__getitem__)
        ordered = tuple(sorted(consumers, key=order.__getitem__))
        multiples = {c: widths[c] // layer.out_channels for c in ordered}
        group = ChannelGroup(members[0], layer.out_channels, tuple(members), ordered, multiples, parts)
        norm = _shared_norm(traced, names)
        reason = _unfit(group, consumers - producers, foreign | producers.intersection(heads), norm)
        if reason == ITS_OUTPUT and given is not None and layer.out_channels not in given:
            reason = _UNREAD
        if reason is None:
            groups[group.name] = group
        else:
            skipped.setdefault(f"{group.name} (channels)", reason)
    return _believed(_Trials(model, inputs, graph), groups, skipped)


def _output_shape(model: nn.Module, inputs: Tensor) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(model(inputs).shape)


def _untraced(error: Exception) -> str:
    if isinstance(error, ValueError) and "not in the dependency graph" in str(error):
        return "no gradient goes through it (no_grad or detach in forward), so what shares its channels cannot be seen"
    if isinstance(error, CompressionError):
        return f"its channel coupling cannot be traced ({error})"
    return f"its channels cannot be followed to what reads them ({type(error).__name__} in Torch-Pruning)"


def _unfit(group: ChannelGroup, consumers: Collection[str], foreign: Collection[str], norm: str | None) -> str | None:
    """Return why a group cannot be pruned, going by what is in it; None when it may be."""
    if not consumers:
        return ITS_OUTPUT
    if foreign:
        return f"coupled to {', '.join(sorted(foreign))}"
    if norm is not None:
        return f"{norm} normalises its channels in groups together with those of other layers"
    if group.channels % group.parts or group.channels == group.parts:
        return f"{group.channels} channels in {group.parts} parts cannot be thinned equally"
    return None


def _believed(trials: _Trials, groups: dict[str, ChannelGroup], skipped: dict[str, str]) -> dict[str, ChannelGroup]:
    """Keep the groups whose pruning works, together with those kept before: all at once, then by halves."""
    good: list[ChannelGroup] = []
    pending = [list(groups.values())]
    while pending:
        batch = pending.pop()
        reason = trials.reason_against([*good, *batch]) if batch else None
        if reason is None:
            good += batch
        elif len(batch) == 1:
            skipped[f"{batch[0].name} (channels)"] = f"pruning it breaks the model ({reason})"
        else:
            pending += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]
    kept = {group.name for group in good}
    return {name: group for name, group in groups.items() if name in kept}


# Relative error (RMS) between a pruned model and the whole one with the same channels silenced: rounding alone.
_SAME = 1e-3


class _Trials:
    """Prunes copies of a model.

    Args:
        model: The model, in eval mode; not changed.
        inputs: Example inputs ``(N, ...)``.
        graph: Its dependency graph.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, graph: Any) -> None:
        self._model, self._inputs, self._graph = model, inputs[:1], graph
        self._names = {module: name for name, module in model.named_modules()}
        self._known: dict[str, list[tuple[str, list[int], bool]]] = {}

    def reason_against(self, groups: Sequence[ChannelGroup]) -> str | None:
        """Halve these groups in a copy; return why that does not work, or None."""
        trial = copy.deepcopy(self._model)
        try:
            graph = dependency_graph(trial, self._inputs)
            for group in groups:
                traced = output_group(graph, trial, group.name, _half(group))
                if not graph.check_pruning_group(traced):
                    return "it would leave no channel"
                traced.prune()
            with torch.no_grad():
                found = trial(self._inputs)
            expected, comparable = self._silenced(groups)
        except Exception as error:  # noqa: BLE001 - any failure means that this group is left alone
            return f"{type(error).__name__}: {str(error)[:120]}"
        if found.shape != expected.shape:
            return f"the output became {tuple(found.shape)}"
        if comparable and bool(expected.isfinite().all()):
            scale = expected.square().mean().sqrt().clamp_min(1e-12)
            if not float((found - expected).square().mean().sqrt() / scale) < _SAME:
                return "it removes other channels than the layers that read them expect"
        return None

    def _silenced(self, groups: Sequence[ChannelGroup]) -> tuple[Tensor, bool]:
        """Return what the model gives when nobody makes or reads these channels, and whether pruning must too.

        It need not where a norm takes the mean over channels.
        """
        silent = copy.deepcopy(self._model)
        comparable = True
        with torch.no_grad():
            for group in groups:
                for name, indices, made in self._touched(group):
                    module = silent.get_submodule(name)
                    comparable = comparable and not isinstance(module, (nn.LayerNorm, nn.GroupNorm))
                    _silence(module, indices, made=made)
            return silent(self._inputs), comparable

    def _touched(self, group: ChannelGroup) -> list[tuple[str, list[int], bool]]:
        """Return modules, which channels of theirs go with half of a group, and whether they make or read these."""
        if group.name not in self._known:
            traced = output_group(self._graph, self._model, group.name, _half(group))
            self._known[group.name] = [
                (name, list(indices), self._graph.is_out_channel_pruning_fn(dependency.handler))
                for dependency, indices in traced
                if (name := self._names.get(dependency.target.module)) is not None
            ]
        return self._known[group.name]


def _silence(module: nn.Module, channels: Sequence[int], *, made: bool) -> None:
    """Set to zero what a layer or batch-norm makes of these output channels, or reads of these input channels."""
    if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
        groups = getattr(module, "groups", 1)
        if made or groups == getattr(module, "in_channels", 0) > 1:
            module.weight[channels] = 0
            if module.bias is not None:
                module.bias[channels] = 0
        else:
            # Output channels of one group read the input channels of that group alone.
            read, filled = module.weight.shape[1], len(module.weight) // groups
            for channel in channels:
                first = channel // read * filled
                module.weight[first : first + filled, channel % read] = 0
    elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)) and module.affine:
        module.weight[channels] = 0
        module.bias[channels] = 0
