"""QuantizeLinear/DequantizeLinear pairs, put where an engine's rules (`engines.rules`) want them.

In an ONNX graph precision is expressed by Q/DQ alone. A pair stands on the input of every int8 layer, and its weight is
stored in int8 behind a DequantizeLinear. The scales are the caller's; nothing here calibrates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from autocompress.compress.quantization import QuantizationRange
from autocompress.engines.rules import QdqRules
from autocompress.errors import ExportError
from autocompress.graph.export import every_layer_node
from autocompress.graph.integer_weights import constant, copy_weight, make_uneven, share, store_in_int8
from autocompress.graph.qdq_rules import (
    RULES,
    is_stored_weight,
    multiplies_activations,
    reason_to_stay_dense,
    rectified,
    shortcut_of,
    upper_bound,
)
from autocompress.graph.result_ranges import ResultRange


@dataclass(frozen=True)
class Rounding:
    """How one layer's result is rounded before anything reads it.

    Attributes:
        quantization: Of it.
        rectified: Whether what a ReLU leaves of it is rounded, not all of it.
    """

    quantization: QuantizationRange
    rectified: bool


@dataclass(frozen=True)
class Placed:
    """What became of the layers that were to be int8.

    Attributes:
        dense: Those that were left dense, with the engine's reason.
        results: Those whose results are rounded for all that reads them.
        shared: Those that share the rounded tensor they read with all else that reads it, a shortcut perhaps.
        biases: What rounding added to the bias ``(out,)`` of those that have theirs as integers.
    """

    dense: dict[str, str] = field(default_factory=dict)
    results: Mapping[str, Rounding] = field(default_factory=dict)
    shared: Mapping[str, QuantizationRange] = field(default_factory=dict)
    biases: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Placing:
    """One graph in the making.

    Attributes:
        graph: It.
        rules: Of its engine.
        int8: Ids of the nodes that become int8.
        pairs: Tensor, step, sign and whether signed codes are shifted to uint8, to the dequantized value of the pair
            that is there already.
        biases: As `Placed.biases`.
    """

    graph: ir.Graph
    rules: QdqRules
    int8: frozenset[int]
    pairs: dict[tuple[str, float, bool, bool], ir.Value] = field(default_factory=dict)
    biases: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def insert_qdq(
    model: ir.Model,
    layers: Mapping[str, QuantizationRange],
    engine: str,
    results: Mapping[str, ResultRange] | None = None,
) -> Placed:
    """Express int8 for the named layers in the graph, in place; return what became of them.

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
    reasons = {name: reason_to_stay_dense(nodes[name][0], rules) for name in layers}
    dense = {name: reason for name, reason in reasons.items() if reason is not None}
    wanted = [name for name in layers if name not in dense]
    placing = _Placing(model.graph, rules, frozenset(id(node) for name in wanted for node in nodes[name]))
    codes = {name: _quantize_layer(placing, name, nodes[name], layers[name]) for name in wanted}
    if rules.share_residual:
        _share_residuals(model.graph)
    rounded = {}
    if rules.quantize_results:
        for name in wanted:
            made = [_quantize_result(placing, node, (results or {}).get(name)) for node in nodes[name]]
            if made[0] is not None and made == made[:1] * len(made):
                rounded[name] = made[0]
    shared = {name: codes[name] for name in wanted if all(_shares(placing, node) for node in nodes[name])}
    if rules.clip_dense:
        _keep_dense(placing)
    if rules.pools_in_layout:
        _keep_from_pools(model.graph)
    model.graph.sort()
    return Placed(dense, rounded, shared, placing.biases)


def _quantize_layer(
    placing: _Placing, name: str, nodes: Sequence[ir.Node], quantization: QuantizationRange
) -> QuantizationRange:
    """Quantize what a layer reads, its weight and, where the rules say so, its bias, in every node that computes it.

    Returns the quantization of what it reads.
    """
    graph, rules, (node, *repeats) = placing.graph, placing.rules, nodes
    codes = quantization
    if rules.signed_only and not codes.signed:
        codes = QuantizationRange(codes.scale * 255 / 127, signed=True)
    codes = _quantize_input(placing, node, codes)
    stored = [(index, node.inputs[index]) for index in (1, 2) if len(node.inputs) > index]
    added = store_in_int8(graph, node, name, codes.scale, rules)
    if added is not None:
        placing.biases[name] = added
    if rules.uneven_bias and node.op_type in ("Gemm", "MatMul"):
        for product in nodes:
            make_uneven(graph, product, name)
    for number, repeat in enumerate(repeats, 1):
        _quantize_input(placing, repeat, codes)
        for index, value in stored:
            if node.inputs[index] is not value:
                share(graph, repeat, index, value, node.inputs[index], name=name)
        if rules.own_weights and repeat.op_type == "Conv":
            copy_weight(graph, repeat, f"_{number}")
    return codes


