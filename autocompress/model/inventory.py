"""What is in a model and may be compressed: layers, coupled channel groups, residual blocks, each with a stable name.

Owns the reading of a network, on copies: it changes nothing. `channel_groups` finds the groups. What cannot be
compressed is listed in `Inventory.skipped` with the reason.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocompress.errors import CompressionError
from autocompress.model.attention import head_axes
from autocompress.model.attention.plain import PlainAttention
from autocompress.model.channel_groups import ITS_OUTPUT, NORMS, ChannelGroup, Layer, coupled_groups
from autocompress.model.channel_tracing import CONVOLUTIONS, dependency_graph, in_every_part, output_group, parts_of
from autocompress.model.head_groups import head_groups

__all__ = [
    "CONVOLUTIONS",
    "NORMS",
    "Block",
    "ChannelGroup",
    "Inventory",
    "Layer",
    "count_macs",
    "dependency_graph",
    "in_every_part",
    "output_group",
    "parts_of",
    "take_inventory",
]


# What follows a layer's name in `Inventory.skipped` where its channels alone are left alone.
_CHANNELS = " (channels)"
_DENSE_LSTM = "LSTM is int8 on ONNX Runtime alone (--engine onnxruntime)"
_LEFT_ALONE = (
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.RNNBase, nn.RNNCellBase, nn.Embedding,
)  # fmt: skip
# Characters of a reason that are told in a sentence, and the least share of the time that is.
_WORDS, _TOLD = 90, 0.005


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
    groups: Mapping[str, ChannelGroup]
    blocks: Mapping[str, Block]
    skipped: Mapping[str, str] = field(default_factory=dict)
    macs: int = 0
    params: int = 0

    def left_alone(self, shares: Mapping[str, float] = MappingProxyType({})) -> str | None:
        """Say in a sentence what cannot be compressed, with the first reasons; None where all can be.

        Args:
            shares: Of the time that modules take, as far as they are known; reasons of those that take most come first.
        """
        parts = []
        for words, own in (("{} layer{}", self.whole_left_alone), ("the channels of {} layer{}", self.axes_left_alone)):
            if own:
                share = sum(shares.get(name, 0.0) for name in own)
                time = f", {share:.0%} of the time" if share >= _TOLD else ""
                first = max(own, key=lambda name: shares.get(name, 0.0))
                reason = own[first]
                reason = f"{reason[:_WORDS]}{'…' if len(reason) > _WORDS else ''}"
                parts.append(f"{words.format(len(own), 's' if len(own) > 1 else '')}{time} ({first}: {reason})")
        return None if not parts else f"Left alone: {', and '.join(parts)}; `autocompress inspect` lists all"

    @property
    def whole_left_alone(self) -> dict[str, str]:
        """Layers that nothing is done to, with the reason."""
        return {name: why for name, why in self.skipped.items() if "(" not in name}

    @property
    def axes_left_alone(self) -> dict[str, str]:
        """Layers whose channels are not pruned, with the reason; those that give the model's output excepted."""
        return {
            name.removesuffix(_CHANNELS): why
            for name, why in self.skipped.items()
            if name.endswith(_CHANNELS) and why != ITS_OUTPUT
        }

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data; of a group's `heads`, whether it has any."""
        found = asdict(self)
        for group in found["groups"].values():
            group["heads"] = bool(group["heads"])
        return found


def count_macs(model: nn.Module, inputs: Tensor) -> dict[str, int]:
    """Return multiply-accumulates per convolution and linear layer for ONE sample of `inputs` ``(N, ...)``."""
    return _macs(model, inputs[:1])


