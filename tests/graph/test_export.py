"""Torch to ONNX: what the graph computes, that layers are found in it, and what the file does not hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from autocompress.errors import ExportError
from autocompress.graph import export
from autocompress.graph.export import every_layer_node, layer_nodes, save_onnx, to_onnx
from autocompress.tasks.adapters import Adapter, InputSpec, pack
from tests import networks

onnxruntime = pytest.importorskip("onnxruntime")


class Everything(nn.Module):
    """Convolution with batch-norm, linear on two and on three axes, and one layer that is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.tokens = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6, bias=False))
        self.fc = nn.Linear(6, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu().flatten(2).transpose(1, 2)
        return self.fc(self.tokens(x).mean(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return networks.randomize(Everything())


@pytest.fixture(scope="module")
def graph(model: nn.Module) -> ir.Model:
    return to_onnx(model, networks.images(2))


@pytest.fixture(scope="module")
def nodes(graph: ir.Model) -> dict[str, ir.Node]:
    return layer_nodes(graph, ["conv", "tokens.0", "tokens.2", "fc", "unused", "bn", "tokens"])


@pytest.fixture(scope="module")
def file(graph: ir.Model, nodes: dict[str, ir.Node], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    save_onnx(graph, path)
    return path


def test_layers_are_found_by_name(nodes: dict[str, ir.Node]) -> None:
    found = {name: node.op_type for name, node in nodes.items() if name != "tokens"}
    assert found == {"conv": "Conv", "tokens.0": "MatMul", "tokens.2": "MatMul", "fc": "Gemm"}


def test_the_file_computes_what_torch_does(model: nn.Module, file: Path) -> None:
    x = networks.images(2, seed=4)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run([export.OUTPUT], {export.INPUT: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(x).numpy(), rtol=1e-4, atol=1e-5)


def test_batch_norm_is_folded_and_the_shape_and_opset_are_fixed(file: Path) -> None:
    loaded = onnx.load(file)
    assert "BatchNormalization" not in {node.op_type for node in loaded.graph.node}
    assert [d.dim_value for d in loaded.graph.input[0].type.tensor_type.shape.dim] == [2, 3, 8, 8]
    assert {o.domain: o.version for o in loaded.opset_import}[""] == export.OPSET


def test_the_file_says_nothing_of_the_source(file: Path) -> None:
    data = file.read_bytes()
    for word in (Path(__file__).name, "networks.py", "site-packages", "stack_trace", "def forward", str(Path.cwd())):
        assert word.encode() not in data, word
    assert not any(node.metadata_props for node in onnx.load(file).graph.node)


def test_exporting_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    to_onnx(nn.Sequential(nn.Linear(2, 2)).eval(), torch.zeros(1, 2))
    assert capfd.readouterr() == ("", "")


class Branching(nn.Module):
    """Control flow on a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def test_data_dependent_control_flow_is_explained() -> None:
    with pytest.raises(ExportError, match="data-dependent control flow") as caught:
        to_onnx(Branching(), torch.ones(1, 2))
    assert "torch.where" in str(caught.value)


def test_any_other_failure_is_an_export_error_with_its_words() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("the widget is loose")

    with pytest.raises(ExportError, match="the widget is loose") as caught:
        to_onnx(Failing(), torch.ones(1, 2))
    assert "data-dependent" not in str(caught.value)


def test_a_model_beyond_what_one_file_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Proto:
        def SerializeToString(self) -> bytes:  # noqa: N802
            raise ValueError("too large")

    monkeypatch.setattr(export.ir, "to_proto", lambda model: Proto())
    empty = ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)
    with pytest.raises(ExportError, match="2 GB"):
        save_onnx(empty, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_every_node_has_a_name_of_its_own(file: Path) -> None:
    names = [node.name for node in onnx.load(file).graph.node]
    assert all(names)
    assert len(set(names)) == len(names)


def test_names_survive_saving(graph: ir.Model, file: Path) -> None:
    assert [node.name for node in onnx.load(file).graph.node] == [node.name for node in graph.graph]


def test_missing_and_shared_names_are_made_unique(model: nn.Module, tmp_path: Path) -> None:
    graph = to_onnx(model, networks.images(2))
    first, second, third, *_ = graph.graph
    second.name = third.name
    first.name = None
    kept = [node.name for node in graph.graph][3:-1]
    save_onnx(graph, tmp_path / "model.onnx")
    names = [node.name for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    assert names[3:-1] == kept


def test_the_last_node_is_called_as_the_output(file: Path) -> None:
    """OpenVINO renames it so, and its times could not be told by the file's name else."""
    graph = onnx.load(file).graph
    (last,) = (node for node in graph.node if graph.output[0].name in node.output)
    assert last.name == graph.output[0].name == "output"


class Again(nn.Module):
    """One linear layer twice in a row, too large for the exporter to transpose its weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x).relu())


def test_a_layer_that_runs_twice_reads_one_stored_weight_twice() -> None:
    model = Again().eval()
    graph = to_onnx(model, torch.zeros(1, 3, 128))
    nodes = every_layer_node(graph, ["block"])["block"]
    assert len(nodes) == 2
    first, second = (node.inputs[1] for node in nodes)
    assert first is second is not None
    assert first.const_value is not None
    np.testing.assert_array_equal(first.const_value.numpy(), model.block.weight.detach().numpy().T)
    assert not any(node.op_type == "Transpose" for node in graph.graph)
    # Nothing of the weight as it was is left.
    assert len([value for value in graph.graph.initializers.values() if len(value.shape or ()) == 2]) == 1


class Texts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(5000, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        weight = mask[..., None].float()
        found: Tensor = self.fc((self.table(ids) * weight).sum(1) / weight.sum(1))
        return found


def test_inputs_of_an_adapter_keep_their_names_and_dtypes(tmp_path: Path) -> None:
    specs = (InputSpec("ids", (6,), "int64"), InputSpec("mask", (6,), "bool"))
    model = Adapter(Texts(), specs).eval()
    ids = torch.randint(2049, 5000, (1, 6))
    packed = pack({"ids": ids, "mask": ids % 3 > 0}, specs)
    graph = to_onnx(model, packed)
    assert [(v.name, str(v.dtype)) for v in graph.graph.inputs] == [("ids", "INT64"), ("mask", "BOOL")]
    assert list(layer_nodes(graph, ["model.fc"])) == ["model.fc"]
    save_onnx(graph, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (found,) = session.run(None, {"ids": ids.numpy(), "mask": (ids % 3 > 0).numpy()})
    np.testing.assert_allclose(found, model(packed).detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("last", ["model", "inputs", "both"])
def test_the_graph_does_not_depend_on_how_torch_lays_out_weights_and_inputs(last: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()
    inputs = networks.images(1)
    plain = [node.op_type for node in to_onnx(model, inputs).graph]
    if last != "inputs":
        model = model.to(memory_format=torch.channels_last)
    if last != "model":
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    assert [node.op_type for node in to_onnx(model, inputs).graph] == plain
    assert model[0].weight.is_contiguous() == (last == "inputs")
