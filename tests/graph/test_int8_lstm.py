"""Int8 LSTMs in a graph: ONNX Runtime computes what the torch model does, and other engines say that they have none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.quantization import quantization_mode
from autocompress.graph.builder import Ranges, exported
from autocompress.graph.export import save_onnx
from autocompress.model.inventory import take_inventory
from autocompress.policy import CompressionPolicy, LayerPolicy

onnxruntime = pytest.importorskip("onnxruntime")

STEPS, WIDTH = 12, 24


class Tagger(nn.Module):
    """An LSTM that is called twice where wanted, each time from states of its own."""

    def __init__(self, *, twice: bool = False, **kwargs: object) -> None:
        super().__init__()
        self.twice = twice
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True, **kwargs)  # type: ignore[arg-type]
        self.fc = nn.Linear(WIDTH * (2 if self.rnn.bidirectional else 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        y, states = self.rnn(x)
        if self.twice:
            y, _ = self.rnn(y, states)
        return self.fc(y)


def int8(model: nn.Module, x: Tensor, engine: str) -> tuple[nn.Module, object]:
    policy = CompressionPolicy(layers={"rnn": LayerPolicy("int8")})
    made = apply_policy(model.eval(), policy, CompressionContext(x)).eval()
    return made, exported(made, x, Ranges(), engine)


@pytest.mark.parametrize(
    ("kwargs", "twice"),
    [
        ({}, False),
        ({}, True),
        ({"num_layers": 2}, True),
        ({"bidirectional": True}, False),
        ({"num_layers": 2, "bidirectional": True, "bias": False}, False),
    ],
)
def test_the_engine_computes_the_int8_lstm(kwargs: dict[str, object], twice: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, STEPS, WIDTH)
    made, graph = int8(Tagger(twice=twice, **kwargs), x, "onnxruntime")
    operators = [node.op_type for node in graph.model.graph]  # type: ignore[attr-defined]
    layers = int(kwargs.get("num_layers", 1))  # type: ignore[call-overload]
    assert operators.count("DynamicQuantizeLSTM") == layers * (1 + twice) and "LSTM" not in operators
    assert graph.dense == {}  # type: ignore[attr-defined]
    # The dense layer's weights are gone.
    stored = graph.model.graph.initializers.values()  # type: ignore[attr-defined]
    assert not any(value.name and value.name.startswith("rnn.weight") for value in stored)
    save_onnx(graph.model, tmp_path / "model.onnx")  # type: ignore[attr-defined]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {"input": x.numpy()})[0]
    with torch.no_grad():
        expected = made(x).numpy()
        with quantization_mode(made, "off"):
            dense = made(x).numpy()
    assert not np.allclose(expected, dense, atol=1e-5)
    # What is read, and the states, are rounded to 1/255 of their range at every step, which torch does not show.
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("engine", ["openvino", "tensorrt", "tensorrt-rtx"])
def test_an_engine_without_the_operator_keeps_the_lstm_and_says_why(engine: str) -> None:
    x = torch.randn(1, STEPS, WIDTH)
    _, graph = int8(Tagger(), x, engine)
    assert graph.dense == {"rnn": "this engine has no int8 kernel for an LSTM"}  # type: ignore[attr-defined]
    assert "LSTM" in [node.op_type for node in graph.model.graph]  # type: ignore[attr-defined]


def test_an_lstm_that_the_graph_does_not_have_is_named_and_takes_nothing_with_it() -> None:
    class Unused(Tagger):
        def forward(self, x: Tensor) -> Tensor:
            self.rnn(x)
            return self.fc(x)

    _, graph = int8(Unused(), torch.randn(1, STEPS, WIDTH), "onnxruntime")
    assert "its result is not used" in graph.dense["rnn"]  # type: ignore[attr-defined]


class Names(nn.Module):
    """Modules that are called as the exporter calls its operations, one of them inside another module."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.lstm = nn.LSTM(WIDTH, 16), nn.LSTM(16, 16, 2)
        self.inner = nn.ModuleDict({"lstm": nn.LSTM(16, 16)})
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        first, states = self.encoder(x.transpose(0, 1))
        return self.fc(self.inner["lstm"](self.lstm(first)[0], hx=states)[0][-1])


@pytest.mark.parametrize("name", ["encoder", "lstm", "inner.lstm"])
def test_a_module_named_as_the_operation_is_told_from_the_others(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(1, STEPS, WIDTH), Names().eval()
    made = apply_policy(model, CompressionPolicy(layers={name: LayerPolicy("int8")}), CompressionContext(x)).eval()
    graph = exported(made, x, Ranges(), "onnxruntime")
    operators = [node.op_type for node in graph.model.graph]
    layers = 2 if name == "lstm" else 1
    assert (operators.count("DynamicQuantizeLSTM"), operators.count("LSTM")) == (layers, 4 - layers)
    save_onnx(graph.model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {"input": x.numpy()})[0]
    with torch.no_grad():
        expected = made(x).numpy()
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_it_is_a_layer_where_the_engine_has_it() -> None:
    x = torch.randn(2, STEPS, WIDTH)
    model = Tagger(num_layers=2).eval()
    left, found = take_inventory(model, x), take_inventory(model, x, int8_lstm=True)
    assert "rnn" not in left.layers and "--engine onnxruntime" in left.skipped["rnn"]
    rnn = found.layers["rnn"]
    assert list(found.layers) == ["rnn", "fc"] and rnn.kind == "lstm" and rnn.quantizable and not rnn.factorizable
    # Two layers, each with four gates that read an input and the states, at every step.
    assert rnn.macs == STEPS * 2 * 4 * WIDTH * (WIDTH + WIDTH) and "rnn" not in found.skipped
    assert "not pruned" in found.skipped["rnn (channels)"]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_one_with_projections_is_left_alone() -> None:
    class Projected(Tagger):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.fc = nn.LSTM(WIDTH, WIDTH, batch_first=True, proj_size=8), nn.Linear(8, 5)

    found = take_inventory(Projected().eval(), torch.randn(2, STEPS, WIDTH), int8_lstm=True)
    assert "projections" in found.skipped["rnn"] and list(found.layers) == ["fc"]