def _macs(model: nn.Module, inputs: Tensor) -> dict[str, int]:
    macs: dict[str, int] = {}
    hooks = []

    def count(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            if isinstance(module, nn.Linear):
                # One sample may be many rows: windows, or tokens where samples come second.
                own = module.in_features * output.numel()
            else:
                own = output.numel() * module.weight[0].numel()  # type: ignore[index]
            macs[name] = macs.get(name, 0) + int(own)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            hooks.append(module.register_forward_hook(count(name)))
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return macs


def _constant(model: nn.Module, inputs: Tensor, macs: Mapping[str, int]) -> list[str]:
    """Return the layers that read a table of positions perhaps, but not the input: what they give is always the same.

    Args:
        model: It.
        inputs: Samples ``(N, ...)``; nothing is told from one.
        macs: Of each layer for one sample.
    """
    if len(inputs) < 2:
        return []
    # Equal samples look alike in every layer.
    telling = bool((inputs != inputs[:1]).any())
    varying = set() if telling else set(macs)

    def look(given: tuple[Tensor, ...], name: str) -> None:
        # Of one that is called by keyword nothing is seen; zeros are what a dead ReLU leaves of any sample.
        x = given[0] if given else inputs
        if not (len(x) == len(inputs) and bool((x == x[:1]).all()) and bool(x.any())):
            varying.add(name)

    with ExitStack() as hooks:
        for name in macs:
            layer = model.get_submodule(name)
            hooks.callback(layer.register_forward_pre_hook(lambda _, given, name=name: look(given, name)).remove)
        of_all = _macs(model, inputs)
    # What counts no more for many samples than for one does not read them.
    return [name for name in macs if of_all.get(name) == macs[name] or name not in varying]


def _without_effect(model: nn.Module, inputs: Tensor, macs: Mapping[str, int]) -> list[str]:
    """Return the layers that are run, but whose results the output does not depend on: no graph has them.

    A layer that no gradient reaches may still be behind a `no_grad`: random results in its place tell.
    """
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in macs}
    usable = {name: w for name, w in weights.items() if isinstance(w, nn.Parameter) and w.requires_grad}
    try:
        with torch.enable_grad():
            output = model(inputs[:1].clone())
            reached: Sequence[Tensor | None] = torch.autograd.grad(
                output.float().sum(), list(usable.values()), allow_unused=True
            )
    except Exception:  # noqa: BLE001 - nothing can be told of a model that no gradient goes through
        return []
    suspects = [name for name, gradient in zip(usable, reached, strict=True) if gradient is None]
    if not suspects:
        return []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        expected = model(inputs[:1].clone())
        found = []
        for name in suspects:
            with model.get_submodule(name).register_forward_hook(lambda _, __, made: torch.randn_like(made)):
                if torch.equal(model(inputs[:1].clone()), expected):
                    found.append(name)
    return found


