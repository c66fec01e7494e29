"""Graphs from the builder are the same whether edited or exported, and those that cannot be edited are exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.quantization import QuantizationRange, activation_ranges, calibrate, quantization_mode
from autocompress.config import QuantizationConfig
from autocompress.engines.kernel_attribution import KernelTime
from autocompress.errors import ExportError
from autocompress.graph.builder import GraphBuilder, Ranges, ranges_for
from autocompress.graph.export import save_onnx, to_onnx
from autocompress.graph.roundings import simulated
from autocompress.model.inventory import take_inventory
from autocompress.policy import CompressionPolicy, LayerPolicy
from tests import networks

onnxruntime = pytest.importorskip("onnxruntime")

POLICY = CompressionPolicy(
    pruning={"stem": 0.25, "wider.conv1": 0.5},
    layers={"wider.conv1": LayerPolicy("int8"), "wider.conv2": LayerPolicy("int8", 0.5), "fc": LayerPolicy("int8")},
    removed_blocks=("same",),
)


class Padded(nn.Module):
    """Padding said by a word: its factors cannot be edited in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding="same")
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


class Linear(nn.Module):
    """A convolution whose result a sum reads without a ReLU, and a clipped one."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.Conv2d(16, 8, 1, bias=False)
        self.norm, self.again, self.fc = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.project(functional.relu6(self.expand(x))))
        return self.fc((x + functional.relu6(self.again(x))).mean((2, 3)))


class NormAct(nn.BatchNorm2d):
    """A batch-norm that holds the activation behind it, as timm's do."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


class Activated(nn.Module):
    """Convolutions whose results are rounded between a batch-norm and the activation that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), NormAct(16, nn.GELU())
        self.conv, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), NormAct(16, nn.ReLU())
        self.last, self.fc = nn.Conv2d(16, 8, 1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.stem(x))
        return self.fc(self.last(x + self.norm2(self.conv(x))).relu().mean((2, 3)))


def builder(model: nn.Module, engine: str = "onnxruntime") -> GraphBuilder:
    return GraphBuilder(model, networks.images(2), take_inventory(model, networks.images()), engine)


def made(model: nn.Module, policy: CompressionPolicy) -> tuple[nn.Module, Ranges]:
    compressed = apply_policy(model, policy, CompressionContext(networks.images()))
    if not policy.int8_layers:
        return compressed, Ranges()
    calibrate(compressed, [networks.images(16, seed=9)])
    return compressed, Ranges(activation_ranges(compressed))


def run(graph: ir.Model, folder: Path) -> NDArray[np.float32]:
    save_onnx(graph, folder / "model.onnx")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["output"], {"input": networks.images(2, seed=4).numpy()})[0])


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were exported because their graph could not be made by editing."""
    seen: list[nn.Module] = []
    real = to_onnx

    def count(model: nn.Module, inputs: torch.Tensor) -> ir.Model:
        seen.append(model)
        return real(model, inputs)

    monkeypatch.setattr("autocompress.graph.builder.to_onnx", count)
    return seen


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_edited_and_exported_graphs_compute_the_same(engine: str, tmp_path: Path, exports: list[nn.Module]) -> None:
    base = networks.randomize(networks.Residual())
    build = builder(base, engine)
    model, ranges = made(base, POLICY)
    assert build.edits
    edited = run(build.build(model, ranges, POLICY.removed_blocks).model, tmp_path)
    assert exports == []
    build.export_from_now_on()
    assert not build.edits
    exported = run(build.build(model, ranges, POLICY.removed_blocks).model, tmp_path)
    assert exports == [model]
    with torch.no_grad():
        simulated = model(networks.images(2, seed=4)).numpy()
    np.testing.assert_allclose(edited, exported, atol=1e-3 * np.abs(exported).max())
    assert np.linalg.norm(edited - simulated) < 0.01 * np.linalg.norm(simulated)
    build.edit_again()
    build.build(model, ranges, POLICY.removed_blocks)
    assert build.edits and exports == [model]


