"""The uncompressed model exported once; the graph of every compressed form of it by editing that export.

An export takes seconds, and a search or a profile needs hundreds of graphs that differ from the first in the shapes of
weights, in layers that became chains of factors, and in blocks that are gone. Those are edited in milliseconds. What
cannot be edited (`bind` returns None) is exported as before; a wrong edit would fail the check that every engine gets
against the torch model. Imports torch; never loaded in the worker.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn

from autocompress.engines.export import SCOPES, layer_nodes, to_onnx
from autocompress.engines.surroundings import surroundings

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_Arrays = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class _Source:
    """Where an initializer's values come from.

    Attributes:
        name: Parameter or buffer of the model with its batch-norms folded.
        transposed: Whether it is stored transposed.
        shape: Of the initializer in the uncompressed graph.
    """

    name: str
    transposed: bool
    shape: tuple[int, ...]


class GraphTemplate:
    """One export of a model and the knowledge of where each of its weights went.

    Args:
        base: The uncompressed model, rewritten, in eval mode; not changed.
        inputs: Example inputs of exactly the shape to export ``(N, ...)``.
        blocks: Names of the blocks that may be removed.

    Raises:
        ExportError: The model cannot be exported at all.
    """

    def __init__(self, base: nn.Module, inputs: Tensor, blocks: Iterable[str] = ()) -> None:
        self._folds = _foldable(base, inputs)
        layers = [name for name, module in base.named_modules() if isinstance(module, _LAYERS)]
        # With all values different, the exporter merges and drops nothing because of what this model's weights are.
        marked = _randomised(base)
        folded = _folded(marked, self._folds)
        self._graph = to_onnx(_without_norms(marked, self._folds, folded), inputs)
        self._sources = _sources(self._graph, folded)
        nodes = layer_nodes(self._graph, layers)
        self._nodes = {name: node.name for name, node in nodes.items() if node.name is not None}
        self._layers = {node: name for name, node in self._nodes.items()}
        self.surroundings = surroundings(nodes)
        self._blocks = {block: cut for block in blocks if (cut := _cut(self._graph, block)) is not None}
        self._editable = _explained(self._graph, self._sources)
        fixed = _rigid(_loosen(self._graph), nodes)
        self._rigid = {name: folded[f"{name}.weight"].shape[0] for name in fixed}

    def layer_of(self, node: str) -> str | None:
        """Return the layer that a node of a bound graph computes, or a factor of; None when it computes none."""
        found = self._layers.get(node)
        if found is None and (parent := node.rpartition(".")[0]) in self._nodes:
            found = parent
        return found

    def bind(self, model: nn.Module, removed_blocks: Iterable[str] = ()) -> ir.Model | None:
        """Return the graph of a compressed form of the base, with its weights; None when it must be exported.

        Batch-norm is folded, quantizers are left out (as an export with quantization off does), and each layer is
        found by its name with `layer_nodes`. `model` is not changed.
        """
        removed = tuple(removed_blocks)
        if not self._editable or any(block not in self._blocks for block in removed):
            return None
        if any(_width(model, layer) not in (None, channels) for layer, channels in self._rigid.items()):
            return None
        state = _folded(model, self._folds)
        found = self._graph.clone()
        graph = found.graph
        nodes = {node.name: node for node in graph}
        for layer, node_name in self._nodes.items():
            module = _submodule(model, layer)
            if module is None or any(layer.startswith(f"{block}.") for block in removed):
                continue
            if isinstance(module, nn.Sequential):
                if node_name not in nodes or not _factorize(graph, nodes[node_name], layer, module, state):
                    return None
                last = f"{layer}.{len(module) - 1}.bias"
                if last in state:
                    state[f"{layer}.bias"] = state[last]
            elif getattr(module, "groups", 1) > 1 and node_name in nodes:
                nodes[node_name].attributes["group"] = ir.AttrInt64("group", module.groups)  # type: ignore[arg-type]
        values = _values(graph)
        around = dict(self._blocks[block] for block in removed)
        for outside, inside in around.items():
            # The block before may be gone as well.
            source = inside
            while source in around:
                source = around[source]
            ir.convenience.replace_all_uses_with(values[outside], values[source], replace_graph_outputs=True)
        RemoveUnusedNodesPass()(found)
        return found if self._refill(graph, state) else None

    def _refill(self, graph: ir.Graph, state: _Arrays) -> bool:
        """Put the model's weights into the graph; return whether all are there."""
        for name, origin in self._sources.items():
            value = graph.initializers.get(name)
            if value is None:
                continue
            array = state.get(origin.name)
            if array is None:
                return False
            _fill(value, array.T if origin.transposed else array, origin)
        return True


