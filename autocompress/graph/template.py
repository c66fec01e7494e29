"""The uncompressed model exported once; the graph of every compressed form of it by editing that export.

An export takes seconds, and a search or a profile needs hundreds of graphs that differ from the first in the shapes of
weights, in layers that became chains of factors, and in blocks that are gone. Those are edited in milliseconds. What
cannot be edited (`bind` returns None) is exported as before; a wrong edit would fail the check that every engine gets
against the torch model. Imports torch; never loaded in the worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn

from autocompress.errors import ExportError
from autocompress.graph.export import layer_nodes, modules_of, to_onnx
from autocompress.graph.head_reshapes import free_heads, set_shape
from autocompress.graph.int8_lstm import lstm_nodes
from autocompress.graph.qdq_rules import multiplies_activations
from autocompress.graph.tensor_dtypes import feeding, structure, wiring
from autocompress.model.attention import head_axes, keep_heads
from autocompress.model.batch_norm_folding import Arrays, foldable, folded, randomised, submodule, without_norms

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


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

    Attributes:
        structure: The graph's operations and how they are joined, as a hash.
        wiring: Who reads whose result.
        has_attention: Whether it multiplies activations by each other.

    Raises:
        ExportError: The model cannot be exported at all.
    """

    def __init__(self, base: nn.Module, inputs: Tensor, blocks: Iterable[str] = ()) -> None:
        self._folds = foldable(base, inputs)
        layers = [name for name, module in base.named_modules() if isinstance(module, _LAYERS)]
        # With all values different, the exporter merges and drops nothing because of what this model's weights are.
        marked = randomised(base)
        weights = folded(marked, self._folds)
        self._graph = to_onnx(without_norms(marked, self._folds, weights), inputs)
        self._sources = _sources(self._graph, weights)
        nodes = layer_nodes(self._graph, layers)
        self._nodes = {name: node.name for name, node in nodes.items() if node.name is not None}
        self._layers = {node: name for name, node in self._nodes.items()}
        lstms = [name for name, module in base.named_modules() if isinstance(module, nn.LSTM)]
        self._layers |= {node.name: name for name in lstms for node in lstm_nodes(self._graph, name) if node.name}
        self.structure = structure(self._graph)
        self.has_attention = any(multiplies_activations(v) for node in self._graph.graph for v in node.outputs)
        self._blocks = {block: cut for block in blocks if (cut := _cut(self._graph, block)) is not None}
        values = _values(self._graph.graph)
        ends = {block: (values[given], values[read]) for block, (given, read) in self._blocks.items()}
        self.wiring = wiring(self._graph, nodes, ends, lambda node, block: block in modules_of(node))
        self._editable = _explained(self._graph, self._sources)
        self._names = {id(node): name for name, node in nodes.items()}
        # Layers that must keep their width.
        counted = [value for node in _loosen(self._graph) for value in node.inputs]
        self._rigid = {name: weights[f"{name}.weight"].shape[0] for name in feeding(counted, self._names)}
        self._axes = {layer: axis for axis in head_axes(base).values() for layer in axis.made}
        self._base, self._inputs = base, inputs

    @property
    def norms(self) -> dict[str, str]:
        """Layer to the batch-norm that is folded into it."""
        return self._folds

    def layer_of(self, node: str) -> str | None:
        """Return the layer that a node of a bound graph computes, or a factor of; None when it computes none."""
        found = self._layers.get(node)
        if found is None and (parent := node.rpartition(".")[0]) in self._nodes:
            found = parent
        return found

    def modules_of(self, node: str) -> Sequence[str]:
        """Return the modules that a node of a bound graph lies in, the innermost last; none of an unknown one."""
        return self._scopes_by_node.get(node, ())

    @cached_property
    def _scopes_by_node(self) -> dict[str, list[str]]:
        return {node.name: modules_of(node) for node in self._graph.graph if node.name is not None}

    def bind(self, model: nn.Module, removed_blocks: Iterable[str] = ()) -> ir.Model | None:
        """Return the graph of a compressed form of the base, with its weights; None when it must be exported.

        Batch-norm is folded, quantizers are left out (as an export with quantization off does), and each layer is
        found by its name with `layer_nodes`. `model` is not changed.
        """
        removed = tuple(removed_blocks)
        if not self._editable or any(block not in self._blocks for block in removed):
            return None
        changed = {layer for layer, channels in self._rigid.items() if _width(model, layer) not in (None, channels)}
        if changed and not (changed <= self._axes.keys() and self._takes_any_heads):
            return None
        state = folded(model, self._folds)
        found = self._graph.clone()
        graph = found.graph
        nodes = {node.name: node for node in graph}
        for layer, node_name in self._nodes.items():
            module = submodule(model, layer)
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

    @cached_property
    def _takes_any_heads(self) -> bool:
        """Whether the graph, loosened now, does for any number of heads: it costs a second export."""
        fewer = randomised(self._base)
        for axis in {axis.module: axis for axis in self._axes.values() if axis.heads > 1}.values():
            keep_heads(fewer, axis, range(axis.heads - 1))
        try:
            other = to_onnx(without_norms(fewer, self._folds, folded(fewer, self._folds)), self._inputs)
        except ExportError:
            return False
        _loosen(other)
        return free_heads(self._graph, other, self._names, self._axes)

    def _refill(self, graph: ir.Graph, state: Arrays) -> bool:
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
        # A token or an embedding that the exporter gave another shape; or one number for each channel, fewer now.
        channels = [size for size in source.shape if size != 1]
        shape = tuple(-1 if size != 1 else 1 for size in source.shape) if len(channels) == 1 else source.shape
        array = array.reshape(shape)
    array = np.ascontiguousarray(array)
    value.const_value = ir.tensor(array, name=value.name)
    value.shape = ir.Shape(array.shape)


# -- the graph --------------------------------------------------------------------------------------------------------


def _sources(model: ir.Model, folded: Arrays) -> dict[str, _Source]:
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
    inside = {id(node): node for node in model.graph if block in modules_of(node)}
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
        set_shape(model, node, shape)
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


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    found = {value.name: value for node in graph for value in node.outputs if value.name}
    return {**found, **{value.name: value for value in graph.inputs if value.name}}


def _width(model: nn.Module, layer: str) -> int | None:
    """Return how many channels a layer gives; None when it is gone."""
    module = submodule(model, layer)
    last = module[-1] if isinstance(module, nn.Sequential) else module
    weight = getattr(last, "weight", None)
    return None if weight is None else int(weight.shape[0])


# -- factors ----------------------------------------------------------------------------------------------------------


def _factorize(graph: ir.Graph, node: ir.Node, layer: str, factors: nn.Sequential, state: Arrays) -> bool:
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
