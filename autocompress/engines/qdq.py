"""QuantizeLinear/DequantizeLinear pairs, put where an engine's rules (`placement.RULES`) want them.

In an ONNX graph precision is expressed by Q/DQ alone. A pair stands on the input of every int8 layer, and its weight is
stored in int8 behind a DequantizeLinear. The scales are the caller's; nothing here calibrates. Numpy and onnx-ir only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from autocompress.engines.export import every_layer_node
from autocompress.engines.placement import (
    RULES,
    PlacementRules,
    is_stored_weight,
    multiplies_activations,
    reason_to_stay_dense,
    rectified,
    shortcut_of,
    upper_bound,
)
from autocompress.errors import ExportError


@dataclass(frozen=True)
class InputQuantization:
    """Quantization of one tensor: ``real = scale * code``, or ``scale * (code - 128)`` where signed codes are uint8.

    Attributes:
        scale: Step, in the tensor's unit.
        signed: Codes in [-128, 127], else [0, 255].
    """

    scale: float
    signed: bool


@dataclass(frozen=True)
class ResultQuantization:
    """Quantization of what one layer gives, for engines that want it (`PlacementRules.quantize_results`).

    Attributes:
        whole: Of all values.
        rectified: Of what a ReLU leaves of them.
    """

    whole: InputQuantization
    rectified: InputQuantization


# Tensor, step and sign to the dequantized value of the pair that is there already.
Pairs = dict[tuple[str, float, bool], ir.Value]
# Smallest step of a channel as a share of the layer's largest. OpenVINO multiplies and divides by steps in fp32.
_SMALLEST_STEP = 1e-4


def insert_qdq(
    model: ir.Model,
    layers: Mapping[str, InputQuantization],
    engine: str,
    results: Mapping[str, ResultQuantization] | None = None,
) -> dict[str, str]:
    """Express int8 for the named layers in the graph, in place; return those left dense, with the engine's reason.

    Weights become per-output-channel symmetric int8 in [-127, 127].

    Args:
        model: The graph.
        layers: Layer to the quantization of what it reads.
        engine: Whose rules are followed.
        results: Layer to the quantization of what it gives; one that is missing gets no pair of its own.

    Raises:
        ExportError: A layer has no node in the graph.
    """
    rules = RULES[engine]
    nodes = every_layer_node(model, layers)
    for name in layers:
        if name not in nodes:
            raise ExportError(f"Layer {name!r} cannot be found in the exported graph, so it cannot be set to int8.")
    pairs: Pairs = {}
    dense: dict[str, str] = {}
    for name, quantization in layers.items():
        reason = reason_to_stay_dense(nodes[name][0], rules)
        if reason is not None:
            dense[name] = reason
            continue
        _quantize_layer(model.graph, name, nodes[name], quantization, rules, pairs=pairs)
    if rules.share_residual:
        _share_residuals(model.graph)
    if rules.quantize_results:
        for name in layers:
            for node in nodes[name] if name not in dense else ():
                _quantize_result(model.graph, node, (results or {}).get(name), rules)
    model.graph.sort()
    return dense


def _quantize_layer(
    graph: ir.Graph,
    name: str,
    nodes: Sequence[ir.Node],
    quantization: InputQuantization,
    rules: PlacementRules,
    *,
    pairs: Pairs,
) -> None:
    """Quantize what a layer reads, its weight and, where the rules say so, its bias, in every node that computes it."""
    node, *repeats = nodes
    codes = quantization
    if rules.signed_only and not codes.signed:
        codes = InputQuantization(codes.scale * 255 / 127, signed=True)
    codes = _quantize_input(graph, node, codes, rules, pairs)
    bias = node.inputs[2] if rules.int32_bias and len(node.inputs) > 2 else None
    smallest: NDArray[np.float32] = np.zeros(1, np.float32)
    if bias is not None:
        # A bias that is large beside its weights, all zero perhaps, must fit int32 at the accumulator's scale.
        room = codes.scale * 2**30
        smallest = (np.abs(_array(bias, f"bias of {name!r}")) / room).astype(np.float32)
    stored = [(index, node.inputs[index]) for index in ((1, 2) if bias is not None else (1,))]
    weight_scale = _quantize_weight(graph, node, name, smallest)
    if bias is not None:
        _quantize_bias(graph, node, name, weight_scale * codes.scale)
    if rules.uneven_bias and node.op_type in ("Gemm", "MatMul"):
        for product in nodes:
            _make_uneven(graph, product, name)
    for repeat in repeats:
        _quantize_input(graph, repeat, codes, rules, pairs)
        for index, value in stored:
            _share(graph, repeat, index, value, node.inputs[index], name=name)


def _constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
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
            _constant(graph, f"{name}.weight_int8", codes),
            _constant(graph, f"{name}.weight_scale", scale),
            _constant(graph, f"{name}.weight_zero", np.zeros_like(scale, np.int8)),
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


def _quantize_bias(graph: ir.Graph, node: ir.Node, name: str, scale: NDArray[np.float32]) -> None:
    value = node.inputs[2]
    assert value is not None
    codes = np.clip(np.rint(_array(value, f"bias of {name!r}") / scale), -(2**31) + 1, 2**31 - 1).astype(np.int32)
    dequantize = ir.node(
        "DequantizeLinear",
        [
            _constant(graph, f"{name}.bias_int32", codes),
            _constant(graph, f"{name}.bias_scale", scale.astype(np.float32)),
            _constant(graph, f"{name}.bias_zero", np.zeros_like(codes)),
        ],
        {"axis": 0},
        num_outputs=1,
    )
    dequantize.outputs[0].name = f"{name}.bias_dq"
    graph.insert_before(node, dequantize)
    node.replace_input_with(2, dequantize.outputs[0])
    if not value.uses() and value.name is not None and value.name in graph.initializers:
        del graph.initializers[value.name]


def _make_uneven(graph: ir.Graph, node: ir.Node, name: str) -> None:
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
    value = graph.initializers.get(f"{name}.bias_uneven") or _constant(graph, f"{name}.bias_uneven", bias)
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


def _share(
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


def _quantize_input(
    graph: ir.Graph,
    node: ir.Node,
    quantization: InputQuantization,
    rules: PlacementRules,
    pairs: Pairs,
) -> InputQuantization:
    """Put what an int8 layer reads behind a pair; return its quantization."""
    consumer, index = node, 0
    tensor = node.inputs[0]
    assert tensor is not None
    # Climb over ops that rounding commutes with, while they serve this layer alone.
    while True:
        producer = tensor.producer()
        if producer is None or producer.op_type not in rules.hoist or len(tensor.uses()) != 1:
            break
        if rules.whole_attention and multiplies_activations(tensor):
            break
        above = producer.inputs[0]
        if above is None or above.const_value is not None:
            break
        consumer, index, tensor = producer, 0, above
    quantization = _bounded(quantization, tensor)
    producer = tensor.producer()
    if rules.hoist_concat and producer is not None and producer.op_type == "Concat" and len(tensor.uses()) == 1:
        for part, value in enumerate(producer.inputs):
            if value is not None:
                producer.replace_input_with(part, _paired(graph, value, producer, quantization, pairs, rules=rules))
        return quantization
    consumer.replace_input_with(index, _paired(graph, tensor, consumer, quantization, pairs, rules=rules))
    return quantization


def _paired(
    graph: ir.Graph,
    tensor: ir.Value,
    consumer: ir.Node,
    quantization: InputQuantization,
    pairs: Pairs,
    *,
    rules: PlacementRules,
) -> ir.Value:
    """Return `tensor` behind a pair, the one it has already or a new one before `consumer`."""
    key = (tensor.name or "", quantization.scale, quantization.signed)
    if key not in pairs:
        pairs[key] = _pair(graph, tensor, consumer, quantization, rules)
    return pairs[key]


def _quantize_result(graph: ir.Graph, node: ir.Node, wanted: ResultQuantization | None, rules: PlacementRules) -> None:
    """Have all that reads an int8 convolution's result read it from one pair."""
    if node.op_type != "Conv":
        return
    value = rectified(node.outputs[0])[-1]
    uses = [(use.node, use.idx) for use in value.uses()]
    pairs = [reader for reader, _ in uses if reader.op_type == "QuantizeLinear"]
    if len(pairs) == len(uses) == 1:
        return
    if pairs:
        # One reader's own pair serves the others, too.
        (use, *_) = pairs[0].outputs[0].uses()
        (dequantized,) = use.node.outputs
    elif wanted is not None and uses:
        found = wanted.whole if value is node.outputs[0] else _bounded(wanted.rectified, value)
        dequantized = _pair(graph, value, uses[0][0], found, rules)
    else:
        return
    for reader, index in uses:
        if reader not in pairs[:1]:
            reader.replace_input_with(index, dequantized)


