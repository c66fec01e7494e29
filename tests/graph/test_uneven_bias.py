"""Two int8 matrix products in a row, the first without a bias or with one number for all channels, on OpenVINO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.quantization import activation_ranges, calibrate
from autocompress.engines import get_engine
from autocompress.engines.base import EngineOptions
from autocompress.graph.builder import Ranges, exported
from autocompress.graph.export import save_onnx
from autocompress.policy import CompressionPolicy, LayerPolicy
from tests import networks

pytest.importorskip("openvino")


class Products(nn.Module):
    def __init__(self, bias: float | None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 48, bias=bias is not None), nn.Linear(48, 10)
        if bias is not None:
            nn.init.constant_(self.first.bias, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(torch.relu(self.first(x)))
        return found


@pytest.mark.parametrize("bias", [None, 0.0, 0.25])
def test_they_compute_what_torch_does(bias: float | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, inputs = Products(bias).eval(), torch.randn(64, 64)
    with torch.no_grad():
        inputs[:, -1], base.first.weight[-1] = 0, 0
    networks.halve_codes(base.first.weight[:-1], 63)
    networks.halve_codes(base.second.weight, 47)
    policy = CompressionPolicy(layers={"first": LayerPolicy("int8"), "second": LayerPolicy("int8")})
    model = apply_policy(base, policy, CompressionContext(inputs))
    calibrate(model, [inputs])
    graph = exported(model, inputs[:1], Ranges(activation_ranges(model)), "openvino").model
    save_onnx(graph, tmp_path / "model.onnx")
    engine = get_engine("openvino")
    file = engine.build(tmp_path / "model.onnx", EngineOptions("fp32", 1, 1), tmp_path / "engine")
    with torch.no_grad():
        expected = model(inputs).numpy()
    with engine.open(file) as runner:
        found = np.concatenate([runner.infer(one[None]) for one in inputs.numpy()])
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_a_bias_that_differs_by_channel_stays(tmp_path: Path) -> None:
    base, inputs = Products(0.0).eval(), torch.randn(64, 64)
    nn.init.normal_(base.first.bias)
    policy = CompressionPolicy(layers={"first": LayerPolicy("int8")})
    model = apply_policy(base, policy, CompressionContext(inputs))
    calibrate(model, [inputs])
    for engine in ("openvino", "onnxruntime"):
        graph = exported(model, inputs[:1], Ranges(activation_ranges(model)), engine).model
        assert not any("uneven" in name for name in graph.graph.initializers)
