"""An fp32 ONNX graph in fp16 or bf16, with islands of fp32 where half precision overflows. onnx-ir and numpy only.

A strongly typed network runs every tensor in the dtype that the graph gives it, so that half precision has to be
written into the graph: weights, Q/DQ scales, and casts at the borders. Inputs and outputs of the graph stay fp32. Which
ops stay in fp32 follows NVIDIA's advice on overflow (TensorRT best practices, "Precision"; fp16 ends at 65504) and
`ISLAND_OPS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from autocompress.errors import BuildError

# Largest finite number of each dtype.
LIMITS = {"fp16": 65504.0, "bf16": 3.38e38}
_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
# Ops whose results leave half precision's range, or lose what they are for in its few bits, with the reason.
ISLAND_OPS: Mapping[str, str] = {
    "Exp": "e^12 is beyond fp16",
    "Pow": "squares of activations above 256 are beyond fp16",
    "Log": "small inputs become zero",
    "ReduceSum": "sums over many elements overflow",
    "ReduceSumSquare": "sums of squares overflow",
    "ReduceL2": "sums of squares overflow",
    "ReduceLogSumExp": "e^12 is beyond fp16",
    "ReduceProd": "products overflow",
    "CumSum": "running sums lose their last bits",
    "InstanceNormalization": "its variance is a sum of squares; unlike LayerNormalization it has no stash type",
}
# Inputs that the operator's definition wants in fp32, whatever the data's dtype.
_ALWAYS_FP32: Mapping[str, frozenset[int]] = {"Resize": frozenset({1, 2})}
_QDQ = ("QuantizeLinear", "DequantizeLinear")


def to_half(model: ir.Model, dtype: str, *, fp32_nodes: Collection[str] = ()) -> list[str]:
    """Convert a graph in place and return the names of the nodes that stay in fp32.

    Args:
        model: An fp32 graph, with or without Q/DQ.
        dtype: ``"fp16"`` or ``"bf16"``.
        fp32_nodes: Nodes to keep in fp32 beside those that the rules keep.

    Raises:
        BuildError: The graph has control flow, or `fp32_nodes` names a node that is not there.
    """
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ShapeInferencePass()(model)
    graph = model.graph
    names = {node.name for node in graph if node.name}
    for name in fp32_nodes:
        if name not in names:
            raise BuildError(f"fp32_nodes names {name!r}, but the graph has no such node.")
    for node in graph:
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise BuildError(
                f"The graph cannot be converted to {dtype}: node {node.name!r} ({node.op_type}) is control flow. Build "
                "it in fp32, or give a model without it."
            )
    return _Conversion(graph, dtype, frozenset(fp32_nodes)).run()


class _Conversion:
    def __init__(self, graph: ir.Graph, dtype: str, fp32_nodes: Collection[str]) -> None:
        self._graph, self._dtype, self._type, self._fp32_nodes = graph, dtype, _TYPES[dtype], fp32_nodes
        self._casts: dict[tuple[int, ir.DataType], ir.Value] = {}
        self._constants: dict[int, ir.Value] = {}

    def run(self) -> list[str]:
        kept = []
        for node in list(self._graph):
            if self._is_island(node):
                kept.append(node.name or node.op_type)
                self._convert_inputs(node, ir.DataType.FLOAT)
            else:
                if node.op_type in _QDQ:
                    self._round_scale(node)
                self._convert_inputs(node, self._type)
                self._convert_outputs(node)
        self._restore_outputs()
        self._drop_unused()
        return kept

    def _is_island(self, node: ir.Node) -> bool:
        if node.op_type in ISLAND_OPS or (node.name or "") in self._fp32_nodes:
            return any(_floats(value) for value in (*node.inputs, *node.outputs))
        return any(
            _floats(v) and v.const_value is not None and _largest(v) > LIMITS[self._dtype] for v in node.inputs if v
        )

    def _convert_inputs(self, node: ir.Node, wanted: ir.DataType) -> None:
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in (ir.DataType.FLOAT, self._type):
                continue
            target = ir.DataType.FLOAT if index in _ALWAYS_FP32.get(node.op_type, ()) else wanted
            if value.dtype != target:
                constant = value.const_value is not None
                node.replace_input_with(index, self._constant(value) if constant else self._cast(value, target, node))

    def _convert_outputs(self, node: ir.Node) -> None:
        to = node.attributes.get("to")
        if to is not None and to.as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(self._type))
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT:
                value.dtype = self._type

    def _constant(self, value: ir.Value) -> ir.Value:
        """Return the half precision twin of an initializer."""
        if id(value) not in self._constants:
            self._constants[id(value)] = self._register(f"{value.name}_{self._dtype}", self._half(_numbers(value)))
        return self._constants[id(value)]

    def _register(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        made = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        made.shape, made.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        self._graph.register_initializer(made)
        return made

    def _half(self, array: NDArray[np.float32]) -> NDArray[np.generic]:
        made: NDArray[np.generic] = array.astype(np.float16 if self._dtype == "fp16" else ml_dtypes.bfloat16)
        return made

    def _cast(self, value: ir.Value, to: ir.DataType, before: ir.Node) -> ir.Value:
        key = (id(value), to)
        if key not in self._casts:
            node = ir.node("Cast", [value], {"to": int(to)}, num_outputs=1, name=f"{value.name}_to_{to.name.lower()}")
            made = node.outputs[0]
            made.name, made.shape, made.dtype = f"{value.name}_{to.name.lower()}", value.shape, to
            self._graph.insert_before(before, node)
            self._casts[key] = made
        return self._casts[key]

    def _round_scale(self, node: ir.Node) -> None:
        """Round a scale to the dtype and, for stored codes, the codes to the rounded scale.

        A scale in bf16 is off by up to 0.4 %, in fp16 by far more when it is subnormal; codes that know it are not.
        """
        codes, scale = node.inputs[0], node.inputs[1]
        if scale is None or scale.const_value is None or scale.dtype != ir.DataType.FLOAT:
            return
        exact = _numbers(scale)
        rounded = self._half(exact)
        # Up, never down: the largest values still fit 127 steps, and no step becomes zero.
        above = np.nextafter(rounded, np.full_like(rounded, np.inf))
        rounded = np.where(rounded.astype(np.float32) < exact, above, rounded)
        if codes is not None and codes.const_value is not None and node.op_type == "DequantizeLinear":
            self._round_codes(node, codes, exact, rounded.astype(np.float32))
        node.replace_input_with(1, self._shared(scale, lambda: self._register(f"{scale.name}_{self._dtype}", rounded)))

    def _shared(self, value: ir.Value, make: Callable[[], ir.Value]) -> ir.Value:
        if id(value) not in self._constants:
            self._constants[id(value)] = make()
        return self._constants[id(value)]

    def _round_codes(
        self, node: ir.Node, codes: ir.Value, exact: NDArray[np.float32], rounded: NDArray[np.float32]
    ) -> None:
        assert codes.const_value is not None
        stored = codes.const_value.numpy()
        if stored.dtype != np.int8:
            return
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
        shape = [1] * stored.ndim
        if exact.ndim == 1:
            shape[axis] = -1
        ratio = (exact / rounded).reshape(shape if exact.ndim == 1 else ())
        again = np.clip(np.rint(stored * ratio), -127, 127).astype(np.int8)
        if not np.array_equal(again, stored):
            node.replace_input_with(0, self._register(f"{codes.name}_{self._dtype}", again))

    def _restore_outputs(self) -> None:
        """Give the graph's outputs back in fp32, under their names."""
        for index, value in enumerate(self._graph.outputs):
            if value.dtype != self._type:
                continue
            name = value.name
            value.name = f"{name}_{self._dtype}"
            node = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, num_outputs=1, name=f"{name}_to_float")
            made = node.outputs[0]
            made.name, made.shape, made.dtype = name, value.shape, ir.DataType.FLOAT
            self._graph.append(node)
            self._graph.outputs[index] = made

    def _drop_unused(self) -> None:
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and value not in self._graph.outputs:
                del self._graph.initializers[name]


def _floats(value: ir.Value | None) -> bool:
    return value is not None and value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _numbers(value: ir.Value) -> NDArray[np.float32]:
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.float32)


def _largest(value: ir.Value) -> float:
    numbers = np.abs(_numbers(value))
    return float(numbers[np.isfinite(numbers)].max(initial=0.0))