def _shares(placing: _Placing, node: ir.Node) -> bool:
    """Return whether a layer reads a pair that is all that reads a tensor, and what is not int8 reads it as well."""
    dequantized = node.inputs[0]
    pair = None if dequantized is None else dequantized.producer()
    codes = None if pair is None or pair.op_type != "DequantizeLinear" else pair.inputs[0]
    quantize = None if codes is None else codes.producer()
    tensor = None if quantize is None else quantize.inputs[0]
    if tensor is None or dequantized is None or len(tensor.uses()) > 1:
        return False
    return any(id(use.node) not in placing.int8 for use in dequantized.uses())


def _quantize_input(placing: _Placing, node: ir.Node, quantization: QuantizationRange) -> QuantizationRange:
    """Put what an int8 layer reads behind a pair; return its quantization."""
    rules, consumer, index = placing.rules, node, 0
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
        if rules.pools_in_layout and producer.op_type == "MaxPool" and id(_made_by(above)) not in placing.int8:
            break
        consumer, index, tensor = producer, 0, above
    quantization = _bounded(quantization, tensor)
    producer = tensor.producer()
    if rules.hoist_concat and producer is not None and producer.op_type == "Concat" and len(tensor.uses()) == 1:
        for part, value in enumerate(producer.inputs):
            if value is not None:
                producer.replace_input_with(
                    part, _paired(placing, value, producer, quantization, shifted=rules.unsigned_only)
                )
        return quantization
    apart = consumer is not node or (producer is not None and producer.op_type == "Concat")
    shifted = rules.unsigned_only or (rules.shifted_codes and apart and node.op_type == "Conv")
    consumer.replace_input_with(index, _paired(placing, tensor, consumer, quantization, shifted=shifted))
    return quantization


def _paired(
    placing: _Placing, tensor: ir.Value, consumer: ir.Node, quantization: QuantizationRange, *, shifted: bool
) -> ir.Value:
    """Return `tensor` behind a pair, the one it has already or a new one before `consumer`.

    Args:
        placing: The graph.
        tensor: What is to be rounded.
        consumer: What reads it.
        quantization: Of it.
        shifted: Whether signed codes are uint8 around 128.
    """
    key = (tensor.name or "", quantization.scale, quantization.signed, shifted and quantization.signed)
    if key not in placing.pairs:
        placing.pairs[key] = _pair(placing.graph, tensor, consumer, quantization, shifted=shifted)
    return placing.pairs[key]


def _quantize_result(placing: _Placing, node: ir.Node, wanted: ResultRange | None) -> Rounding | None:
    """Have all that reads an int8 convolution's result read it from one pair; return what that pair does."""
    if node.op_type != "Conv":
        return None
    value = rectified(node.outputs[0])[-1]
    uses = [(use.node, use.idx) for use in value.uses()]
    pairs = [reader for reader, _ in uses if reader.op_type == "QuantizeLinear"]
    # Readers with steps of their own keep them.
    if len(pairs) == len(uses):
        return None
    if pairs:
        # One reader's own pair serves the others, too.
        (use, *_) = pairs[0].outputs[0].uses()
        (dequantized,) = use.node.outputs
        found = next(QuantizationRange(*key[1:3]) for key, made in placing.pairs.items() if made is dequantized)
    elif wanted is not None and uses:
        found = wanted.whole if value is node.outputs[0] else _bounded(wanted.rectified, value)
        dequantized = _pair(placing.graph, value, uses[0][0], found, shifted=placing.rules.unsigned_only)
    else:
        return None
    for reader, index in uses:
        if reader not in pairs[:1]:
            reader.replace_input_with(index, dequantized)
    return Rounding(found, value is not node.outputs[0])


def _made_by(value: ir.Value) -> ir.Node | None:
    """Return the node that makes a tensor, the one before a ReLU or Clip."""
    node = value.producer()
    before = node.inputs[0] if node is not None and node.op_type in ("Relu", "Clip") else None
    return node if before is None else before.producer()