def test_what_cannot_be_edited_is_exported_and_the_next_is_edited_again(
    tmp_path: Path, exports: list[nn.Module]
) -> None:
    base = networks.randomize(Padded())
    build = builder(base)
    factorized, _ = made(base, CompressionPolicy(layers={"conv": LayerPolicy(rank_ratio=0.5)}))
    found = run(build.build(factorized, Ranges()).model, tmp_path)
    assert exports == [factorized]
    with torch.no_grad():
        np.testing.assert_allclose(found, factorized(networks.images(2, seed=4)).numpy(), atol=1e-4)
    pruned, _ = made(base, CompressionPolicy(pruning={"conv": 0.5}))
    found = run(build.build(pruned, Ranges()).model, tmp_path)
    assert exports == [factorized] and build.edits
    with torch.no_grad():
        np.testing.assert_allclose(found, pruned(networks.images(2, seed=4)).numpy(), atol=1e-4)


def test_quantizers_are_left_out_of_an_export_and_come_back(exports: list[nn.Module]) -> None:
    base = networks.randomize(networks.Residual())
    build = builder(base)
    build.export_from_now_on()
    model, ranges = made(base, POLICY)
    with torch.no_grad():
        before = model(networks.images())
    graph = build.build(model, Ranges(), POLICY.removed_blocks).model
    assert exports == [model] and not [n for n in graph.graph if n.op_type == "QuantizeLinear"]
    with torch.no_grad():
        assert torch.equal(model(networks.images()), before)
        with quantization_mode(model, "off"):
            assert not torch.equal(model(networks.images()), before)
    int8 = build.build(model, ranges, POLICY.removed_blocks).model
    assert len({n.name for n in int8.graph if n.op_type == "QuantizeLinear"}) >= 3


def test_a_range_of_a_layer_that_is_not_there_is_an_error() -> None:
    base = networks.randomize(networks.Residual())
    with pytest.raises(ExportError, match="nowhere"):
        builder(base).build(base, Ranges({"nowhere": QuantizationRange(0.1, signed=True)}))


@pytest.mark.parametrize("written", [False, True])
def test_layers_are_told_by_their_nodes_and_the_layout_is_the_models(written: bool, tmp_path: Path) -> None:
    base = networks.randomize(networks.Residual())
    build = builder(base)
    graph = build.build(base, Ranges()).model
    if written:
        save_onnx(graph, tmp_path / "model.onnx")
        graph = ir.load(tmp_path / "model.onnx")
    told = {build.layer_of(node.name or "") for node in graph.graph} - {None}
    assert told == set(build.layout.inventory.layers) == set(build.layout.wiring.layers)
    assert build.layout is build.layout


def test_what_makes_a_tensor_ready_is_its_readers_where_kernels_are_told_in_order() -> None:
    base = networks.randomize(networks.Residual())

    def kernel(op: str, time_ms: float, *nodes: str) -> KernelTime:
        return KernelTime(nodes, op, op, "fp32", time_ms, 10)

    found = {}
    for engine in ("onnxruntime", "openvino"):
        build = builder(base, engine)
        nodes = {build.layer_of(n.name or ""): n.name or "" for n in build.build(base, Ranges()).model.graph}
        kernels = [
            kernel("Conv", 2.0, nodes["stem"]), kernel("ReorderOutput", 0.5), kernel("Transpose", 0.5),
            kernel("Conv", 3.0, nodes["same.conv1"]), kernel("Conv", 1.0, nodes["same.conv2"], nodes["fc"]),
            kernel("Conv", 3.0, nodes["wider.conv1"]),
        ]  # fmt: skip
        found[engine] = build.shares(kernels, 20.0)
    # All kernels make up the latency: 10 ms of the profiler are 20 of the network. One of two layers is no layer's.
    assert found["onnxruntime"] == pytest.approx({"stem": 4.0, "same.conv1": 8.0, "wider.conv1": 6.0})
    assert found["openvino"] == pytest.approx({"stem": 4.0, "same.conv1": 6.0, "wider.conv1": 6.0})


