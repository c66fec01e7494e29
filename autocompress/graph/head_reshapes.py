"""How many attention heads there are, taken out of a graph.

Reshapes around attention name the number of heads, or the channels of all of them, among other numbers that may be
equal by chance. What changes when every attention has one head less tells which is which.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from autocompress.graph.tensor_dtypes import feeding


def free_heads(graph: ir.Model, fewer: ir.Model, names: Mapping[int, str], heads: Collection[str]) -> bool:
    """Let reshapes take as many heads as there are, in place; return whether that explains all that differs.

    Args:
        graph: Of the whole model.
        fewer: Of the same model with one head less in every attention, made in the same way.
        names: Layers by the id of their nodes in `graph`.
        heads: Layers that make heads.
    """
    ours, theirs = list(graph.graph), list(fewer.graph)
    if [node.op_type for node in ours] != [node.op_type for node in theirs]:
        return False
    shapes: dict[ir.Node, list[int]] = {}
    for node, other in zip(ours, theirs, strict=True):
        for index, (value, changed) in enumerate(zip(node.inputs, other.inputs, strict=True)):
            if value is None or changed is None or value.const_value is None or changed.const_value is None:
                continue
            if value.dtype != ir.DataType.INT64:
                continue
            before, after = value.const_value.numpy(), changed.const_value.numpy()
            if np.array_equal(before, after):
                continue
            places = [] if before.shape != after.shape else np.flatnonzero(before != after).tolist()
            shape = [int(size) for size in before.flat]
            # What else reaches this reshape may change for reasons of its own.
            apart = not feeding(node.inputs[:1], names) <= set(heads)
            if node.op_type != "Reshape" or index != 1 or len(places) != 1 or min(shape) < 1 or apart:
                return False
            shape[places[0]] = -1
            shapes[node] = shape
    for node, shape in shapes.items():
        set_shape(graph, node, shape)
    return True


def set_shape(graph: ir.Model, node: ir.Node, shape: list[int]) -> None:
    """Give a reshape a target of its own: 0 is what is there, -1 what follows from the rest."""
    loose = ir.Value(name=f"{node.name}_shape", const_value=ir.tensor(np.array(shape, np.int64)))
    loose.shape, loose.dtype = ir.Shape([len(shape)]), ir.DataType.INT64
    graph.graph.register_initializer(loose)
    node.replace_input_with(1, loose)
    node.attributes.pop("allowzero", None)
