"""What the profiler's events tell: its own cost is taken out, and new nodes are traced back to the graph's."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from autocompress.compress.quantization import QuantizationRange
from autocompress.engines import EngineFile, EngineOptions
from autocompress.engines.kernel_attribution import KernelTime
from autocompress.engines.onnxruntime import ONNXRuntimeEngine, ONNXRuntimeRunner
from autocompress.engines.onnxruntime_profile import measure_overhead, overhead_of
from autocompress.graph.export import save_onnx
from autocompress.graph.qdq import insert_qdq
from tests.engines import graphs

pytest.importorskip("onnxruntime")


def write(path: Path, nodes: list[onnx.NodeProto], shape: tuple[int, ...], made: tuple[int, ...]) -> EngineFile:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, made)],
        [
            helper.make_tensor("W", TensorProto.FLOAT, (8, 8), np.eye(8, dtype=np.float32).ravel()),
            helper.make_tensor("b", TensorProto.FLOAT, (8,), np.ones(8, np.float32)),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return EngineFile("onnxruntime", path, EngineOptions())


def profiled(file: EngineFile, shape: tuple[int, ...], seconds: float = 0) -> list[KernelTime]:
    return ONNXRuntimeEngine().kernel_times(file, np.ones(shape, np.float32), seconds)


def test_the_profilers_cost_is_taken_out(tmp_path: Path) -> None:
    overhead = measure_overhead(ONNXRuntimeRunner)
    assert overhead.call_us > 0
    assert overhead.node_us > 0
    names = ["input", *(f"t{i}" for i in range(150)), "output"]
    nodes = [helper.make_node("Neg", [a], [b], name=b) for a, b in itertools.pairwise(names)]
    kernels = profiled(write(tmp_path / "chain.onnx", nodes, (1, 8), (1, 8)), (1, 8), 0.2)
    assert [k.nodes for k in kernels] == [(name,) for name in names[1:]]
    # A node that does nothing takes a fraction of what the profiler costs it.
    assert np.median([k.time_ms for k in kernels]) * 1e3 < 0.7 * overhead.node_us


@pytest.mark.parametrize("changed", [(8.0, 66.0, 2.5), (14.0, 34.0, 2.5)])
def test_a_change_of_speed_between_two_chains_says_nothing_of_a_call(changed: tuple[float, float, float]) -> None:
    fast, slow = (8.0, 34.0, 2.5), (14.0, 66.0, 4.5)
    # Of 34 µs for 120 nodes and 8 for 20, a node takes 0.26 and a call 2.8.
    found = overhead_of([fast, changed, fast])
    assert (found.call_us, found.node_us) == (pytest.approx(2.8), pytest.approx(2.24))
    assert overhead_of([slow, changed, slow]).call_us == pytest.approx(3.6)


def test_a_fused_product_names_its_bias_though_a_reshape_makes_the_tensor(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["input", "W"], ["product"], name="product"),
        helper.make_node("Add", ["product", "b"], ["biased"], name="biased"),
        helper.make_node("Softmax", ["biased"], ["output"], name="soft"),
    ]
    kernels = profiled(write(tmp_path / "model.onnx", nodes, (1, 5, 8), (1, 5, 8)), (1, 5, 8))
    of = {k.op: k.nodes for k in kernels}
    assert of["Gemm"] == ("product", "biased")
    assert of["Reshape"] == ()
    assert of["Softmax"] == ("soft",)


def test_kernels_say_where_they_ran_and_whose_op_they_are(tmp_path: Path) -> None:
    file = EngineFile("onnxruntime", graphs.residual(tmp_path / "model.onnx"), EngineOptions())
    kernels = ONNXRuntimeEngine().kernel_times(file, graphs.images(1), 0)
    assert all(k.kernel.endswith(f"{k.op} CPUExecutionProvider") for k in kernels)
    assert kernels[-1].kernel == "Gemm CPUExecutionProvider"


def test_int8_kernels_are_the_runtimes_own(tmp_path: Path) -> None:
    graph = ir.load(graphs.residual(tmp_path / "plain.onnx"))
    insert_qdq(graph, {name: QuantizationRange(0.05, signed=False) for name in ("left", "right")}, "onnxruntime")
    save_onnx(graph, tmp_path / "model.onnx")
    file = EngineFile("onnxruntime", tmp_path / "model.onnx", EngineOptions())
    kernels = ONNXRuntimeEngine().kernel_times(file, graphs.images(1), 0)
    (left,) = (k for k in kernels if "n_left" in k.nodes)
    assert left.op == "QLinearConv"
    assert left.dtype == "int8"


def test_events_stay_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.engines.onnxruntime_profile._MOST_EVENTS", 200)
    nodes = [helper.make_node("Relu", ["input"], ["output"], name="relu")]
    (kernel,) = profiled(write(tmp_path / "model.onnx", nodes, (1, 8), (1, 8)), (1, 8), 3)
    # Three sessions of 200 runs and the binding's, less the warm-up of each.
    assert kernel.n == 3 * (201 - 1 - 20)


def test_a_dynamic_batch_is_profiled_at_the_files_own(tmp_path: Path) -> None:
    graph = graphs.convnet(tmp_path / "model.onnx", batch="N")
    file = EngineFile("onnxruntime", graph, EngineOptions(batch_size=3))
    kernels = ONNXRuntimeEngine().kernel_times(file, graphs.images(3), 0)
    assert {"conv0", "act0", "head"} <= {name for k in kernels for name in k.nodes}
