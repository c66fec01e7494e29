"""Divided inputs in the graph: as few products as can be, and what engines compute is what torch simulates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.compress.quantization import quantization_mode
from autocompress.compress.smoothing import divisors
from autocompress.config import QuantizationConfig
from autocompress.engines import EngineOptions, get_engine
from autocompress.errors import ExportError
from autocompress.graph.builder import Graph, GraphBuilder, Ranges, exported, ranges_for
from autocompress.graph.export import save_onnx, to_onnx
from autocompress.graph.input_division import divide_inputs
from autocompress.model.inventory import take_inventory
from tests import attention_networks
from tests.compress.test_smoothing import int8, output, planted, smoothed, unsmoothed


def run(graph: ir.Model, engine: str, inputs: Tensor, folder: Path) -> NDArray[np.float32]:
    pytest.importorskip(engine)
    save_onnx(graph, folder / "model.onnx")
    runtime = get_engine(engine)
    options = EngineOptions("fp32", 1, len(inputs))
    with runtime.open(runtime.build(folder / "model.onnx", options, folder / "built")) as runner:
        return runner.infer(inputs.numpy())


def products(graph: ir.Model) -> int:
    """Return how many divisions there are."""
    return sum(1 for node in graph.graph if node.op_type == "Mul" and "_factor" in (node.inputs[1].name or ""))  # type: ignore[union-attr]


def graph_of(made: nn.Module, base: nn.Module, inputs: Tensor, engine: str, how: str) -> Graph:
    ranges = ranges_for(engine, made, [inputs], QuantizationConfig())
    if how == "exported":
        return exported(made, inputs, ranges, engine)
    builder = GraphBuilder(base, inputs, take_inventory(base, inputs), engine)
    graph = builder.build(made, ranges)
    assert builder.edits
    return graph


@pytest.mark.parametrize(("engine", "how"), [("openvino", "exported"), ("onnxruntime", "edited")])
@pytest.mark.parametrize("form", attention_networks.FORMS)
def test_engines_compute_what_torch_simulates(form: str, engine: str, how: str, tmp_path: Path) -> None:
    model, inputs = planted(form)
    made = smoothed(int8(model, inputs), inputs)
    wanted, simulated = output(model, inputs), output(made, inputs)
    found = run(graph_of(made, model, inputs, engine, how).model, engine, inputs, tmp_path)
    loss = float((simulated - wanted).square().mean())
    apart = float((torch.from_numpy(found) - simulated).square().mean())
    assert apart < loss / 4
    before = float((output(unsmoothed(int8(model, inputs), inputs), inputs) - wanted).square().mean())
    assert float((torch.from_numpy(found) - wanted).square().mean()) < before / 4


@pytest.mark.parametrize("how", ["exported", "edited"])
def test_norms_that_int8_layers_alone_read_take_divisors_up(how: str) -> None:
    model, inputs = planted("fused")
    made = smoothed(int8(model, inputs), inputs)
    divided = {name.rpartition(".")[2] for name in divisors(made)}
    assert {"qkv", "fc1"} <= divided
    graph = graph_of(made, model, inputs, "openvino", how).model
    # What is left is of layers behind GELU, attention and the pooled token.
    assert products(graph) <= sum(1 for name in divisors(made) if not name.endswith(("qkv", "fc1")))


def test_a_product_serves_all_that_read_a_norm_and_the_shortcut_reads_it_whole() -> None:
    model, inputs = planted("separate")
    made = smoothed(int8(model, inputs), inputs)
    found = divisors(made)
    groups = {name.rpartition(".")[0] if name.endswith(("query", "key", "value")) else name for name in found}
    assert len(groups) < len(found)
    graph = exported(made, inputs, ranges_for("openvino", made, [inputs], QuantizationConfig()), "openvino")
    assert products(graph.model) <= len(groups)


class Chain(nn.Module):
    """A layer, a function and an int8 layer that alone reads what that gives."""

    def __init__(self, between: nn.Module, *, bias: bool = True, axes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.between, self.second = nn.Linear(8, 16, bias=bias), between, nn.Linear(16, 4)
        with torch.no_grad():
            self.first.weight[3] *= 60
            self.second.weight[:, 3] /= 60
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))

    def inputs(self) -> Tensor:
        return torch.randn((64, 8) if self.axes == 2 else (16, 6, 8))


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize(
    ("model", "taken"),
    [
        (Chain(nn.ReLU()), True),
        (Chain(nn.ReLU(), axes=2), True),
        (Chain(nn.ReLU(), bias=False), True),
        (Chain(nn.ReLU(), bias=False, axes=2), True),
        (Chain(nn.Identity()), True),
        (Chain(nn.LeakyReLU(0.2)), True),
        (Chain(RMSNorm()), True),
        (Chain(nn.LayerNorm(16)), True),
        (Chain(nn.GELU()), False),
        (Chain(nn.SiLU()), False),
        (Chain(nn.ReLU6()), False),
        (Chain(nn.LayerNorm(16, elementwise_affine=False)), True),
    ],
)
def test_divisors_are_taken_up_where_that_is_exact(model: Chain, taken: bool, tmp_path: Path) -> None:
    inputs, model = model.inputs(), model.eval()
    made = smoothed(int8(model, inputs, "second"), inputs)
    assert list(divisors(made)) == ["second"]
    # In float: what was divided is multiplied again, whichever way.
    graph = exported(made, inputs, Ranges(), "onnxruntime").model
    assert products(graph) == (0 if taken else 1)
    np.testing.assert_allclose(run(graph, "onnxruntime", inputs, tmp_path), output(model, inputs), rtol=1e-4, atol=1e-5)


def test_a_maker_in_int8_takes_divisors_up_as_well(tmp_path: Path) -> None:
    model = Chain(nn.ReLU())
    inputs = model.inputs()
    made = smoothed(int8(model, inputs, "first", "second"), inputs)
    graph = graph_of(made, model, inputs, "onnxruntime", "exported").model
    assert not products(graph)
    found = run(graph, "onnxruntime", inputs, tmp_path)
    np.testing.assert_allclose(found, output(made, inputs), atol=0.02 * float(output(model, inputs).abs().max()))


def test_a_maker_that_runs_twice_keeps_its_weight(tmp_path: Path) -> None:
    class Twice(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.first(x.flip(0))[..., :4]

    model = Twice(nn.ReLU()).eval()
    inputs = model.inputs()
    made = smoothed(int8(model, inputs, "first", "second"), inputs)
    assert "second" in divisors(made)
    graph = graph_of(made, model, inputs, "onnxruntime", "exported").model
    assert products(graph) == 1
    found = run(graph, "onnxruntime", inputs, tmp_path)
    np.testing.assert_allclose(found, output(made, inputs), atol=0.02 * float(output(model, inputs).abs().max()))


def test_a_layer_that_is_not_in_the_graph_is_named() -> None:
    model = Chain(nn.ReLU())
    graph = to_onnx(model.eval(), model.inputs())
    with pytest.raises(ExportError, match="'third' cannot be found"):
        divide_inputs(graph, {"third": np.ones(16, np.float32)})


def test_the_model_that_was_exported_still_divides() -> None:
    model, inputs = planted("separate")
    made = smoothed(int8(model, inputs), inputs)
    before = output(made, inputs)
    exported(made, inputs, Ranges(), "onnxruntime")
    assert torch.equal(output(made, inputs), before)
    with quantization_mode(made, "off"):
        assert torch.equal(output(made, inputs), output(model, inputs))
