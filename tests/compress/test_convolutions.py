"""Convolutions of sequences and volumes are int8, and fitted, as those of images are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress.compress.quantization import QuantConv1d, QuantConv3d, quantized_layers
from autocompress.config import RunConfig
from autocompress.evaluation.evaluator import CandidateEvaluator
from autocompress.measurement.client import EngineWorker
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.recovery.fit_samples import patches, places
from autocompress.runs.directory import RunDirectory
from autocompress.runs.time_ledger import TimeLedger
from autocompress.tasks import LabelFreeTask, UnlabelledTask

SIZES: dict[int, tuple[int, ...]] = {1: (4, 40), 3: (4, 8, 10, 9)}


def network(axes: int) -> nn.Module:
    """A plain, a dilated, a strided, a depthwise and a pointwise convolution, two of them under a batch-norm."""
    torch.manual_seed(0)
    conv, norm, pool = (
        (nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d)
        if axes == 1
        else (nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d)
    )
    return nn.Sequential(
        conv(4, 32, 3, padding=1, bias=False), norm(32), nn.ReLU(), conv(32, 32, 3, padding=2, dilation=2), nn.ReLU(),
        conv(32, 32, 3, 2, 1, groups=32), norm(32), nn.ReLU(), conv(32, 48, 1), nn.ReLU(), pool(1), nn.Flatten(),
        nn.Linear(48, 5),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("axes", [1, 3])
def test_they_are_int8_and_pruned_in_the_engine(axes: int, engine: str, tmp_path: Path) -> None:
    pytest.importorskip(engine)
    inputs = torch.randn(64, *SIZES[axes], generator=torch.Generator().manual_seed(1))
    task = LabelFreeTask(UnlabelledTask(network(axes), inputs, inputs[:8], name="tiny"))
    config = RunConfig(engine=engine, task={"name": "tiny"}, table="none")  # type: ignore[arg-type]
    with EngineWorker() as worker:
        evaluator = CandidateEvaluator(task, config, RunDirectory.create(tmp_path / "run", resume=False), worker)
        layers = {name: LayerPolicy("int8") for name, layer in evaluator.inventory.layers.items() if layer.quantizable}
        assert len(layers) == 5
        policy = CompressionPolicy(pruning=dict.fromkeys(evaluator.inventory.groups, 0.5), layers=layers)
        model = evaluator.compress(policy, TimeLedger())
        assert sum(isinstance(layer, (QuantConv1d, QuantConv3d)) for _, layer in quantized_layers(model)) == 4
        # The engine's outputs are compared with those of torch in int8.
        evaluator.build(model, policy, tmp_path / "policy", TimeLedger())
        stored = {tensor.name for tensor in onnx.load(tmp_path / "policy/model.onnx").graph.initializer}
        dense = tmp_path / "policy/placement.json"
        left = json.loads(dense.read_text()) if dense.exists() else {}
        assert {name for name in layers if f"{name}.weight_int8" in stored} == layers.keys() - left.keys()
        assert len(left) <= 1
        evaluator.close()


def test_int8_moves_their_outputs_by_little(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    inputs = torch.randn(64, *SIZES[1], generator=torch.Generator().manual_seed(1))
    task = LabelFreeTask(UnlabelledTask(network(1), inputs, inputs[:8], name="tiny"))
    config = RunConfig(task={"name": "tiny"}, table="none")  # type: ignore[arg-type]
    with EngineWorker() as worker:
        evaluator = CandidateEvaluator(task, config, RunDirectory.create(tmp_path / "run", resume=False), worker)
        layers = {name: LayerPolicy("int8") for name in evaluator.inventory.layers}
        model = evaluator.compress(CompressionPolicy(layers=layers), TimeLedger())
        with torch.no_grad():
            expected, found = evaluator.base(inputs), model(inputs)
        assert 0 < float((found - expected).norm() / expected.norm()) < 0.05
        evaluator.close()


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_patches_are_what_the_weights_are_multiplied_with(axes: int) -> None:
    made = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    layer = made(3, 5, 3, stride=2, padding=2, dilation=2)
    given = torch.randn(4, 3, *(9, 11, 8)[:axes])
    output: Tensor = layer(given)
    at, rows = places(layer, output, torch.Generator().manual_seed(0))
    read = patches(layer, given, at)
    assert read is not None and len(rows) == output.numel() // 5 and read.shape[1] == 3 * math.prod(layer.kernel_size)
    torch.testing.assert_close(functional.linear(read, layer.weight.flatten(1), layer.bias), rows)
    assert patches(layer, given, at[:-1]) is None
