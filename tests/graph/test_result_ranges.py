"""Ranges of int8 convolutions' results: of the tensor that the graph has, worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.quantization import calibrate
from autocompress.config import QuantizationConfig
from autocompress.graph.result_ranges import result_ranges
from autocompress.policy import CompressionPolicy, LayerPolicy

MINMAX = QuantizationConfig(calibration="minmax")


class Normed(nn.Module):
    """A convolution that multiplies by 2 and a batch-norm that multiplies by 10 and adds 3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4, eps=0)
        with torch.no_grad():
            self.conv.weight.fill_(2)
            self.bn.weight.fill_(10)
            self.bn.bias.fill_(3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


def quantized(model: nn.Module, x: Tensor, **layers: LayerPolicy) -> nn.Module:
    made = apply_policy(model, CompressionPolicy("fp32", layers=layers), CompressionContext(x))
    calibrate(made, [x])
    return made


def test_the_norm_that_is_folded_into_a_layer_is_part_of_its_result() -> None:
    x = torch.tensor([-1.0, 0.5]).reshape(2, 1, 1, 1)
    model = quantized(Normed(), x, conv=LayerPolicy("int8"))
    found = result_ranges(model, x, {"conv": "bn"}, MINMAX)["conv"]
    # 2 * 10 * -1 + 3 = -17 and 2 * 10 * 0.5 + 3 = 13.
    assert found.whole.signed and found.whole.scale == pytest.approx(17 / 127, rel=0.02)
    assert not found.rectified.signed and found.rectified.scale == pytest.approx(13 / 255, rel=0.02)
    alone = result_ranges(model, x, {}, MINMAX)["conv"]
    assert alone.whole.scale == pytest.approx(2 / 127, rel=0.02)
    # Nothing stays behind in the model.
    assert not any(module._forward_hooks for module in model.modules())


def test_of_a_factorized_layer_the_last_factor_takes_the_norm_up() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8, 4, 4)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    model[1].weight.data.fill_(100.0)
    made = quantized(model, x, **{"0": LayerPolicy("int8", 0.5)})
    found = result_ranges(made, x, {"0": "1"}, MINMAX)
    assert sorted(found) == ["0.0", "0.1", "0.2"]
    with torch.no_grad():
        inner = made[0][:2](x)
        outer = made(x)
    assert found["0.1"].whole.scale * 127 == pytest.approx(float(inner.abs().max()), rel=0.02)
    assert found["0.2"].rectified.scale * 255 == pytest.approx(float(outer.max()), rel=0.02)


def test_layers_that_give_zeros_have_no_range_and_those_that_give_nothing_positive_one_for_both() -> None:
    x = torch.rand(4, 1, 2, 2) + 0.5
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False)).eval()
    model[0].weight.data.fill_(-1.0)
    made = quantized(model, x, **{"0": LayerPolicy("int8"), "1": LayerPolicy("int8")})
    with torch.no_grad():
        made[1].weight.zero_()
    found = result_ranges(made, x, {}, MINMAX)
    assert sorted(found) == ["0"] and found["0"].whole.signed
    assert found["0"].rectified.scale == found["0"].whole.scale and not found["0"].rectified.signed


def test_linear_layers_and_float_models_have_none() -> None:
    x = torch.rand(4, 3)
    model = nn.Sequential(nn.Linear(3, 3)).eval()
    assert result_ranges(model, x, {}, MINMAX) == {}
    assert result_ranges(quantized(model, x, **{"0": LayerPolicy("int8")}), x, {}, MINMAX) == {}