def _fill(value: ir.Value, array: NDArray[np.float32], source: _Source) -> None:
    if array.ndim != len(source.shape):
        # A token or an embedding that the exporter gave another shape.
        array = array.reshape(source.shape)
    array = np.ascontiguousarray(array)
    value.const_value = ir.tensor(array, name=value.name)
    value.shape = ir.Shape(array.shape)


# -- batch-norm -------------------------------------------------------------------------------------------------------


def _foldable(model: nn.Module, inputs: Tensor) -> dict[str, str]:
    """Return convolution to batch-norm where one batch-norm reads exactly what the convolution gave."""
    made: dict[int, tuple[str, Tensor]] = {}
    pairs: dict[str, str] = {}
    calls: dict[str, int] = {}
    hooks = []

    def after(name: str) -> object:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            made[id(output)] = (name, output)

        return hook

    def before(name: str) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            calls[name] = calls.get(name, 0) + 1
            if args and id(args[0]) in made:
                pairs[made[id(args[0])][0]] = name

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            hooks.append(module.register_forward_hook(after(name)))  # type: ignore[arg-type]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            hooks.append(module.register_forward_pre_hook(before(name)))  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in hooks:
            handle.remove()
    once = {conv: norm for conv, norm in pairs.items() if calls[conv] == calls[norm] == 1}
    marked = _randomised(model)
    if _folds_truly(marked, once, inputs):
        return once
    # What some convolution gives is read by something else as well.
    return {conv: norm for conv, norm in once.items() if _folds_truly(marked, {conv: norm}, inputs)}


def _folds_truly(model: nn.Module, folds: Mapping[str, str], inputs: Tensor) -> bool:
    """Whether the model without these norms computes the same."""
    with torch.no_grad():
        wanted, found = model(inputs), _without_norms(model, folds, _folded(model, folds))(inputs)
    return bool(torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())))


def _folded(model: nn.Module, folds: Mapping[str, str]) -> dict[str, NDArray[np.float32]]:
    """Return parameters and buffers as float32 arrays, batch-norms of `folds` folded into their convolutions."""
    state = {name: t.detach() for name, t in model.state_dict().items() if t.is_floating_point()}
    for conv, name in folds.items():
        layer, norm = _submodule(model, conv), _submodule(model, name)
        if layer is None or not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            continue
        last = f"{conv}.{len(layer) - 1}" if isinstance(layer, nn.Sequential) else conv
        mean, variance = state[f"{name}.running_mean"].double(), state[f"{name}.running_var"].double()
        scale = torch.rsqrt(variance + norm.eps) * state.get(f"{name}.weight", torch.ones_like(variance))
        weight = state[f"{last}.weight"]
        bias = state.get(f"{last}.bias", torch.zeros_like(mean))
        shift = state.get(f"{name}.bias", torch.zeros_like(mean))
        state[f"{last}.weight"] = weight * scale.view(-1, *[1] * (weight.ndim - 1))
        state[f"{last}.bias"] = (bias - mean) * scale + shift
    return {name: t.float().contiguous().numpy() for name, t in state.items()}


def _randomised(model: nn.Module) -> nn.Module:
    marked = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in marked.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return marked


