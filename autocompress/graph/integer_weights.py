"""Weights and biases of an ONNX graph, stored as integers behind a DequantizeLinear. Numpy and onnx-ir only."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from autocompress.engines.rules import QdqRules
from autocompress.errors import ExportError

# Smallest step of a channel as a share of the layer's largest. OpenVINO multiplies and divides by steps in fp32.
_SMALLEST_STEP = 1e-4


def store_in_int8(
    graph: ir.Graph, node: ir.Node, name: str, given: float, rules: QdqRules
) -> NDArray[np.float32] | None:
    """Store a layer's weight and, where the rules say so, its bias as integers; `given` is the step of its input.

    Returns what rounding added to the bias ``(out,)``, or None where it was not rounded.
    """
    bias = node.inputs[2] if rules.int32_bias and len(node.inputs) > 2 else None
    smallest: NDArray[np.float32] = np.zeros(1, np.float32)
    if bias is not None:
        # A bias that is large beside its weights, all zero perhaps, must fit int32 at the accumulator's scale.
        smallest = (np.abs(_array(bias, f"bias of {name!r}")) / (given * 2**30)).astype(np.float32)
    scale = _quantize_weight(graph, node, name, smallest)
    return None if bias is None else _quantize_bias(graph, node, name, scale * given)


def constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """Return a new initializer of the graph."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape = ir.Shape(array.shape)
    value.dtype = ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def _array(value: ir.Value, what: str) -> NDArray[np.float32]:
    if value.const_value is None:
        raise ExportError(f"The {what} is computed in the graph; only stored weights can be set to int8.")
    return np.asarray(value.const_value.numpy(), np.float32)


def _quantize_weight(graph: ir.Graph, node: ir.Node, name: str, smallest: NDArray[np.float32]) -> NDArray[np.float32]:
    """Store the weight as int8; return its scale per output channel ``(out,)``, at least `smallest`."""
    value = node.inputs[1]
    assert value is not None
    weight = _array(value, f"weight of {name!r}")
    axis = 1 if node.op_type == "MatMul" or (node.op_type == "Gemm" and not _transposed(node)) else 0
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale: NDArray[np.float32] = (np.abs(weight).max(axis=others) / 127).astype(np.float32)
    # Channels that are (all but) zero get a step that runtimes can still invert, far below what the others resolve.
    least = max(float(scale.max()) * _SMALLEST_STEP, float(np.finfo(np.float32).eps))
    scale = np.maximum(scale, np.maximum(smallest, least)).astype(np.float32)
    shape = [1] * weight.ndim
    shape[axis] = -1
    codes = np.clip(np.rint(weight / scale.reshape(shape)), -127, 127).astype(np.int8)
    dequantize = ir.node(
        "DequantizeLinear",
        [
            constant(graph, f"{name}.weight_int8", codes),
            constant(graph, f"{name}.weight_scale", scale),
            constant(graph, f"{name}.weight_zero", np.zeros_like(scale, np.int8)),
        ],
        {"axis": axis},
        num_outputs=1,
    )
    dequantize.outputs[0].name = f"{name}.weight_dq"
    graph.insert_before(node, dequantize)
    node.replace_input_with(1, dequantize.outputs[0])
    if not value.uses() and value.name is not None:
        del graph.initializers[value.name]
    return scale


def _transposed(node: ir.Node) -> bool:
    attribute = node.attributes.get("transB")
    return attribute is not None and attribute.as_int() == 1


def _quantize_bias(graph: ir.Graph, node: ir.Node, name: str, scale: NDArray[np.float32]) -> NDArray[np.float32]:
    value = node.inputs[2]
    assert value is not None
    bias = _array(value, f"bias of {name!r}")
    codes = np.clip(np.rint(bias / scale), -(2**31) + 1, 2**31 - 1).astype(np.int32)
    dequantize = ir.node(
        "DequantizeLinear",
        [
            constant(graph, f"{name}.bias_int32", codes),
            constant(graph, f"{name}.bias_scale", scale.astype(np.float32)),
            constant(graph, f"{name}.bias_zero", np.zeros_like(codes)),
        ],
        {"axis": 0},
        num_outputs=1,
    )
    dequantize.outputs[0].name = f"{name}.bias_dq"
    graph.insert_before(node, dequantize)
    node.replace_input_with(2, dequantize.outputs[0])
    if not value.uses() and value.name is not None and value.name in graph.initializers:
        del graph.initializers[value.name]
    added: NDArray[np.float32] = (codes * scale.astype(np.float64) - bias).astype(np.float32)
    return added


def make_uneven(graph: ir.Graph, node: ir.Node, name: str) -> None:
    """Give a product of two dimensions whose bias is missing, or the same everywhere, one that differs by nothing."""
    shape = node.outputs[0].shape
    if shape is None or len(shape) != 2 or not isinstance(shape[1], int) or shape[1] < 2:
        return
    stored = node.inputs[2] if len(node.inputs) > 2 else None
    bias = np.zeros(shape[1], np.float32)
    if stored is not None:
        if stored.const_value is None:
            return
        bias = bias + _array(stored, f"bias of {name!r}")
        if np.ptp(bias) > 0:
            return
    # As little as fp32 can hold beside the bias, and for none far above what hardware flushes to zero.
    bias[1::2] += np.maximum(np.abs(bias[1::2]) * np.float32(2**-22), np.float32(1e-30))
    value = graph.initializers.get(f"{name}.bias_uneven") or constant(graph, f"{name}.bias_uneven", bias)
    if node.op_type == "Gemm":
        node.resize_inputs(3)
        node.replace_input_with(2, value)
        return
    product = node.outputs[0]
    add = ir.node("Add", [product, value], num_outputs=1)
    add.outputs[0].name, add.outputs[0].shape, add.outputs[0].type = f"{product.name}_biased", shape, product.type
    readers = [(use.node, use.idx) for use in product.uses() if use.node is not add]
    graph.insert_after(node, add)
    for reader, index in readers:
        reader.replace_input_with(index, add.outputs[0])
    if product in graph.outputs:
        graph.outputs[list(graph.outputs).index(product)] = add.outputs[0]


def share(
    graph: ir.Graph, node: ir.Node, index: int, stored: ir.Value | None, quantized: ir.Value | None, *, name: str
) -> None:
    """Have a layer's further run read the weight or bias that its first one reads."""
    value = node.inputs[index]
    if value is None or stored is None:
        return
    if value is not stored and not np.array_equal(_array(value, f"weight of {name!r}"), _array(stored, name)):
        raise ExportError(f"Layer {name!r} runs more than once with different weights, so it cannot be set to int8.")
    node.replace_input_with(index, quantized)
    if not value.uses() and value.name is not None and value.name in graph.initializers:
        del graph.initializers[value.name]


def copy_weight(graph: ir.Graph, node: ir.Node, suffix: str) -> None:
    """Have a layer's further run read an int8 weight of its own, equal to the one it shares; names get `suffix`."""
    shared = node.inputs[1]
    dequantize = None if shared is None else shared.producer()
    if shared is None or dequantize is None or dequantize.op_type != "DequantizeLinear":
        return
    constants = [
        constant(graph, f"{value.name}{suffix}", value.const_value.numpy())
        for value in dequantize.inputs
        if value is not None and value.const_value is not None
    ]
    own = ir.node("DequantizeLinear", constants, dict(dequantize.attributes), num_outputs=1)
    own.outputs[0].name = f"{shared.name}{suffix}"
    graph.insert_before(node, own)
    node.replace_input_with(1, own.outputs[0])
