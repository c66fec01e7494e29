"""Real networks under mixed policies, exported, parsed and built ahead of time for every RTX generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from autocompress.compress import CompressionContext, apply_policy, rewrite
from autocompress.compress.quantization import QuantizationRange, activation_ranges, calibrate, quantization_mode
from autocompress.compress.sparsity import LEAST_CHANNELS
from autocompress.engines.base import EngineOptions
from autocompress.engines.tensorrt.engine import TensorRTRTXEngine
from autocompress.errors import UnsupportedDtypeError
from autocompress.graph.export import save_onnx, to_onnx
from autocompress.graph.qdq import insert_qdq
from autocompress.model.inventory import take_inventory
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.tasks.cifar_models import ResNet
from tests import networks

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX (tensorrt-rtx-cu13) is not installed")
torchvision = pytest.importorskip("torchvision")

TARGETS = ("8.0", "8.6", "8.9", "12.0")


class UNet(nn.Module):
    """Two levels with skips: transposed convolutions, concatenations, a segmentation map out."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.mid = _double(3, 16), _double(16, 32), _double(32, 64)
        self.pool = nn.MaxPool2d(2)
        self.up2, self.dec2 = nn.ConvTranspose2d(64, 32, 2, 2), _double(64, 32)
        self.up1, self.dec1 = nn.ConvTranspose2d(32, 16, 2, 2), _double(32, 16)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.enc1(x)
        b = self.enc2(self.pool(a))
        y = self.up2(self.mid(self.pool(b)))
        y = self.up1(self.dec2(torch.cat([y, b], 1)))
        return self.head(self.dec1(torch.cat([y, a], 1)))


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def vit() -> nn.Module:
    made: nn.Module = torchvision.models.VisionTransformer(32, 8, 3, 4, 64, 128, num_classes=10)
    return made


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (lambda: ResNet(3), 32),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 64),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10), 64),
    "vit": (vit, 32),
    "unet": (UNet, 32),
}


def mixed_policy(model: nn.Module, x: Tensor, *, int8: bool, sparse: bool = False) -> CompressionPolicy:
    """Prune every third group, halve every fifth layer's rank, int8 for three of four layers, 2:4 for every second."""
    found = take_inventory(model, x)
    pruning = {name: 0.25 for i, name in enumerate(found.groups) if i % 3 == 1}
    layers = {}
    for i, (name, layer) in enumerate(found.layers.items()):
        dtype = "int8" if int8 and layer.quantizable and i % 4 != 3 else "dense"
        rank = 0.5 if layer.factorizable and i % 5 == 4 else 1.0
        zeros = "2:4" if sparse and layer.factorizable and i % 2 else "none"
        layers[name] = LayerPolicy(dtype, rank, zeros)
    return CompressionPolicy("fp16", pruning=pruning, layers=layers)


def compressed(name: str, folder: Path, *, int8: bool, sparse: bool = False) -> tuple[Path, dict[str, str]]:
    """Write a network's ONNX under a mixed policy; return it with the layers that TensorRT's rules leave dense."""
    torch.manual_seed(0)
    build, size = NETWORKS[name]
    model = rewrite(networks.randomize(build()))
    x = networks.images(2, size)
    policy = mixed_policy(model, x, int8=int8, sparse=sparse)
    made = apply_policy(model, policy, CompressionContext(x))
    calibrate(made, [networks.images(4, size, seed=1)])
    with quantization_mode(made, "off"):
        graph = to_onnx(made, x[:1])
    layers = {n: QuantizationRange(r.scale, r.signed) for n, r in activation_ranges(made).items()}
    dense = insert_qdq(graph, layers, "tensorrt-rtx").dense
    assert len(layers) > len(dense) or not int8
    path = folder / f"{name}.onnx"
    save_onnx(graph, path)
    return path, dense


def build(path: Path, dtype: str, target: str, **settings: bool) -> list[str]:
    options = EngineOptions(dtype, settings=(("compute_capability", target), *settings.items()))
    file = TensorRTRTXEngine().build(path, options, path.with_suffix(""))
    assert file.size_bytes > 100_000
    found: list[str] = json.loads(path.with_suffix(".rtx.json").read_text())["dtypes"]
    return found


@pytest.mark.parametrize("name", ["resnet20", "unet"])
def test_mixed_policies_build(name: str, tmp_path: Path) -> None:
    path, _ = compressed(name, tmp_path, int8=True)
    for target in TARGETS:
        assert build(path, "fp16", target) == ["fp32", "fp16", "int8"]
    with pytest.raises(UnsupportedDtypeError, match=r"int8.*7\.5"):
        build(path, "fp16", "7.5")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vit"])
def test_larger_networks_build(name: str, tmp_path: Path) -> None:
    path, dense = compressed(name, tmp_path, int8=True)
    for target in TARGETS:
        assert build(path, "fp16", target) == ["fp32", "fp16", "int8"]
    assert build(path, "bf16", "8.9") == ["fp32", "bf16", "int8"]
    with pytest.raises(UnsupportedDtypeError, match=r"int8.*7\.5"):
        build(path, "fp16", "7.5")
    if name == "mobilenet_v2":
        assert any("per group" in reason for reason in dense.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_turing_builds_every_network_in_fp16(name: str, tmp_path: Path) -> None:
    path, _ = compressed(name, tmp_path, int8=False)
    assert build(path, "fp16", "7.5") == ["fp32", "fp16"]


def is_2_4(weight: np.ndarray) -> bool:
    rows = np.moveaxis(weight, 1, -1)
    return bool(((rows.reshape(*rows.shape[:-1], -1, 4) != 0).sum(-1) <= 2).all())


def test_2_4_sparse_networks_build_where_there_are_sparse_tensor_cores(tmp_path: Path) -> None:
    path, _ = compressed("resnet20", tmp_path, int8=True, sparse=True)
    weights = [numpy_helper.to_array(w) for w in onnx.load(path).graph.initializer if w.name.endswith("weight_int8")]
    wide = [w for w in weights if w.ndim == 4 and w.shape[1] >= LEAST_CHANNELS and w.shape[1] % 4 == 0]
    # The zeros are in the int8 codes too: half of the layers have them.
    assert len(wide) > 4 and len(wide) > sum(map(is_2_4, wide)) >= len(wide) // 3
    for target in TARGETS:
        assert build(path, "fp16", target, sparse_weights=True) == ["fp32", "fp16", "int8"]
    dense, _ = compressed("resnet20", tmp_path / "dense", int8=False, sparse=True)
    with pytest.raises(UnsupportedDtypeError, match=r"2:4 sparse weights need compute capability 8\.0"):
        build(dense, "fp16", "7.5", sparse_weights=True)