def test_results_have_ranges_only_where_the_engine_wants_them(tmp_path: Path) -> None:
    base = networks.randomize(networks.Residual())
    policy = CompressionPolicy(layers={"same.conv2": LayerPolicy("int8"), "fc": LayerPolicy("int8")})
    model, _ = made(base, policy)
    calibration = [networks.images(16, seed=9)]
    assert builder(base, "openvino").ranges(model, calibration, QuantizationConfig()).results == {}
    build = builder(base)
    ranges = build.ranges(model, calibration, QuantizationConfig())
    assert set(ranges.inputs) == {"same.conv2", "fc"} and set(ranges.results) == {"same.conv2"}
    # Without the editing's knowledge of which batch-norm goes into which layer, it is found out.
    assert ranges_for("onnxruntime", model, calibration, QuantizationConfig()).results == ranges.results
    with torch.no_grad():
        simulated = model(networks.images(2, seed=4)).numpy()
    found = run(build.build(model, ranges).model, tmp_path)
    assert np.linalg.norm(found - simulated) < 0.02 * np.linalg.norm(simulated)


@pytest.mark.parametrize("network", [networks.Residual, Linear, Activated])
def test_what_else_the_graph_rounds_is_simulated_exactly(network: type[nn.Module], tmp_path: Path) -> None:
    base = networks.randomize(network())
    layers = [n for n, m in base.named_modules() if isinstance(m, nn.Conv2d)]
    model, _ = made(base, CompressionPolicy(layers={name: LayerPolicy("int8") for name in layers}))
    build = builder(base)
    graph = build.build(model, build.ranges(model, [networks.images(16, seed=9)], QuantizationConfig()))
    assert graph.dense == {} and graph.roundings.results
    x = networks.images(2, seed=4)
    with torch.no_grad():
        alone = model(x).numpy()
        with simulated(model, graph.roundings):
            expected = model(x.clone()).numpy()
        again = model(x).numpy()
    found = run(graph.model, tmp_path)
    # A sum in another order may move one value to the next code, but hardly in every sample.
    assert np.abs(found - expected).max(1).min() < 1e-5
    assert np.abs(found - alone).max(1).min() > 1e-3
    # Nothing stays behind.
    assert np.array_equal(again, alone) and torch.equal(x, networks.images(2, seed=4))


def test_a_norm_that_holds_its_activation_is_folded_and_the_activation_stays(
    tmp_path: Path, exports: list[nn.Module]
) -> None:
    base = networks.randomize(Activated())
    build = builder(base)
    assert build.edits
    pruned, _ = made(base, CompressionPolicy(pruning={"last": 0.5}))
    graph = build.build(pruned, Ranges()).model
    assert exports == [] and not [n for n in graph.graph if n.op_type == "BatchNormalization"]
    with torch.no_grad():
        expected = pruned(networks.images(2, seed=4)).numpy()
    np.testing.assert_allclose(run(graph, tmp_path), expected, atol=1e-5)


def test_how_biases_are_rounded_is_simulated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16)).eval()
    model, _ = made(base, CompressionPolicy(layers={"1": LayerPolicy("int8")}))
    build = builder(base)
    graph = build.build(model, build.ranges(model, [networks.images(16, seed=9)], QuantizationConfig()))
    assert set(graph.roundings.biases) == {"1"} and graph.roundings.results == {}
    x = networks.images(2, seed=4)
    with torch.no_grad():
        alone = model(x).numpy()
        with simulated(model, graph.roundings):
            expected = model(x.clone()).numpy()
    found = run(graph.model, tmp_path)
    # The bias alone is rounded: to the same for every sample.
    assert np.abs(found - expected).max() < 0.1 * np.abs(found - alone).max()
    np.testing.assert_allclose(expected - alone, np.tile(graph.roundings.biases["1"], (2, 1)), atol=1e-6)


def test_a_shortcut_reads_what_the_first_layer_of_its_block_reads() -> None:
    base = networks.randomize(networks.Residual())
    model, ranges = made(base, CompressionPolicy(layers={f"same.conv{n}": LayerPolicy("int8") for n in (1, 2)}))
    roundings = builder(base).build(model, ranges).roundings
    assert set(roundings.shared) == {"same.conv1"} and roundings.results == {}
    assert roundings.shared["same.conv1"] == ranges.inputs["same.conv1"]
