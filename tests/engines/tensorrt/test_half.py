"""Half precision written into a graph: the same function, fp32 where fp16 overflows, codes that know their scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from autocompress.compress.quantization import QuantizationRange
from autocompress.engines.tensorrt.half import ISLAND_OPS, to_half
from autocompress.errors import BuildError
from autocompress.graph.export import save_onnx, to_onnx
from autocompress.graph.qdq import insert_qdq
from tests import networks

onnxruntime = pytest.importorskip("onnxruntime")


class LogSumExp(nn.Module):
    """Exponentials of logits near 15: e^15 is 3.3 million, beyond fp16's 65504."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2).mean(2) + 15
        return torch.log(torch.exp(y).sum(1, keepdim=True))


def graph(model: nn.Module) -> ir.Model:
    return to_onnx(networks.randomize(model), networks.images(1, 8))


def run(model: ir.Model, folder: Path) -> NDArray[np.float32]:
    save_onnx(model, folder / "model.onnx")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": networks.images(1, 8).numpy()})
    return np.asarray(found)


def dtypes(model: ir.Model) -> set[str]:
    return {v.dtype.name for n in model.graph for v in n.outputs if v.dtype is not None}


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_same_function_with_fp32_at_the_borders(dtype: str, tmp_path: Path) -> None:
    model = graph(networks.Plain())
    expected = run(model, tmp_path)
    assert to_half(model, dtype) == []
    assert (model.graph.inputs[0].dtype, model.graph.outputs[0].dtype) == (ir.DataType.FLOAT, ir.DataType.FLOAT)
    assert [v.name for v in model.graph.outputs] == ["output"]
    wanted = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}[dtype]
    kept = {n.op_type for n in model.graph if any(v.dtype == ir.DataType.FLOAT for v in n.outputs)}
    assert kept == {"Cast"}
    assert {v.dtype.name for v in model.graph.initializers.values() if v.dtype.is_floating_point()} == {wanted}  # type: ignore[union-attr]
    if dtype == "fp16":  # ONNX Runtime has no bf16 convolution on a CPU
        np.testing.assert_allclose(run(model, tmp_path), expected, rtol=2e-2, atol=2e-2)


def test_islands_keep_what_overflows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(graph(LogSumExp()), tmp_path)
    model = graph(LogSumExp())
    kept = to_half(model, "fp16")
    assert len(kept) == 3
    np.testing.assert_allclose(run(model, tmp_path), expected, rtol=1e-2)
    monkeypatch.setattr("autocompress.engines.tensorrt.half.ISLAND_OPS", {})
    without = graph(LogSumExp())
    assert to_half(without, "fp16") == []
    # ONNX Runtime widens fp16 on a CPU; the reference computes in it.
    with np.errstate(over="ignore"):
        (found,) = ReferenceEvaluator(ir.to_proto(without)).run(None, {"input": networks.images(1, 8).numpy()})
    assert np.isinf(found).all()
    assert {"Exp", "ReduceSum", "Log"} <= set(ISLAND_OPS)


def test_a_constant_beyond_fp16_makes_an_island(tmp_path: Path) -> None:
    class Large(networks.Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1e6 / 1e6

    expected = run(graph(Large()), tmp_path)
    model = graph(Large())
    assert len(to_half(model, "fp16")) == 2
    np.testing.assert_allclose(run(model, tmp_path), expected, rtol=2e-2, atol=2e-2)
    assert to_half(graph(Large()), "bf16") == []


def test_named_nodes_stay_fp32(tmp_path: Path) -> None:
    model = graph(networks.Plain())
    name = next(n.name for n in model.graph if n.op_type == "Conv")
    assert name is not None
    assert to_half(model, "fp16", fp32_nodes=[name]) == [name]
    node = next(n for n in model.graph if n.name == name)
    assert node.outputs[0].dtype == ir.DataType.FLOAT
    with pytest.raises(BuildError, match="'nowhere'"):
        to_half(graph(networks.Plain()), "fp16", fp32_nodes=["nowhere"])


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_codes_follow_their_rounded_scale(size: float, tmp_path: Path) -> None:
    model = networks.Plain()
    networks.randomize(model)
    with torch.no_grad():
        model.conv2.weight *= size  # with 1e-4 the steps are subnormal in fp16
    exported = to_onnx(model, networks.images(1, 8))
    insert_qdq(exported, {"conv2": QuantizationRange(0.05, signed=True)}, "openvino")
    before = _weight(exported, "")
    to_half(exported, "fp16")
    after = _weight(exported, "_fp16")
    step = np.abs(before).max(axis=(1, 2, 3), keepdims=True) / 127
    # Half a step, of which the rounding up of a subnormal one may make another 2^-24.
    assert np.abs(after - before).max() <= 0.51 * (step.max() + 2.0**-24)
    assert "FLOAT16" in dtypes(exported)


def _weight(model: ir.Model, suffix: str) -> NDArray[np.float32]:
    stored = {name: value.const_value for name, value in model.graph.initializers.items()}
    codes = stored.get(f"conv2.weight_int8{suffix}") or stored["conv2.weight_int8"]
    scale = stored[f"conv2.weight_scale{suffix}"]
    assert codes is not None
    assert scale is not None
    return codes.numpy().astype(np.float32) * scale.numpy().astype(np.float32).reshape(-1, 1, 1, 1)


def test_control_flow_is_refused() -> None:
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    branch = helper.make_graph(
        [helper.make_node("Relu", ["input"], ["r"])], "b", [], [value("r", TensorProto.FLOAT, (1, 4))]
    )
    nodes = [helper.make_node("If", ["yes"], ["output"], name="choice", then_branch=branch, else_branch=branch)]
    made = helper.make_graph(
        nodes, "g", [value("input", TensorProto.FLOAT, (1, 4))], [value("output", TensorProto.FLOAT, (1, 4))],
        [helper.make_tensor("yes", TensorProto.BOOL, [], [True])],
    )  # fmt: skip
    proto: onnx.ModelProto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(BuildError, match=r"'choice' \(If\) is control flow"):
        to_half(ir.from_proto(proto), "fp16")