def _without_norms(model: nn.Module, folds: Mapping[str, str], folded: _Arrays) -> nn.Module:
    model = copy.deepcopy(model)
    for conv, norm in folds.items():
        layer = model.get_submodule(conv)
        layer.weight = nn.Parameter(torch.from_numpy(folded[f"{conv}.weight"].copy()))
        layer.bias = nn.Parameter(torch.from_numpy(folded[f"{conv}.bias"].copy()))
        parent, _, child = norm.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
    return model.eval()


# -- the graph --------------------------------------------------------------------------------------------------------


def _sources(model: ir.Model, folded: _Arrays) -> dict[str, _Source]:
    """Match every initializer to a parameter by its values, and name it as the parameter."""
    known: dict[bytes, tuple[str, bool]] = {}
    for name, array in folded.items():
        if array.ndim == 2:
            known.setdefault(np.ascontiguousarray(array.T).tobytes(), (name, True))
    for name, array in folded.items():
        known[array.tobytes()] = (name, False)
    found: dict[str, _Source] = {}
    initializers = model.graph.initializers
    for value in list(initializers.values()):
        if value.const_value is None or value.name is None:
            continue
        array = value.const_value.numpy()
        match = known.get(np.ascontiguousarray(array).tobytes()) if array.dtype == np.float32 else None
        if match is None:
            continue
        name, transposed = match
        if name != value.name and name not in initializers:
            value.name = name
        found[value.name] = _Source(name, transposed, tuple(array.shape))
    return found


def _explained(model: ir.Model, sources: Mapping[str, _Source]) -> bool:
    """Whether no initializer may be something that the exporter computed from weights."""
    return not any(
        value.const_value is not None
        and value.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
        and value.const_value.size > 1
        and name not in sources
        for name, value in model.graph.initializers.items()
    )


def _cut(model: ir.Model, block: str) -> tuple[str, str] | None:
    """Return the names of a block's output and input tensors; None when it has more than one, or gives the result."""
    inside = {id(node): node for node in model.graph if block in _scopes(node)}
    ins: dict[int, ir.Value] = {}
    outs: dict[int, ir.Value] = {}
    for node in inside.values():
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if value is None or value.const_value is not None or (producer is not None and id(producer) in inside):
                continue
            if producer is None and not value.is_graph_input():
                continue
            ins[id(value)] = value
        for value in node.outputs:
            if value.is_graph_output() or any(id(use.node) not in inside for use in value.uses()):
                outs[id(value)] = value
    if len(ins) != 1 or len(outs) != 1:
        return None
    output, entry = next(iter(outs.values())), next(iter(ins.values()))
    if output.is_graph_output():
        # What the network gives is called by its name.
        return None
    return (output.name, entry.name) if output.name and entry.name else None


def _scopes(node: ir.Node) -> list[str]:
    text = node.metadata_props.get(SCOPES)
    return list(ast.literal_eval(text)) if text else []


def _loosen(model: ir.Model) -> list[ir.Node]:
    """Take the base's channel counts out of the graph: inferred shapes, and those in reshapes.

    Returns the nodes that a count may still be in.
    """
    rigid, counts = [], {}
    for node in model.graph:
        if node.op_type == "Reshape" and node.inputs[1] is not None and node.inputs[1].const_value is not None:
            shape = _freed(node.inputs[0], node.inputs[1].const_value.numpy())
            if shape is None:
                rigid.append(node)
            else:
                counts[node] = shape
        elif node.op_type in _COUNTING:
            rigid.append(node)
    for node, shape in counts.items():
        loose = ir.Value(name=f"{node.name}_shape", const_value=ir.tensor(np.array(shape, np.int64)))
        loose.shape, loose.dtype = ir.Shape([len(shape)]), ir.DataType.INT64
        model.graph.register_initializer(loose)
        node.replace_input_with(1, loose)
        node.attributes.pop("allowzero", None)
    outputs = set(map(id, model.graph.outputs))
    for node in model.graph:
        for value in node.outputs:
            if id(value) not in outputs:
                value.shape = None
    return rigid


