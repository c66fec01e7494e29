"""Int8 LSTMs of an ONNX graph: ONNX Runtime's own operator in place of the standard's. Numpy and onnx-ir only.

No Q/DQ says it: an engine would have to see through the loop over time. `DynamicQuantizeLSTM` stores weights in int8,
and rounds what it reads, and its states at every step, to uint8 over the range that they have there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from autocompress.graph.export import modules_of
from autocompress.graph.integer_weights import constant
from autocompress.graph.qdq_rules import RULES

# Weights of a layer's input and of its states, ``(directions, 4 hidden, in)``, gates in torch's order.
Weights = tuple[NDArray[np.float32], NDArray[np.float32]]
_DOMAIN = "com.microsoft"
_NO_KERNEL = "this engine has no int8 kernel for an LSTM"
_NOT_FOUND = "the graph does not have it: its result is not used, or it was exported as something else"
# The standard's gates (input, output, forget, cell) by their places in torch's order (input, forget, cell, output).
_GATES = (0, 3, 1, 2)
_INPUTS = 12


def lstm_nodes(model: ir.Model, name: str) -> list[ir.Node]:
    """Return the LSTM nodes of a module, in the graph's order: one for each of its layers, in every call."""
    return [node for node in model.graph if node.op_type == "LSTM" and name in modules_of(node)]


def quantize_lstms(model: ir.Model, lstms: Mapping[str, Sequence[Weights]], engine: str) -> dict[str, str]:
    """Make the named LSTMs int8, in place; return those that stay dense, with the engine's reason.

    Args:
        model: The graph.
        lstms: Module to the weights of each of its layers.
        engine: Whose rules are followed.
    """
    if not lstms or not RULES[engine].int8_lstm:
        return dict.fromkeys(lstms, _NO_KERNEL)
    dense: dict[str, str] = {}
    for name, layers in lstms.items():
        nodes = lstm_nodes(model, name)
        if not nodes or len(nodes) % len(layers):
            dense[name] = _NOT_FOUND
            continue
        stored: dict[int, list[ir.Value]] = {}
        for place, node in enumerate(nodes):
            layer = place % len(layers)
            if layer not in stored:
                stored[layer] = _stored(model.graph, f"{name}.{layer}", layers[layer])
            _replace(node, stored[layer])
    model.opset_imports[_DOMAIN] = 1
    RemoveUnusedNodesPass()(model)
    return dense


def _stored(graph: ir.Graph, name: str, weights: Weights) -> list[ir.Value]:
    """Return the values of a layer's codes, and of the scales and zero points of both of its weights."""
    codes, scales = [], []
    for part, weight in zip(("input", "states"), weights, strict=True):
        found, scale = _codes(weight)
        codes.append(constant(graph, f"{name}.{part}_int8", found))
        scales.append(constant(graph, f"{name}.{part}_scale", scale))
        scales.append(constant(graph, f"{name}.{part}_zero", np.zeros_like(scale, np.int8)))
    return [*codes, *scales]


def _codes(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return codes ``(directions, in, 4 hidden)`` and scales ``(directions, 4 hidden)``, in the standard's order."""
    directions, rows, ins = weight.shape
    gates = weight.reshape(directions, 4, rows // 4, ins)[:, _GATES].reshape(directions, rows, ins)
    scale = np.maximum(np.abs(gates).max(axis=2) / 127, np.finfo(np.float32).tiny).astype(np.float32)
    codes = np.clip(np.rint(gates / scale[:, :, None]), -127, 127).astype(np.int8)
    return np.ascontiguousarray(codes.transpose(0, 2, 1)), scale


def _replace(node: ir.Node, stored: Sequence[ir.Value]) -> None:
    node.resize_inputs(_INPUTS)
    for index, value in zip((1, 2, 8, 9, 10, 11), stored, strict=True):
        node.replace_input_with(index, value)
    node.attributes.pop("layout", None)
    node.op_type, node.domain = "DynamicQuantizeLSTM", _DOMAIN