def _bounded(quantization: InputQuantization, tensor: ir.Value) -> InputQuantization:
    """Return the quantization with no unsigned codes above what a Clip lets through: engines drop it only then."""
    producer = tensor.producer()
    most = None if producer is None else upper_bound(producer)
    if quantization.signed or most is None or most <= 0:
        return quantization
    return InputQuantization(min(quantization.scale, most / 255), signed=False)


def _share_residuals(graph: ir.Graph) -> None:
    """Have shortcuts read the quantized tensor where there is one already, so that sums fuse into convolutions."""
    for node in graph:
        index = shortcut_of(node) if node.op_type == "Add" else None
        shortcut = None if index is None else node.inputs[index]
        if index is None or shortcut is None or not _fused_in_int8(node, 1 - index):
            continue
        readers = [use.node for use in shortcut.uses() if use.node.op_type == "QuantizeLinear"]
        # Several scales of one tensor: any would do, the finest loses values; the first is the block's own layer.
        if readers:
            (use, *_) = readers[0].outputs[0].uses()
            node.replace_input_with(index, use.node.outputs[0])


def _fused_in_int8(add: ir.Node, index: int) -> bool:
    """Return whether the convolution that ends in this input of the Add is an int8 one."""
    value = add.inputs[index]
    convolution = None if value is None else value.producer()
    weight = None if convolution is None else convolution.inputs[1]
    return weight is not None and is_stored_weight(weight)


def _pair(
    graph: ir.Graph,
    tensor: ir.Value,
    before: ir.Node,
    quantization: InputQuantization,
    rules: PlacementRules,
) -> ir.Value:
    """Return `tensor` behind a new pair before `before`."""
    base = f"{tensor.name}_{'s8' if quantization.signed else 'u8'}"
    unsigned = rules.unsigned_only or not quantization.signed
    middle = 128 if unsigned and quantization.signed else 0
    taken = sum(1 for name in graph.initializers if name.startswith(f"{base}_scale"))
    base = f"{base}{taken or ''}"
    scale = _constant(graph, f"{base}_scale", np.array(quantization.scale, np.float32))
    zero = _constant(graph, f"{base}_zero", np.array(middle, np.uint8 if unsigned else np.int8))
    quantize = ir.node("QuantizeLinear", [tensor, scale, zero], num_outputs=1)
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], num_outputs=1)
    quantize.outputs[0].name = f"{base}_q"
    dequantize.outputs[0].name = f"{base}_dq"
    graph.insert_before(before, [quantize, dequantize])
    return dequantize.outputs[0]
