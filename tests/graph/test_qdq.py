"""Q/DQ in the graph computes what the torch model simulates, and stands where each engine's rules say."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.quantization import QuantizationRange, activation_ranges, calibrate, quantization_mode
from autocompress.engines.rules import QdqRules
from autocompress.errors import ExportError
from autocompress.graph import qdq
from autocompress.graph.export import save_onnx, to_onnx
from autocompress.graph.qdq import insert_qdq
from autocompress.graph.qdq_rules import RULES
from autocompress.policy import CompressionPolicy, LayerPolicy
from tests import networks

onnxruntime = pytest.importorskip("onnxruntime")

# TensorRT leaves small layers dense; its rules have tests of their own.
ENGINES = ("openvino", "onnxruntime")
LAYERS = ("conv", "after_pool", "left", "right", "tokens", "fc")


class Everything(nn.Module):
    """Batch-norm, a pool between int8 layers, one input read twice, linear on two and on three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.after_pool = nn.Conv2d(8, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1, bias=False)
        self.tokens, self.fc = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.bn(self.conv(x)).relu())
        x = self.after_pool(x).relu()
        x = (self.left(x) + self.right(x)).flatten(2).transpose(1, 2)
        return self.fc(functional.relu(self.tokens(x))[:, 0])


Exported = tuple[nn.Module, Mapping[str, QuantizationRange], ir.Model]


def export(model: nn.Module, names: tuple[str, ...], x: Tensor) -> Exported:
    policy = CompressionPolicy(layers={name: LayerPolicy("int8") for name in names})
    made = apply_policy(model, policy, CompressionContext(x))
    calibrate(made, [networks.images(16, x.shape[-1], seed=9)])
    with quantization_mode(made, "off"):
        graph = to_onnx(made, x)
    return made, {n: QuantizationRange(r.scale, r.signed) for n, r in activation_ranges(made).items()}, graph


@pytest.fixture(scope="module")
def exported() -> Exported:
    return export(networks.randomize(Everything()), LAYERS, networks.images(2))


def inserted(exported: Exported, engine: str) -> ir.Model:
    model = copy_of(exported[2])
    insert_qdq(model, exported[1], engine)
    return model


def copy_of(model: ir.Model) -> ir.Model:
    """Q/DQ is inserted in place; node metadata, by which layers are found, is kept."""
    return ir.from_proto(ir.to_proto(model))


def run(model: ir.Model, x: Tensor, folder: Path) -> NDArray[np.float32]:
    save_onnx(model, folder / "model.onnx")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": x.numpy()})
    return np.asarray(found)


