"""What is in a model and may be compressed: layers, coupled channel groups, residual blocks, each with a stable name.

Owns the reading of a network; it changes nothing (it works on copies). Channel coupling through residual, concat and
depthwise connections is Torch-Pruning's dependency graph (Fang et al., DepGraph, CVPR 2023); a group is believed only
after a copy of the model with that group pruned has run and kept its output shape. What cannot be compressed is
listed in `Inventory.skipped` with the reason.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, fx, nn

from autocompress.errors import CompressionError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer.

    Attributes:
        name: Qualified module name.
        kind: ``"conv"``, ``"pointwise"`` (1x1), ``"depthwise"``, ``"grouped"`` or ``"linear"``.
        in_channels, out_channels: Width of its channel axes.
        kernel: Spatial kernel size; empty for linear layers.
        macs: Multiply-accumulates for one sample.
        params: Parameters, bias included.
        factorizable: Whether a low-rank form exists (not for depthwise and grouped layers, nor for subclasses, whose
            forward may do something else with the weight).
        quantizable: Whether int8 can be simulated and exported (2D convolutions and linear layers, no subclasses).
        groups: Into how many its channels are divided, as torch counts them; 1 for linear layers.
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


@dataclass(frozen=True)
class Group:
    """Layers coupled by one shared channel axis, which can only be pruned together.

    Attributes:
        name: The first layer, in the model's order, whose output channels belong to the axis.
        channels: Length of the axis.
        producers: Layers whose output channels are pruned.
        consumers: Layers whose input channels are pruned with them.
        multiples: Consumer to how many of its input channels go with one channel of the axis: more than one behind a
            flatten, or where a layer reads the axis twice.
    """

    name: str
    channels: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    multiples: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """A residual block with an identity shortcut, which can be removed whole.

    Attributes:
        name: Qualified module name.
        layers: Layers inside it.
    """

    name: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Inventory:
    """Everything in a model that a policy may name.

    Attributes:
        layers, groups, blocks: By name, in the model's order.
        skipped: Module name to the reason why it is left alone.
        macs, params: Of the whole model, for one sample.
    """

    layers: Mapping[str, Layer]
    groups: Mapping[str, Group]
    blocks: Mapping[str, Block]
    skipped: Mapping[str, str] = field(default_factory=dict)
    macs: int = 0
    params: int = 0


def count_macs(model: nn.Module, inputs: Tensor) -> dict[str, int]:
    """Return multiply-accumulates per convolution and linear layer for ONE sample of `inputs` ``(N, ...)``."""
    macs: dict[str, int] = {}
    hooks = []

    def count(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            if isinstance(module, nn.Linear):
                positions = output[0].numel() // module.out_features
                own = module.in_features * module.out_features * positions
            else:
                own = output[0].numel() * module.weight[0].numel()  # type: ignore[index]
            macs[name] = macs.get(name, 0) + int(own)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            hooks.append(module.register_forward_hook(count(name)))
    try:
        with torch.no_grad():
            model(inputs[:1])
    finally:
        for handle in hooks:
            handle.remove()
    return macs


def take_inventory(model: nn.Module, inputs: Tensor) -> Inventory:
    """List what may be compressed in `model` (eval mode; not changed) for inputs ``(N, ...)``.

    Raises:
        CompressionError: The model does not run on its example inputs, or gives something other than one tensor.
    """
    model = copy.deepcopy(model).eval()
    try:
        with torch.no_grad():
            output = model(inputs)
    except Exception as error:  # whatever the user's forward raises
        shape = tuple(inputs.shape)
        raise CompressionError(f"The model does not run on its example inputs {shape}: {error}") from error
    if not isinstance(output, Tensor):
        raise CompressionError(f"The model must return one tensor; it returned {type(output).__name__}.")
    skipped: dict[str, str] = {}
    macs = count_macs(model, inputs)
    layers = dict(_layers(model, macs, skipped))
    groups = _groups(model, inputs, layers, skipped)
    blocks = {b.name: b for b in _blocks(model, inputs, layers)}
    return Inventory(
        layers=layers,
        groups=groups,
        blocks=blocks,
        skipped=skipped,
        macs=sum(macs.values()),
        params=sum(p.numel() for p in model.parameters()),
    )


def _layers(model: nn.Module, macs: Mapping[str, int], skipped: dict[str, str]) -> Iterator[tuple[str, Layer]]:
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.RNNBase, nn.Embedding)):
            skipped[name] = f"{type(module).__name__} is not compressed by this release"
            continue
        if not isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            continue
        if name not in macs:
            skipped[name] = "not reached by the forward pass"
            continue
        if id(weight) in owners:
            skipped[name] = f"shares its weight with {owners[id(weight)]}"
            continue
        owners[id(weight)] = name
        if isinstance(module, nn.Linear):
            kind, ins, outs = "linear", module.in_features, module.out_features
            kernel: tuple[int, ...] = ()
            groups = 1
        else:
            kernel, ins, outs = tuple(module.kernel_size), module.in_channels, module.out_channels
            groups = module.groups
            if groups == 1:
                kind = "pointwise" if all(k == 1 for k in kernel) else "conv"
            else:
                kind = "depthwise" if groups == ins else "grouped"
        quantizable = type(module) in (nn.Conv2d, nn.Linear)
        factorizable = quantizable and kind in ("conv", "pointwise", "linear")
        own = sum(p.numel() for p in module.parameters())
        yield name, Layer(name, kind, ins, outs, kernel, macs[name], own, factorizable, quantizable, groups)


# -- coupled channels -------------------------------------------------------------------------------------------------


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
            return tp.DependencyGraph().build_dependency(model, inputs[:1], verbose=False)
    except Exception as error:  # the library raises whatever it meets
        raise CompressionError(f"Channel coupling cannot be traced: {type(error).__name__}: {error}") from error
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def output_group(graph: Any, model: nn.Module, name: str, channels: Sequence[int]) -> Any:
    """Return Torch-Pruning's group for removing output `channels` of layer `name`."""
    module = model.get_submodule(name)
    return graph.get_pruning_group(module, graph.get_pruner_of_module(module).prune_out_channels, idxs=list(channels))


