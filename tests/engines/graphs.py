"""Small ONNX graphs made by hand, and what they compute, in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
CLASSES = 10


def weights(channels: int, layers: int, seed: int = 0) -> dict[str, Array]:
    """Convolution weights ``w0…`` (O, I, 3, 3) and a head ``W`` (channels, 10), ``b`` (10,)."""
    rng = np.random.default_rng(seed)
    inputs = [3] + [channels] * (layers - 1)
    made: dict[str, Array] = {
        f"w{i}": rng.standard_normal((channels, count, 3, 3)) / np.sqrt(count * 9) for i, count in enumerate(inputs)
    }
    made["W"] = rng.standard_normal((channels, CLASSES))
    made["b"] = rng.standard_normal(CLASSES)
    return {name: value.astype(np.float32) for name, value in made.items()}


def convnet(
    path: Path,
    *,
    channels: int = 8,
    size: int = 16,
    layers: int = 1,
    batch: int | str | None = 1,
    activation: str = "Relu",
    inputs: int = 1,
) -> Path:
    """Write (Conv → activation) x layers → global average → Gemm for inputs ``(batch, 3, size, size)``."""
    nodes, last = [], "input"
    for i in range(layers):
        nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], name=f"conv{i}", pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node(activation, [f"c{i}"], [f"a{i}"], name=f"act{i}"))
        last = f"a{i}"
    return _save(path, nodes, last, weights(channels, layers), (batch, 3, size, size), inputs=inputs)


def quantized(path: Path, *, channels: int = 8, size: int = 16, batch: int = 1) -> Path:
    """Write `convnet` of one layer with Q/DQ (int8, symmetric, per-channel weights) around its convolution."""
    made = weights(channels, 1)
    scales = np.abs(made["w0"]).max(axis=(1, 2, 3)) / 127
    integers = np.rint(made["w0"] / scales[:, None, None, None]).astype(np.int8)
    made |= {
        "w0": integers,
        "w0_scale": scales.astype(np.float32),
        "w0_zero": np.zeros(channels, dtype=np.int8),
        "x_scale": np.array(4 / 127, dtype=np.float32),
        "x_zero": np.array(0, dtype=np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "x_scale", "x_zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "x_scale", "x_zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w0", "w0_scale", "w0_zero"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["c0"], name="conv0", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["a0"]),
    ]
    return _save(path, nodes, "a0", made, (batch, 3, size, size))


def lookup(path: Path, *, batch: int | str = 1) -> Path:
    """Write the sum of the rows of a table at ``ids (batch, 4)``, int64, plus ``values (batch, 3)`` by a matrix."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], name="rows"),
        helper.make_node("ReduceSum", ["rows", "axes"], ["sum"], name="sum", keepdims=0),
        helper.make_node("MatMul", ["values", "matrix"], ["product"], name="product"),
        helper.make_node("Add", ["sum", "product"], ["output"], name="end"),
    ]
    made = {**_lookup_weights(), "axes": np.array([1], np.int64)}
    graph = helper.make_graph(
        nodes,
        "lookup",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, (batch, 4)),
            helper.make_tensor_value_info("values", TensorProto.FLOAT, (batch, 3)),
        ],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, (batch, 8))],
        [numpy_helper.from_array(value, name) for name, value in made.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def lookup_inputs(count: int) -> tuple[Array, Array]:
    """Return ids ``(count, 4)`` and values ``(count, 3)`` of `lookup`."""
    random = np.random.default_rng(3)
    return random.integers(2049, 4001, (count, 4)), random.standard_normal((count, 3)).astype(np.float32)


def looked_up(ids: Array, values: Array) -> Array:
    """Return what `lookup` computes ``(n, 8)``."""
    made = _lookup_weights()
    found: Array = made["table"][ids].sum(1) + values @ made["matrix"]
    return found


def _lookup_weights() -> dict[str, Array]:
    random = np.random.default_rng(2)
    return {
        "table": np.round(4 * random.standard_normal((4001, 8))).astype(np.float32) / 4,
        "matrix": np.round(4 * random.standard_normal((3, 8))).astype(np.float32) / 4,
    }


def residual(path: Path, *, channels: int = 16, size: int = 16, named: bool = True) -> Path:
    """Write stem → relu, left → relu → right, their sum → relu, tail → relu, and a head, all convolutions 3x3."""
    made = weights(channels, 4)
    layers = ("stem", "left", "right", "tail")
    for index, name in enumerate(layers):
        made[f"{name}.weight"] = made.pop(f"w{index}")

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> Any:
        return helper.make_node(op, inputs, [output], name=f"n_{output}" if named else "", **attributes)

    nodes = []
    for name, source in zip(layers, ("input", "stem_relu", "left_relu", "sum_relu"), strict=True):
        nodes.append(node("Conv", [source, f"{name}.weight"], name, pads=[1, 1, 1, 1]))
        if name == "right":
            nodes.append(node("Add", [name, "stem_relu"], "sum"))
        last = "sum" if name == "right" else name
        nodes.append(node("Relu", [last], f"{last}_relu"))
    return _save(path, nodes, "tail_relu", made, (1, 3, size, size))


def external(path: Path) -> Path:
    """Write `convnet` with its weights in a file beside it."""
    onnx.save(onnx.load(convnet(path)), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def reference(inputs: Array, channels: int = 8, layers: int = 1) -> Array:
    """What `convnet` computes, in float64: ``(n, 3, s, s)`` to ``(n, 10)``."""
    made = weights(channels, layers)
    x = inputs.astype(np.float64)
    for i in range(layers):
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        x = np.maximum(np.einsum("nchwij,ocij->nohw", windows, made[f"w{i}"].astype(np.float64)), 0)
    result: Array = x.mean(axis=(2, 3)) @ made["W"].astype(np.float64) + made["b"]
    return result


def images(count: int, size: int = 16, seed: int = 1) -> Array:
    """``(count, 3, size, size)`` float32 noise."""
    return np.random.default_rng(seed).standard_normal((count, 3, size, size)).astype(np.float32)


def _save(
    path: Path, nodes: list[Any], last: str, made: dict[str, Array], shape: tuple[Any, ...], *, inputs: int = 1
) -> Path:
    nodes = [
        *nodes,
        helper.make_node("GlobalAveragePool", [last], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "W", "b"], ["output"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name in ["input", *(f"input{i}" for i in range(1, inputs))]
        ],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, (shape[0], CLASSES))],
        [numpy_helper.from_array(value, name) for name, value in made.items()],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path