def relative_error(found: NDArray[np.float32], model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted = model(x).numpy()
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def ops(model: ir.Model, kind: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == kind]


def above(value: ir.Value | None) -> ir.Node:
    assert value is not None
    node = value.producer()
    assert node is not None
    return node


def reader(model: ir.Model, layer: str) -> ir.Node:
    """The node that reads the layer's int8 weight."""
    (node,) = [n for n in model.graph if len(n.inputs) > 1 and n.inputs[1] and n.inputs[1].name == f"{layer}.weight_dq"]
    return node


@pytest.mark.parametrize("engine", ENGINES)
def test_the_graph_computes_what_torch_simulates(exported: Exported, engine: str, tmp_path: Path) -> None:
    x = networks.images(2, seed=3)
    error = relative_error(run(inserted(exported, engine), x, tmp_path), exported[0], x)
    with quantization_mode(exported[0], "off"):
        rounding = relative_error(run(inserted(exported, engine), x, tmp_path), exported[0], x)
    # A sum on the edge of a step may round to either side; the error of int8 itself is far larger.
    assert error < 0.3 * rounding
    assert error < 5e-3


class Repeated(nn.Module):
    """Runs a convolution on two maps and a linear layer twice in a row, as detectors and some transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.block, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.head(x).relu(), self.head(functional.max_pool2d(x, 2)).relu()]
        tokens = torch.cat([each.flatten(2).transpose(1, 2) for each in maps], 1)
        return self.fc(self.block(functional.gelu(self.block(tokens))).mean(1))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_layer_that_runs_more_than_once_is_int8_every_time(engine: str, tmp_path: Path) -> None:
    x = networks.images(2, seed=3)
    model, ranges, graph = export(networks.randomize(Repeated()), ("head", "block", "fc"), networks.images(2))
    insert_qdq(graph, ranges, engine)
    assert relative_error(run(graph, x, tmp_path), model, x) < 5e-3
    readers = [n for n in graph.graph if len(n.inputs) > 1 and n.inputs[1] and n.op_type != "Add"]
    for layer in ("head", "block"):
        runs = [n for n in readers if str(n.inputs[1].name).startswith(f"{layer}.weight_dq")]
        own = RULES[engine].own_weights and runs[0].op_type == "Conv"
        assert len(runs) == 2 and (runs[0].inputs[1] is not runs[1].inputs[1]) is own
        first, second = (above(run_.inputs[1]).inputs[0].const_value.numpy() for run_ in runs)
        assert np.array_equal(first, second)
    assert not {"head.weight", "block.weight"} & set(graph.graph.initializers)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_are_stored_as_int8_and_the_floats_are_gone(exported: Exported, engine: str) -> None:
    model = inserted(exported, engine)
    stored = {name: value.const_value for name, value in model.graph.initializers.items()}
    for layer in LAYERS:
        codes = stored[f"{layer}.weight_int8"]
        assert codes is not None
        assert codes.dtype == ir.DataType.INT8
        assert np.abs(codes.numpy()).max() == 127
        assert f"{layer}.weight" not in stored
    floats = [v for v in stored.values() if v is not None and v.dtype == ir.DataType.FLOAT]
    assert max(v.size for v in floats) <= 12  # biases and scales


def test_scales_are_per_output_channel_on_the_right_axis(exported: Exported) -> None:
    model = inserted(exported, "openvino")
    for layer, axis in (("conv", 0), ("tokens", 1), ("fc", 0)):
        dequantize = above(reader(model, layer).inputs[1])
        assert dequantize.attributes["axis"].as_int() == axis
        weight = exported[0].get_submodule(layer).weight
        scale = model.graph.initializers[f"{layer}.weight_scale"].const_value
        assert scale is not None
        assert scale.shape == (weight.shape[0],)
    tokens = exported[0].get_parameter("tokens.weight").detach()
    found = model.graph.initializers["tokens.weight_scale"].const_value
    assert found is not None
    np.testing.assert_allclose(found.numpy(), tokens.abs().amax(1).numpy() / 127, rtol=1e-5)


def test_a_pair_climbs_above_the_pool(exported: Exported) -> None:
    model = inserted(exported, "openvino")
    pool = above(reader(model, "after_pool").inputs[0])
    assert pool.op_type == "MaxPool"
    assert above(pool.inputs[0]).op_type == "DequantizeLinear"
    assert above(above(above(pool.inputs[0]).inputs[0]).inputs[0]).op_type == "Relu"


def test_layers_that_read_one_tensor_share_one_pair(exported: Exported) -> None:
    model = inserted(exported, "openvino")
    assert reader(model, "left").inputs[0] is reader(model, "right").inputs[0]
    assert len(ops(model, "QuantizeLinear")) == len(LAYERS) - 1


def test_layers_with_other_scales_get_pairs_of_their_own(exported: Exported, tmp_path: Path) -> None:
    model, ranges, graph = exported
    changed = {**ranges, "right": QuantizationRange(2 * ranges["right"].scale, ranges["right"].signed)}
    edited = copy_of(graph)
    insert_qdq(edited, changed, "onnxruntime")
    assert len(ops(edited, "QuantizeLinear")) == len(LAYERS)
    simulated = copy.deepcopy(model)
    simulated.right.input_quantizer.scale *= 2
    errors = []
    for seed in range(3, 12):
        x = networks.images(2, seed=seed)
        errors.append(relative_error(run(edited, x, tmp_path), simulated, x))
    # Where no sum lies on the edge of a step they are equal; one code that falls to the other side is some 5e-3.
    assert median(errors) < 1e-4 and max(errors) < 2e-2


def test_zero_points_are_zero_and_typed_by_the_sign(exported: Exported) -> None:
    model, ranges = inserted(exported, "openvino"), exported[1]
    assert {ranges[n].signed for n in LAYERS} == {True, False}
    for layer in ("left", "conv", "fc"):
        zero = above(reader(model, layer).inputs[0]).inputs[2]
        assert zero is not None
        assert zero.const_value is not None
        assert zero.const_value.dtype == (ir.DataType.INT8 if ranges[layer].signed else ir.DataType.UINT8)
        assert zero.const_value.numpy() == 0


def test_biases_are_int32_for_onnxruntime_alone(exported: Exported) -> None:
    model = inserted(exported, "onnxruntime")
    bias = above(reader(model, "left").inputs[2])
    codes, scale = (model.graph.initializers[f"left.bias_{n}"].const_value for n in ("int32", "scale"))
    weight_scale = model.graph.initializers["left.weight_scale"].const_value
    assert bias.op_type == "DequantizeLinear"
    assert codes is not None
    assert scale is not None
    assert weight_scale is not None
    assert codes.dtype == ir.DataType.INT32
    np.testing.assert_allclose(scale.numpy(), weight_scale.numpy() * exported[1]["left"].scale, rtol=1e-6)
    wanted = exported[0].get_parameter("left.bias").detach().numpy()
    np.testing.assert_allclose(codes.numpy() * scale.numpy(), wanted, atol=1e-3)
    plain = reader(inserted(exported, "openvino"), "left").inputs[2]
    assert plain is not None
    assert plain.producer() is None


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [0.0, 1e-9], ids=["dead", "nearly dead"])
def test_the_bias_of_a_dead_channel_survives(engine: str, size: float, tmp_path: Path) -> None:
    layer = nn.Conv2d(3, 8, 3)
    with torch.no_grad():
        layer.weight[2] = size
        layer.weight[2, 0, 0, 0] = -size
        layer.bias[2] = 100.0
    x = networks.images(2, size=4)
    exported = export(nn.Sequential(layer), ("0",), x)
    found = run(inserted(exported, engine), x, tmp_path)
    np.testing.assert_allclose(found[:, 2], 100.0, rtol=1e-3)
    assert relative_error(found, exported[0], x) < 5e-3


def test_signed_only_engines_get_int8_activations_of_the_same_reach(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = {"strict": QdqRules(hoist=frozenset(), int32_bias=False, signed_only=True)}
    monkeypatch.setattr(qdq, "RULES", rules)
    model = inserted(exported, "strict")
    # Without hoisting, the pair stands right above its layer.
    pair = above(reader(model, "after_pool").inputs[0])
    assert pair.op_type == "DequantizeLinear"
    assert pair.inputs[1] is not None
    assert pair.inputs[1].const_value is not None
    assert float(pair.inputs[1].const_value.numpy()) == pytest.approx(exported[1]["after_pool"].scale * 255 / 127)
    assert above(above(pair.inputs[0]).inputs[0]).op_type == "MaxPool"


def test_a_layer_that_is_not_in_the_graph(exported: Exported) -> None:
    with pytest.raises(ExportError, match="'nowhere'"):
        insert_qdq(copy_of(exported[2]), {"nowhere": QuantizationRange(1.0, signed=True)}, "openvino")