def _groups(model: nn.Module, inputs: Tensor, layers: Mapping[str, Layer], skipped: dict[str, str]) -> dict[str, Group]:
    try:
        graph = dependency_graph(model, inputs)
    except CompressionError as error:
        skipped["(channels)"] = str(error)
        return {}
    names = {module: name for name, module in model.named_modules()}
    order = {name: index for index, name in enumerate(layers)}
    groups: dict[str, Group] = {}
    seen: set[str] = set()
    for name, layer in layers.items():
        if name in seen:
            continue
        try:
            traced = output_group(graph, model, name, range(layer.out_channels))
        except Exception as error:  # noqa: BLE001 - one group that cannot be traced is left alone, and named
            skipped[name] = f"its channel coupling cannot be traced ({type(error).__name__}: {error})"
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
            elif not isinstance(dependency.target.module, NORMS):
                foreign.add(target)
        # A depthwise layer's input axis is its output axis: it is a member, not a consumer.
        consumers = {c for c in consumers if c not in producers or layers[c].kind != "depthwise"}
        seen |= producers
        members = sorted(producers, key=order.__getitem__)
        ordered = tuple(sorted(consumers, key=order.__getitem__))
        multiples = {c: widths[c] // layer.out_channels for c in ordered}
        group = Group(members[0], layer.out_channels, tuple(members), ordered, multiples)
        if not consumers - producers:
            skipped.setdefault(f"{group.name} (channels)", "its channels are the model's output")
        elif foreign:
            skipped.setdefault(f"{group.name} (channels)", f"coupled to {', '.join(sorted(foreign))}")
        else:
            groups[group.name] = group
    return _believed(model, inputs, groups, skipped)


def _believed(model: nn.Module, inputs: Tensor, groups: dict[str, Group], skipped: dict[str, str]) -> dict[str, Group]:
    """Keep the groups whose pruning leaves a model that runs: all at once, then by halves where that breaks."""
    good: dict[str, Group] = {}
    pending = [list(groups.values())]
    while pending:
        batch = pending.pop()
        reason = _trial_prune(model, inputs, batch) if batch else None
        if reason is None:
            good.update({group.name: group for group in batch})
        elif len(batch) == 1:
            skipped[f"{batch[0].name} (channels)"] = f"pruning it breaks the model ({reason})"
        else:
            pending += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return {name: group for name, group in groups.items() if name in good}


def _trial_prune(model: nn.Module, inputs: Tensor, groups: Sequence[Group]) -> str | None:
    """Halve every group in a copy; return why the copy does not run, or None."""
    trial = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(inputs[:1]).shape
    try:
        graph = dependency_graph(trial, inputs)
        for group in groups:
            traced = output_group(graph, trial, group.name, range(max(1, group.channels // 2)))
            if not graph.check_pruning_group(traced):
                return "it would leave no channel"
            traced.prune()
        with torch.no_grad():
            found = trial(inputs[:1]).shape
    except Exception as error:  # noqa: BLE001 - any failure means that this group is left alone
        return f"{type(error).__name__}: {str(error)[:120]}"
    return None if found == expected else f"the output became {tuple(found)}"


# -- residual blocks --------------------------------------------------------------------------------------------------


def _blocks(model: nn.Module, inputs: Tensor, layers: Mapping[str, Layer]) -> Iterator[Block]:
    shapes = _shapes(model, inputs)
    found: list[Block] = []
    for name, module in model.named_modules():
        inside = tuple(n for n in layers if n.startswith(f"{name}."))
        if not name or not inside:
            continue
        before, after, calls = shapes.get(name, (None, None, 0))
        if calls != 1 or before is None or before != after or not _is_identity_residual(module):
            continue
        found.append(Block(name, inside))
    # A chain of residual blocks is one itself: the innermost are offered.
    for block in found:
        if not any(other.name.startswith(f"{block.name}.") for other in found):
            yield block


def _shapes(model: nn.Module, inputs: Tensor) -> dict[str, tuple[torch.Size | None, torch.Size | None, int]]:
    shapes: dict[str, tuple[torch.Size | None, torch.Size | None, int]] = {}
    hooks = []

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            simple = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor)
            calls = shapes.get(name, (None, None, 0))[2] + 1
            shapes[name] = (args[0].shape if simple else None, output.shape if simple else None, calls)

        return hook

    for name, module in model.named_modules():
        hooks.append(module.register_forward_hook(watch(name)))
    try:
        with torch.no_grad():
            model(inputs[:1])
    finally:
        for handle in hooks:
            handle.remove()
    return shapes


_ADDS = {torch.add, operator.add, operator.iadd, "add", "add_"}
_ACTIVATIONS = {torch.relu, nn.functional.relu, nn.functional.relu6, "relu", "relu_"}


def _is_identity_residual(module: nn.Module) -> bool:
    """Whether the module computes ``activation(f(x) + x)`` or ``f(x) + x`` with x its only input, untouched."""
    try:
        graph = fx.symbolic_trace(module)
    except Exception:  # noqa: BLE001 - what cannot be traced is simply not offered for removal
        return False
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    output = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    if len(inputs) != 1 or not isinstance(output, fx.Node):
        return False

    def reaches_input(node: Any, depth: int = 0) -> bool:
        if node is inputs[0]:
            return True
        if not isinstance(node, fx.Node) or depth > 8:
            return False
        if node.op == "call_module":
            passes = isinstance(graph.get_submodule(str(node.target)), (nn.Identity, nn.Dropout))
            return passes and any(reaches_input(a, depth + 1) for a in node.all_input_nodes)
        return _is_add(node) and any(reaches_input(a, depth + 1) for a in node.all_input_nodes)

    def is_activation(node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(graph.get_submodule(str(node.target)), (nn.ReLU, nn.ReLU6))
        return node.op in ("call_function", "call_method") and node.target in _ACTIVATIONS

    while is_activation(output) and output.all_input_nodes:
        output = output.all_input_nodes[0]
    return _is_add(output) and reaches_input(output)


def _is_add(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in _ADDS