def take_inventory(model: nn.Module, inputs: Tensor, *, int8_lstm: bool = False) -> Inventory:
    """List what may be compressed in `model` (eval mode; not changed) for inputs ``(N, ...)``.

    Args:
        model: It.
        inputs: Samples.
        int8_lstm: Whether the engine has int8 LSTMs, which are layers then; else they are left alone.

    Raises:
        CompressionError: The model does not run on its example inputs, or gives something other than one tensor.
    """
    model = copy.deepcopy(model).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
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
    constant = _constant(model, inputs, macs)
    skipped |= dict.fromkeys(_without_effect(model, inputs, macs), "its result is not used")
    skipped |= dict.fromkeys(constant, "reads the same for every input: the graph holds what it gives as a constant")
    layers = dict(_layers(model, {n: count for n, count in macs.items() if n not in skipped}, skipped))
    axes = head_axes(model)
    apart = {layer for axis in axes.values() for layer in axis.made}
    found = coupled_groups(model, inputs, layers, skipped, apart) | head_groups(model, inputs, axes, layers, skipped)
    groups = {name: found[name] for name in layers if name in found}
    blocks = {b.name: b for b in _blocks(model, inputs, layers)}
    if int8_lstm:
        # To what is traced they remain modules of which nothing is known.
        layers = _with_lstms(layers, model, inputs, skipped)
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
    shared = _shared_weights(model)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, _LEFT_ALONE):
            kind = type(module).__name__
            skipped[name] = _DENSE_LSTM if kind == "LSTM" else f"{kind} is not compressed by this release"
            continue
        if not isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            continue
        if name not in macs:
            skipped.setdefault(name, "not reached by the forward pass")
            continue
        if id(weight) in owners:
            skipped[name] = f"shares its weight with {owners[id(weight)]}"
            continue
        owners[id(weight)] = name
        if id(weight) in shared:
            others = ", ".join(other for other in shared[id(weight)] if other != name)
            skipped[f"{name} (int8, low rank)"] = f"its weight is that of {others} too"
        if isinstance(module, nn.Linear):
            kind, ins, outs = "linear", module.in_features, module.out_features
            kernel: tuple[int, ...] = ()
            groups, stride = 1, kernel
        else:
            kernel, ins, outs = tuple(module.kernel_size), module.in_channels, module.out_channels
            groups, stride = module.groups, tuple(module.stride)
            if groups == 1:
                kind = "pointwise" if all(k == 1 for k in kernel) else "conv"
            else:
                kind = "depthwise" if groups == ins else "grouped"
        quantizable = type(module) in (*CONVOLUTIONS, nn.Linear) and id(weight) not in shared
        factorizable = quantizable and groups == 1 and type(module) in (nn.Conv2d, nn.Linear)
        own = sum(p.numel() for p in module.parameters())
        written = isinstance(model.get_submodule(name.rpartition(".")[0]), PlainAttention)
        yield (
            name,
            Layer(name, kind, ins, outs, kernel, macs[name], own, factorizable, quantizable, groups, stride, written),
        )


def _with_lstms(
    layers: Mapping[str, Layer], model: nn.Module, inputs: Tensor, skipped: dict[str, str]
) -> dict[str, Layer]:
    """Return the layers with the LSTMs among them, in the model's order; `skipped` then names their channels alone."""
    steps: dict[str, int] = {}

    def count(name: str, given: tuple[Any, ...], found: tuple[Any, ...]) -> None:
        output = found[0] if isinstance(found[0], Tensor) else found[0].data
        steps[name] = steps.get(name, 0) + output.numel() // output.shape[-1]

    lstms = {name: module for name, module in model.named_modules() if type(module) is nn.LSTM}
    with ExitStack() as hooks, torch.no_grad():
        for name, module in lstms.items():
            hooks.callback(module.register_forward_hook(partial(lambda n, _, a, b: count(n, a, b), name)).remove)
        model(inputs[:1])
    found = dict(layers)
    for name, module in lstms.items():
        if name not in steps:
            skipped[name] = "not reached by the forward pass"
        elif module.proj_size:
            skipped[name] = "an LSTM with projections has no int8 form"
        else:
            weights = [p for n, p in module.named_parameters() if "weight" in n]
            outs = module.hidden_size * (2 if module.bidirectional else 1)
            found[name] = Layer(
                name, "lstm", module.input_size, outs, (), steps[name] * sum(p.numel() for p in weights),
                sum(p.numel() for p in module.parameters()), factorizable=False, quantizable=True,
            )  # fmt: skip
            del skipped[name]
            skipped[f"{name}{_CHANNELS}"] = "the channels of an LSTM are not pruned"
    return {name: found[name] for name, _ in model.named_modules() if name in found}


def _shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Return the weights that several modules have, by their id, with the modules' names."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            users.setdefault(id(weight), []).append(name)
    return {key: names for key, names in users.items() if len(names) > 1}


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


class _Tracer(fx.Tracer):
    """Looks no further into rewritten attention than into torch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, PlainAttention) or super().is_leaf_module(m, module_qualified_name)


def _is_identity_residual(module: nn.Module) -> bool:
    """Whether the module computes ``activation(f(x) + x)`` or ``f(x) + x`` with x its only input, untouched."""
    try:
        graph = fx.GraphModule(module, _Tracer().trace(module))
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
