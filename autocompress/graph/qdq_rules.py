"""What an engine's rules (`engines.rules.QdqRules`) say of a layer in a graph: questions alone, nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from autocompress.engines import ENGINES
from autocompress.engines.rules import MONOTONE, QdqRules

# Of every engine, by name.
RULES: Mapping[str, QdqRules] = {name: engine.qdq_rules for name, engine in ENGINES.items()}


def reason_to_stay_dense(node: ir.Node, rules: QdqRules) -> str | None:
    """Return why a Conv, Gemm or MatMul node is not to be quantized for this engine; None when it may be."""
    if rules.dense_behind_reductions and (reduction := _reduction_before(node.inputs[0])) is not None:
        return f"it reads the result of a {reduction}, which this engine computes wrongly as int8"
    if node.op_type != "Conv":
        return _narrow_matrix(node, rules)
    if rules.quantize_results and any(value.is_graph_output() for value in rectified(node.outputs[0])):
        return "the network returns its result, which an int8 kernel would round"
    return _narrow_convolution(node, rules)


def _reduction_before(value: ir.Value | None) -> str | None:
    """Return what reduction gives a tensor, or a part of it, that must not be int8; None when none does.

    Looks through reshapes, Concats, and products and sums with constants.
    """
    pending: list[tuple[ir.Value | None, bool]] = [(value, False)]
    while pending:
        tensor, scaled = pending.pop()
        node = None if tensor is None else tensor.producer()
        if node is None:
            continue
        if node.op_type in ("ReduceMax", "ReduceMin"):
            return node.op_type
        if node.op_type.startswith("Reduce"):
            if not _pools_an_image(node) and (scaled or _scales_channels(node.inputs[0])):
                return node.op_type
        elif node.op_type in ("Concat", "Mul", "Add") or node.op_type in MONOTONE - {"MaxPool"}:
            scaled = scaled or _by_vector(node)
            pending.extend((v, scaled) for v in node.inputs if v is not None and v.const_value is None)
    return None


def _pools_an_image(reduction: ir.Node) -> bool:
    """Whether two axes or more are gone, axis 1 not among them; the ranks of graphs that were edited are not known."""
    axes = reduction.inputs[1] if len(reduction.inputs) > 1 else None
    if axes is None or axes.const_value is None:
        return False
    known = axes.const_value.numpy().reshape(-1).tolist()
    return len(known) > 1 and not {1, -3} & set(known)


def _scales_channels(value: ir.Value | None) -> bool:
    """Whether a tensor is a norm's, or a product with one number for each channel; sums with constants are passed."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in ("LayerNormalization", "BatchNormalization") or _by_vector(node):
            return True
        if node.op_type != "Add":
            return False
        value = next((v for v in node.inputs if v is not None and v.const_value is None), None)
    return False


def _by_vector(node: ir.Node) -> bool:
    if node.op_type != "Mul":
        return False
    constants = [v.const_value.numpy() for v in node.inputs if v is not None and v.const_value is not None]
    return any(constant.min() != constant.max() for constant in constants)


def _weight_shape(node: ir.Node) -> tuple[int, ...] | None:
    weight = node.inputs[1]
    shape = None if weight is None or weight.const_value is None else weight.const_value.numpy().shape
    return None if shape is None or len(shape) < 2 else shape


def _narrow_matrix(node: ir.Node, rules: QdqRules) -> str | None:
    shape = _weight_shape(node)
    if shape is not None and min(shape[-2:]) < rules.least_channels:
        return f"its matrix is {shape[-2]} x {shape[-1]}; int8 kernels need {rules.least_channels} of each"
    return None


def _narrow_convolution(node: ir.Node, rules: QdqRules) -> str | None:
    shape = _weight_shape(node)
    if shape is None:
        return None
    group = node.attributes["group"].as_int() if "group" in node.attributes else 1
    outputs, per_group = shape[:2]
    if rules.dense_depthwise and group > 1 and _few(per_group, rules.least_channels):
        return f"it has {per_group} channels per group, for which there is no int8 kernel"
    if group == 1:
        for channels, side in ((per_group, "input"), (outputs, "output")):
            if _few(channels, rules.least_channels):
                return f"it has {channels} {side} channels; int8 kernels need {rules.least_channels} or a multiple of 8"
    return None


def _few(channels: int, least: int) -> bool:
    return channels < least and channels % 8 != 0


def rectified(value: ir.Value) -> tuple[ir.Value, ...]:
    """Return a tensor and, where a ReLU or a clipping at zero alone reads it, what that gives."""
    uses = list(value.uses())
    if len(uses) == 1 and not value.is_graph_output() and lower_bound(node := uses[0].node) == 0:
        return (value, node.outputs[0])
    return (value,)


def lower_bound(node: ir.Node) -> float | None:
    """Return below what no value of a ReLU or Clip lies; None of any other node, and where there is no bound."""
    return 0.0 if node.op_type == "Relu" else _bound(node, 1)


def upper_bound(node: ir.Node) -> float | None:
    """Return above what no value of a Clip lies; None of any other node, and where there is no bound."""
    return _bound(node, 2)


def _bound(node: ir.Node, index: int) -> float | None:
    value = node.inputs[index] if node.op_type == "Clip" and len(node.inputs) > index else None
    return None if value is None or value.const_value is None else float(value.const_value.numpy())


def multiplies_activations(value: ir.Value) -> bool:
    """Return whether a tensor comes, through reshapes alone, from a product of two activations."""
    node = value.producer()
    while node is not None and node.op_type in ("Transpose", "Reshape", "Squeeze", "Unsqueeze"):
        above = node.inputs[0]
        node = None if above is None else above.producer()
    if node is None or node.op_type != "MatMul":
        return False
    return all(v is not None and v.const_value is None and not is_stored_weight(v) for v in node.inputs)


def is_stored_weight(value: ir.Value) -> bool:
    """Return whether a value is a dequantized weight."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return False
    codes = node.inputs[0]
    return codes is not None and codes.const_value is not None


def shortcut_of(add: ir.Node) -> int | None:
    """Return which input of an Add is the shortcut past a convolution that it alone reads; None when neither is."""
    found = []
    for index, value in enumerate(add.inputs):
        producer = None if value is None else value.producer()
        if producer is not None and producer.op_type == "Conv" and value is not None and len(value.uses()) == 1:
            found.append(index)
    # Where the shortcut is a convolution too, its output has no scale of its own: the sum stays in the dense dtype.
    if len(found) != 1 or len(add.inputs) != 2:
        return None
    return 1 - found[0]
