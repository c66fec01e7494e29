"""Where each engine wants its QuantizeLinear/DequantizeLinear pairs: one table, one field per rule, one row per engine.

`qdq` applies it. The rules for TensorRT follow NVIDIA's "Q/DQ layer placement recommendations" (TensorRT developer
guide, explicit quantization) and the exclusions of its Model Optimizer (modelopt.onnx.quantization: channels and matrix
dimensions below 16, residual inputs). Graph questions alone are answered here; nothing is changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class PlacementRules:
    """How one engine wants its Q/DQ. Every field is one rule; off or empty, the engine has no such wish.

    Attributes:
        hoist: Ops that a pair moves above: rounding commutes with them exactly, and the op then runs on int8.
        int32_bias: Whether biases are stored as int32 with the scale of the accumulator, as the engine's fusion needs.
            TensorRT has no int32 DequantizeLinear and refuses the graph: its biases stay in the dense dtype.
        signed_only: Whether activations must be int8, never uint8. TensorRT quantizes around zero; it reads uint8 codes
            as int8 without a word, which cuts off the upper half of them.
        unsigned_only: Whether activations must be uint8, those of both signs around 128. ONNX Runtime computes a
            convolution in int8 only where what it reads and what it gives are of one type, and on x86 has kernels of
            uint8 alone.
        shifted_codes: Whether a convolution's signed codes are uint8 around 128 where the pair stands behind a Concat
            or other ops between it and the convolution. OpenVINO 2026.4 makes them so itself, and computes garbage
            there: behind a Concat always, elsewhere if the convolution's result is joined to others by one.
        hoist_concat: Whether a pair moves above a Concat, one of the same scale onto each input. Exact, and without it
            the parts are joined in the dense dtype and written twice.
        share_residual: Whether the shortcut of an Add that a convolution's output joins reads the int8 tensor that the
            block's first layer reads. The sum is then fused into the convolution and leaves it as int8; no pair ever
            stands between the convolution and the Add, which would cut that fusion.
        least_channels: Convolutions with fewer input or output channels stay dense, unless the number is a multiple of
            8; matrix products with fewer rows or columns always do. int8 Tensor Core kernels pad to this.
        dense_depthwise: Whether convolutions with few channels per group stay dense: no int8 Tensor Core kernel exists
            for them, so that only the conversions around would remain.
        uneven_bias: Whether matrix products of two dimensions get a bias that is not the same for all channels.
            OpenVINO 2026.4 fuses the next layer's quantization into such a product, and computes garbage when it has
            no bias, or one number for all channels.
        dense_behind_reductions: Whether layers that read a ReduceMax or ReduceMin, or another reduction over axis 1
            where a norm or a product scales channels before or behind it, stay dense. OpenVINO 2026.4 fuses the
            quantization of its result into a reduction, and computes garbage: of maxima and minima always, of others
            where the scale has become that of each channel and axis 1 is gone.
        quantize_results: Whether all that reads an int8 convolution's result reads it from a pair. ONNX Runtime
            computes a convolution in int8 only between a pair before and one behind; else it dequantizes the weights
            at every call and computes in fp32, slower than a dense layer. The network's own results are left alone,
            and with them the convolutions that give them.
        clip_dense: Whether a dense layer that reads an int8 tensor and gives one needs a Clip before it to stay dense:
            else ONNX Runtime sets its weights to int8, with one step for all (`WeightBiasQuantization`).
        pools_in_layout: Whether a MaxPool is fast only in the layout of the convolution before it, so that a pair moves
            above one only behind an int8 convolution and is kept from moving there elsewhere. ONNX Runtime moves them
            itself, and pools uint8 that does not come from an int8 convolution one number at a time: in ResNet-18
            behind a dense stem that takes 5.6 of 7.8 ms.
        whole_attention: Whether a pair stays below the Transpose and Reshape that follow a product of two activations,
            and off that product itself: the pattern of TensorRT's fused attention kernel is left whole. OpenVINO 2026.4
            computes a bf16 product whose result leaves it as int8 in fp32, with its operands converted (MiniLM: 6 %).
        int8_lstm: Whether there is an operator for LSTMs with int8 weights (`recurrent`). ONNX Runtime's takes a third
            of the time of its dense one (256 units, 50 steps). OpenVINO 2026.4 refuses quantized weights of an LSTM.
    """

    hoist: frozenset[str]
    int32_bias: bool
    signed_only: bool
    unsigned_only: bool = False
    shifted_codes: bool = False
    hoist_concat: bool = False
    share_residual: bool = False
    least_channels: int = 0
    dense_depthwise: bool = False
    uneven_bias: bool = False
    dense_behind_reductions: bool = False
    quantize_results: bool = False
    clip_dense: bool = False
    pools_in_layout: bool = False
    whole_attention: bool = False
    int8_lstm: bool = False

    def identity(self, *, attention: bool) -> str:
        """Return the rules that are on, as text; another one after any change of how int8 networks are made.

        Args:
            attention: Whether the network multiplies activations by each other: without, those rules say nothing of it,
                and are left out, so that tables of before them still fit.
        """
        on = {name: sorted(value) if isinstance(value, frozenset) else value for name, value in vars(self).items()}
        if not attention:
            del on["whole_attention"]
        # It keeps layers dense that no table has as int8; and an LSTM that may be int8 is told by the network's layers.
        del on["dense_behind_reductions"], on["int8_lstm"]
        return json.dumps({"codes": _CODES, **{name: value for name, value in on.items() if value}}, sort_keys=True)


# How codes are chosen, whatever the rules. 2: those behind a ReLU are unsigned, as calibration makes them.
_CODES = 2
_MONOTONE = frozenset({"MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"})
_TENSORRT = PlacementRules(
    hoist=_MONOTONE,
    int32_bias=False,
    signed_only=True,
    hoist_concat=True,
    share_residual=True,
    least_channels=16,
    dense_depthwise=True,
    whole_attention=True,
)

RULES: Mapping[str, PlacementRules] = {
    "openvino": PlacementRules(
        hoist=_MONOTONE,
        int32_bias=False,
        signed_only=False,
        shifted_codes=True,
        uneven_bias=True,
        dense_behind_reductions=True,
        whole_attention=True,
    ),
    # ONNX Runtime fuses DQ-Conv-Q into QLinearConv only when the bias is int32 as well.
    "onnxruntime": PlacementRules(
        hoist=_MONOTONE,
        int32_bias=True,
        signed_only=False,
        unsigned_only=True,
        share_residual=True,
        quantize_results=True,
        clip_dense=True,
        pools_in_layout=True,
        int8_lstm=True,
    ),
    "tensorrt": _TENSORRT,
    "tensorrt-rtx": _TENSORRT,
}


def reason_to_stay_dense(node: ir.Node, rules: PlacementRules) -> str | None:
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
            if _takes_channels_axis(node) and (scaled or _scales_channels(node.inputs[0])):
                return node.op_type
        elif node.op_type in ("Concat", "Mul", "Add") or node.op_type in _MONOTONE - {"MaxPool"}:
            scaled = scaled or _by_vector(node)
            pending.extend((v, scaled) for v in node.inputs if v is not None and v.const_value is None)
    return None


def _takes_channels_axis(reduction: ir.Node) -> bool:
    """Whether axis 1 is gone; ranks of graphs that were edited are not known, and -2 alone is axis 1 of a sequence."""
    axes = reduction.inputs[1] if len(reduction.inputs) > 1 else None
    if axes is None or axes.const_value is None:
        return True
    known = axes.const_value.numpy().reshape(-1).tolist()
    return bool({1, -3} & set(known)) or known == [-2]


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


def _narrow_matrix(node: ir.Node, rules: PlacementRules) -> str | None:
    shape = _weight_shape(node)
    if shape is not None and min(shape[-2:]) < rules.least_channels:
        return f"its matrix is {shape[-2]} x {shape[-1]}; int8 kernels need {rules.least_channels} of each"
    return None


def _narrow_convolution(node: ir.Node, rules: PlacementRules) -> str | None:
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
