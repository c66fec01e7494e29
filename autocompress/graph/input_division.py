"""Channels of what linear layers read divided in the graph, before Q/DQ is put there. Numpy and onnx-ir only.

One product per tensor and divisor, shared by the layers that read it. Where the product alone reads the tensor, the
norm or layer that makes it takes the divisor up, through functions with ``f(s x) = s f(x)`` for ``s > 0``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from autocompress.errors import ExportError
from autocompress.graph.export import every_layer_node
from autocompress.graph.integer_weights import constant

_HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "Identity"})


def divide_inputs(model: ir.Model, divisors: Mapping[str, NDArray[np.float32]]) -> None:
    """Divide the channels that linear layers read, in place; their weights are multiplied already.

    Args:
        model: The graph, without Q/DQ.
        divisors: Layer to the divisor of each channel ``(C,)`` of its input's last axis.

    Raises:
        ExportError: A layer has no node in the graph.
    """
    graph, nodes = model.graph, every_layer_node(model, divisors)
    made: dict[tuple[int, bytes], ir.Value] = {}
    for name, divisor in divisors.items():
        if name not in nodes:
            raise ExportError(f"Layer {name!r} cannot be found in the exported graph, so its input cannot be divided.")
        for node in nodes[name]:
            tensor = node.inputs[0]
            assert tensor is not None
            key = (id(tensor), divisor.tobytes())
            if key not in made:
                made[key] = _divided(graph, tensor, node, np.float32(1) / divisor)
            node.replace_input_with(0, made[key])
    for product in made.values():
        _take_up(graph, product)


def _divided(graph: ir.Graph, tensor: ir.Value, before: ir.Node, factor: NDArray[np.float32]) -> ir.Value:
    taken = sum(1 for name in graph.initializers if name.startswith(f"{tensor.name}_factor"))
    name = f"{tensor.name}_factor{taken or ''}"
    node = ir.node("Mul", [tensor, constant(graph, name, factor)], num_outputs=1)
    value = node.outputs[0]
    value.name, value.shape, value.type = f"{name}_product", tensor.shape, tensor.type
    graph.insert_before(before, node)
    return value


def _take_up(graph: ir.Graph, product: ir.Value) -> None:
    """Have what makes a tensor give it divided, where nothing but the product reads it."""
    node = product.producer()
    assert node is not None
    tensor, factor = node.inputs
    assert tensor is not None and factor is not None and factor.const_value is not None
    numbers = factor.const_value.numpy()
    value = tensor
    while _read_once(value) and (maker := value.producer()) is not None and maker.op_type in _HOMOGENEOUS:
        above = maker.inputs[0]
        assert above is not None
        value = above
    if not _read_once(value) or not (stored := _stored(value, numbers.size)):
        return
    for reader, index, axis in stored:
        _multiply(graph, reader, index, numbers, axis)
    ir.convenience.replace_all_uses_with(product, tensor)
    graph.remove(node, safe=True)
    if factor.name is not None:
        del graph.initializers[factor.name]


def _read_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _stored(value: ir.Value, channels: int) -> list[tuple[ir.Node, int, int]]:
    """Return the constants that, divided along an axis, make a tensor's channels divided; none where unclear.

    Each by the node that reads it, which of its inputs it is, and the axis.
    """
    node = value.producer()
    if node is None:
        return []
    if node.op_type == "LayerNormalization":
        found = [(node, index, -1) for index in range(1, len(node.inputs)) if node.inputs[index] is not None]
    elif node.op_type == "Gemm":
        transposed = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
        found = [(node, 1, 0 if transposed else 1), *((node, index, 0) for index in range(2, len(node.inputs)))]
    elif node.op_type == "MatMul":
        found = [(node, 1, -1)]
    elif node.op_type in ("Mul", "Add"):
        # A norm's scale, or a bias and whatever it is added to.
        own = 1 if node.inputs[1] is not None and node.inputs[1].const_value is not None else 0
        found, tensor = [(node, own, -1)], node.inputs[1 - own]
        if node.op_type == "Add":
            above = _stored(tensor, channels) if tensor is not None and _read_once(tensor) else []
            found = [*found, *above] if above else []
    else:
        return []
    return found if all(_may_change(reader, index, axis, channels) for reader, index, axis in found) else []


def _may_change(node: ir.Node, index: int, axis: int, channels: int) -> bool:
    value = node.inputs[index]
    shape = () if value is None or value.const_value is None else tuple(value.const_value.numpy().shape)
    if value is None or not shape or shape[axis] != channels:
        return False
    # Of a layer that runs more than once all runs have the same weight.
    return node.op_type not in ("Gemm", "MatMul") or index != 1 or len(value.uses()) == 1


def _multiply(graph: ir.Graph, node: ir.Node, index: int, factor: NDArray[np.float32], axis: int) -> None:
    value = node.inputs[index]
    assert value is not None and value.const_value is not None
    array = value.const_value.numpy()
    shape = [1] * array.ndim
    shape[axis] = -1
    array = np.ascontiguousarray(array * factor.reshape(shape))
    if len(value.uses()) == 1:
        value.const_value = ir.tensor(array, name=value.name)
        return
    # The exporter stores equal constants once.
    taken = sum(1 for name in graph.initializers if name.startswith(f"{value.name}_divided"))
    node.replace_input_with(index, constant(graph, f"{value.name}_divided{taken or ''}", array))
