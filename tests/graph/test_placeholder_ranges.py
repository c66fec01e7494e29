"""Signs that are assumed where nothing is calibrated are those that calibration finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from autocompress.compress import CompressionContext, apply_policy, rewrite
from autocompress.compress.quantization import activation_ranges, calibrate
from autocompress.graph.builder import GraphBuilder
from autocompress.graph.export import save_onnx
from autocompress.graph.placeholder_ranges import AssumedRanges
from autocompress.model.inventory import take_inventory
from autocompress.policy import CompressionPolicy, LayerPolicy
from tests import networks


def all_int8(model: nn.Module, **factorized: float) -> CompressionPolicy:
    inventory = take_inventory(model, networks.images(2))
    layers = {name: LayerPolicy("int8", factorized.get(name, 1.0)) for name in inventory.layers}
    return CompressionPolicy("fp32", layers=layers)


def assumed_and_calibrated(model: nn.Module, policy: CompressionPolicy) -> tuple[dict[str, bool], dict[str, bool]]:
    inventory = take_inventory(model, networks.images(2))
    compressed = apply_policy(model, policy, CompressionContext(networks.images(2), {}))
    calibrate(compressed, [networks.images(8)])
    found = {name: one.signed for name, one in activation_ranges(compressed).items()}
    ranges = AssumedRanges(model, networks.images(2), inventory.layers)(compressed)
    return {name: one.signed for name, one in ranges.inputs.items()}, found


@pytest.mark.parametrize("kind", [networks.Plain, networks.Residual, networks.Mobile, networks.Concat, networks.Tokens])
def test_signs_are_those_of_calibration(kind: type[nn.Module]) -> None:
    model = rewrite(networks.randomize(kind()))
    assumed, calibrated = assumed_and_calibrated(model, all_int8(model))
    assert assumed == calibrated and len(assumed) > 1


def test_only_the_first_factor_reads_what_the_layer_read() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    assumed, calibrated = assumed_and_calibrated(model, all_int8(model, **{"2": 0.5}))
    assert assumed == calibrated == {"0": True, "2.0": False, "2.1": True, "2.2": True, "4": False}
    # The model is left as it was: no hook stays.
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_is_profiled_is_fused_as_what_is_deployed(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    inputs = networks.images(1)
    inventory = take_inventory(model, networks.images(2))
    graphs = GraphBuilder(model, inputs, inventory, "onnxruntime")
    policy = all_int8(model)
    compressed = apply_policy(model, policy, CompressionContext(networks.images(2), weights=False))
    ranges = AssumedRanges(model, networks.images(2), inventory.layers)(compressed)
    path = tmp_path / "network.onnx"
    save_onnx(graphs.build(compressed, ranges, ()).model, path)
    zeros = [numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer if one.name.endswith("8_zero")]
    # What the network is given has values of both signs, around 128; what is behind the ReLUs has not.
    assert {str(zero.dtype) for zero in zeros} == {"uint8"} and sorted(int(zero) for zero in zeros) == [0, 0, 128]
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session.run(None, {session.get_inputs()[0].name: inputs.numpy().astype(np.float32)})
    # With signed codes behind them, both ReLUs keep their convolutions in fp32.
    ops = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert ops.count("QLinearConv") == 2 and "FusedConv" not in ops and "Relu" not in ops


def test_a_layer_that_is_called_by_keyword_gets_signed_codes() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(input=self.first(x).relu())

    model = ByKeyword().eval()
    policy = CompressionPolicy("fp32", layers={name: LayerPolicy("int8") for name in ("first", "second")})
    compressed = apply_policy(model, policy, CompressionContext(torch.rand(2, 4), {}))
    ranges = AssumedRanges(model, torch.rand(2, 4), {"first", "second"})(compressed)
    assert {name: one.signed for name, one in ranges.inputs.items()} == {"first": False, "second": True}