# Ops that take numbers of channels where they take numbers.
_COUNTING = frozenset({"Split", "Slice", "Expand"})


def _freed(value: ir.Value | None, wanted: NDArray[np.int64]) -> list[int] | None:
    """Return a reshape's target as what stays (0) and what follows from the rest (-1); None when that is unclear."""
    shape = [int(size) for size in wanted]
    if min(shape, default=0) < 1:
        return shape if shape.count(-1) == 1 and len(shape) <= 2 else None
    given = [] if value is None or value.shape is None else list(value.shape)
    same = 0
    while same < min(len(given), len(shape)) and given[same] == shape[same]:
        same += 1
    if len(shape) - same <= 1:
        return [*[0] * same, *[-1] * (len(shape) - same)]
    return [shape[0], -1] if len(shape) == 2 else None


def _rigid(fixed: Iterable[ir.Node], layers: Mapping[str, ir.Node]) -> set[str]:
    """Return the layers whose results reach nodes that hold numbers of channels, with no other layer between."""
    names = {id(node): name for name, node in layers.items()}
    pending = [value for node in fixed for value in node.inputs]
    found, seen = set(), set()
    while pending:
        value = pending.pop()
        producer = None if value is None else value.producer()
        if producer is None or id(producer) in seen:
            continue
        seen.add(id(producer))
        if id(producer) in names:
            found.add(names[id(producer)])
        else:
            pending.extend(producer.inputs)
    return found


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    found = {value.name: value for node in graph for value in node.outputs if value.name}
    return {**found, **{value.name: value for value in graph.inputs if value.name}}


def _width(model: nn.Module, layer: str) -> int | None:
    """Return how many channels a layer gives; None when it is gone."""
    module = _submodule(model, layer)
    last = module[-1] if isinstance(module, nn.Sequential) else module
    weight = getattr(last, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


# -- factors ----------------------------------------------------------------------------------------------------------


def _factorize(graph: ir.Graph, node: ir.Node, layer: str, factors: nn.Sequential, state: _Arrays) -> bool:
    """Replace a layer's node by one for each factor; return whether that could be done."""
    source = node.inputs[0]
    made: list[ir.Node] = []
    for index, factor in enumerate(factors):
        name = f"{layer}.{index}"
        weight = state[f"{name}.weight"]
        bias = state.get(f"{name}.bias")
        if isinstance(factor, nn.Conv2d) and node.op_type == "Conv":
            attributes = _convolution(factor)
            if attributes is None:
                return False
        elif isinstance(factor, nn.Linear) and node.op_type == "Gemm":
            attributes = {"transB": 1}
        elif isinstance(factor, nn.Linear) and node.op_type == "MatMul":
            # An Add after it holds the bias, under the layer's own name.
            attributes, bias, weight = {}, None, np.ascontiguousarray(weight.T)
        else:
            return False
        inputs = [source, _initializer(graph, f"{name}.weight", weight)]
        if bias is not None:
            inputs.append(_initializer(graph, f"{name}.bias", bias))
        made.append(ir.node(node.op_type, inputs, attributes, num_outputs=1, name=name))
        source = made[-1].outputs[0]
        source.name = f"{name}.output"
    graph.insert_before(node, made)
    old, new = node.outputs[0], made[-1].outputs[0]
    name, new.dtype = old.name or layer, old.dtype or ir.DataType.FLOAT
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    new.name = name
    return True


def _convolution(factor: nn.Conv2d) -> dict[str, list[int] | int] | None:
    if isinstance(factor.padding, str) or factor.padding_mode != "zeros":
        return None
    return {
        "kernel_shape": list(factor.kernel_size),
        "strides": list(factor.stride),
        "pads": [*factor.padding, *factor.padding],
        "dilations": list(factor.dilation),
        "group": factor.groups,
    }


def _initializer(graph: ir.Graph, name: str, array: NDArray[np.float32]) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.FLOAT
    graph.register_initializer(value)
    return value