def _keep_dense(placing: _Placing) -> None:
    """Keep the runtime from computing dense layers in int8 because they read int8 tensors and give them.

    It does so wherever no other op than those that it moves pairs across, and a ReLU or Clip behind the layer, is in
    between.
    """
    for node in list(placing.graph):
        given, weight = node.inputs[:2] if len(node.inputs) > 1 else (None, None)
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or given is None or weight is None:
            continue
        pair = _made_above(given, placing.rules)
        if weight.const_value is None or pair is None or pair.op_type != "DequantizeLinear":
            continue
        if _quantized_below(rectified(node.outputs[0])[-1], placing.rules):
            _clip_to_codes(placing.graph, node, pair)


def _made_above(value: ir.Value, rules: QdqRules) -> ir.Node | None:
    """Return the node that made a tensor, that before the ops which pairs move across."""
    node = value.producer()
    while node is not None and node.op_type in rules.hoist and (above := node.inputs[0]) is not None:
        node = above.producer()
    return node


def _quantized_below(value: ir.Value, rules: QdqRules) -> bool:
    """Return whether all that reads a tensor, across the ops that pairs move across, is quantization."""
    readers = [use.node for use in value.uses()]
    return bool(readers) and all(
        reader.op_type == "QuantizeLinear"
        or (reader.op_type in rules.hoist and _quantized_below(reader.outputs[0], rules))
        for reader in readers
    )


def _keep_from_pools(graph: ir.Graph) -> None:
    """Keep the runtime from moving pairs above the pools that the rules left above them."""
    for node in list(graph):
        value = node.inputs[0] if node.op_type == "QuantizeLinear" else None
        pool = None if value is None else value.producer()
        if pool is None or pool.op_type != "MaxPool" or (pooled := pool.inputs[0]) is None:
            continue
        before = pooled.producer()
        if before is None or before.op_type != "DequantizeLinear":
            # So little below the largest code that every value keeps its code, or the runtime would drop it.
            _clip_to_codes(graph, node, node, below=2**-20)


def _clip_to_codes(graph: ir.Graph, node: ir.Node, pair: ir.Node, below: float = 0.0) -> None:
    """Put a Clip that clips nothing before a node: at the value of the largest code of one of a pair's two."""
    value, (scale, zero) = node.inputs[0], pair.inputs[1:3]
    if value is None or scale is None or zero is None or scale.const_value is None or zero.const_value is None:
        return
    middle = zero.const_value.numpy()
    most = float(scale.const_value.numpy()) * (np.iinfo(middle.dtype).max - int(middle)) * (1 - below)
    name = f"{node.outputs[0].name}_kept"
    clip = ir.node("Clip", [value, None, constant(graph, f"{name}_most", np.array(most, np.float32))], num_outputs=1)
    clip.outputs[0].name, clip.outputs[0].shape, clip.outputs[0].type = name, value.shape, value.type
    graph.insert_before(node, clip)
    node.replace_input_with(0, clip.outputs[0])


def _bounded(quantization: QuantizationRange, tensor: ir.Value) -> QuantizationRange:
    """Return the quantization with no unsigned codes above what a Clip lets through: engines drop it only then."""
    producer = tensor.producer()
    most = None if producer is None else upper_bound(producer)
    if quantization.signed or most is None or most <= 0:
        return quantization
    return QuantizationRange(min(quantization.scale, most / 255), signed=False)


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
    quantization: QuantizationRange,
    *,
    shifted: bool,
) -> ir.Value:
    """Return `tensor` behind a new pair before `before`."""
    base = f"{tensor.name}_{'s8' if quantization.signed else 'u8'}"
    unsigned = shifted or not quantization.signed
    middle = 128 if shifted and quantization.signed else 0
    taken = sum(1 for name in graph.initializers if name.startswith(f"{base}_scale"))
    base = f"{base}{taken or ''}"
    scale = constant(graph, f"{base}_scale", np.array(quantization.scale, np.float32))
    zero = constant(graph, f"{base}_zero", np.array(middle, np.uint8 if unsigned else np.int8))
    quantize = ir.node("QuantizeLinear", [tensor, scale, zero], num_outputs=1)
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], num_outputs=1)
    quantize.outputs[0].name = f"{base}_q"
    dequantize.outputs[0].name = f"{base}_dq"
    graph.insert_before(before, [quantize, dequantize])
    return dequantize.outputs[0]
