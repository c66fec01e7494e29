"""Outlier channels moved into weights: nothing changes in float, and int8 loses less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.quantization import QuantLinear, calibrate, quantization_mode, quantized_layers
from autocompress.compress.smoothing import SmoothedQuantizer, divisors, undivided
from autocompress.config import QuantizationConfig
from autocompress.model.attention.plain import PlainAttention
from autocompress.policy import CompressionPolicy, LayerPolicy
from tests import attention_networks, networks

WIDTH = attention_networks.WIDTH


def planted(form: str, factor: float = 40.0) -> tuple[nn.Module, Tensor]:
    """Return a transformer of a form whose norms make two channels much larger than all others."""
    model, inputs = attention_networks.make(form)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight[[3, 17]] *= factor
    return model, inputs


def int8(model: nn.Module, inputs: Tensor, *names: str) -> nn.Module:
    """Return the model with these layers, all linear ones where none is named, in int8 that is not calibrated."""
    wanted = names or tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    policy = CompressionPolicy(layers=dict.fromkeys(wanted, LayerPolicy("int8")))
    return apply_policy(model, policy, CompressionContext(inputs, quantization=QuantizationConfig()))


def unsmoothed(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Set ranges as calibration does, and nothing else."""
    with quantization_mode(model, "observe"), torch.no_grad():
        model(inputs)
    for name, layer in quantized_layers(model):
        layer.input_quantizer.finish(name)
        layer.simulate = True
    return model


def smoothed(model: nn.Module, inputs: Tensor) -> nn.Module:
    calibrate(model, [inputs])
    return model


def output(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(inputs)
    return result


def error(model: nn.Module, inputs: Tensor, wanted: Tensor) -> float:
    return float((output(model, inputs) - wanted).square().mean() / wanted.var())


class Mlp(nn.Module):
    """One tensor, two int8 layers and their sum."""

    def __init__(self, outliers: dict[int, float] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 8), nn.Linear(16, 8)
        self.register_buffer("size", torch.ones(16))
        for channel, size in (outliers or {}).items():
            self.size[channel] = size

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.size
        return self.first(x) + self.second(x)


# -- the function -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", attention_networks.FORMS)
def test_in_float_the_network_is_the_same_to_the_bit(form: str) -> None:
    model, inputs = planted(form)
    made = smoothed(int8(model, inputs), inputs)
    assert divisors(made)
    with quantization_mode(made, "off"):
        assert torch.equal(output(made, inputs), output(model, inputs))


@pytest.mark.parametrize("form", attention_networks.FORMS)
def test_int8_loses_far_less_where_channels_are_outliers(form: str) -> None:
    model, inputs = planted(form)
    wanted = output(model, inputs)
    before = error(unsmoothed(int8(model, inputs), inputs), inputs, wanted)
    after = error(smoothed(int8(model, inputs), inputs), inputs, wanted)
    assert after < before / 4


def test_only_outliers_are_divided_and_the_rest_keeps_its_room() -> None:
    model, inputs = Mlp({2: 50.0, 9: 20.0}), torch.randn(512, 16)
    made = smoothed(int8(model, inputs), inputs)
    divisor = divisors(made)["first"]
    assert (divisor[[2, 9]] > 1).all()
    ordinary = [channel for channel in range(16) if channel not in (2, 9)]
    assert (divisor[ordinary] == 1).all()
    assert torch.equal(divisor.log2(), divisor.log2().round())
    # The range is the largest value behind the division.
    layer = made.get_submodule("first")
    assert isinstance(layer, QuantLinear)
    largest = (inputs * model.size).abs().amax(0) / divisor
    assert float(layer.input_quantizer.scale) == pytest.approx(float(largest.max()) / 127)


def test_layers_that_read_one_tensor_have_one_divisor_and_one_range() -> None:
    inputs = torch.randn(512, 16)
    made = smoothed(int8(Mlp({2: 50.0}), inputs), inputs)
    found = divisors(made)
    assert torch.equal(found["first"], found["second"])
    scales = {float(layer.input_quantizer.scale) for _, layer in quantized_layers(made)}
    assert len(scales) == 1


def test_alike_channels_are_left_alone() -> None:
    inputs = torch.randn(512, 16)
    made = smoothed(int8(Mlp(), inputs), inputs)
    assert not divisors(made)


def test_convolutions_are_left_alone() -> None:
    images = networks.images(8) * torch.tensor([1.0, 50.0, 1.0]).view(1, 3, 1, 1)
    made = smoothed(int8(networks.randomize(networks.Plain()), images, "conv1", "conv2", "fc"), images)
    quantizers = {name: layer.input_quantizer for name, layer in quantized_layers(made)}
    assert not any(isinstance(quantizers[name], SmoothedQuantizer) for name in ("conv1", "conv2"))


def test_a_weight_that_is_read_elsewhere_is_not_touched() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
            self.table.weight.data[:, 3] *= 50
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids.long()))

    torch.manual_seed(0)
    model, inputs = Tied(), torch.arange(20.0).view(4, 5)
    made = smoothed(int8(model, inputs, "head"), inputs)
    assert not divisors(made)
    with quantization_mode(made, "off"):
        assert torch.equal(output(made, inputs), output(model, inputs))


class Past(nn.Module):
    """A layer whose weight is also used past it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain, self.past = Mlp({2: 50.0}), Mlp({2: 50.0})

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) + self.past(x) + functional.linear(x, self.past.first.weight)


def test_what_would_change_the_network_is_undone_alone() -> None:
    model, inputs = Past(), torch.randn(512, 16)
    made = smoothed(int8(model, inputs), inputs)
    assert {"plain.first", "plain.second"} == set(divisors(made))
    with quantization_mode(made, "off"):
        assert torch.equal(output(made, inputs), output(model, inputs))


def test_an_attention_that_reads_weights_past_its_layer_stays_right() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attention = PlainAttention(nn.MultiheadAttention(16, 2, batch_first=True))
            self.norm = nn.LayerNorm(16)
            self.norm.weight.data[5] = 50.0

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            own = self.attention(x, x, x, need_weights=False)[0]
            return own + self.attention(x, x.flip(1), x.flip(1), need_weights=False)[0]

    model, inputs = Cross().eval(), torch.randn(8, 4, 16)
    made = smoothed(int8(model, inputs, "attention.in_proj", "attention.out_proj"), inputs)
    with quantization_mode(made, "off"):
        torch.testing.assert_close(output(made, inputs), output(model, inputs))


# -- again ------------------------------------------------------------------------------------------------------------


def same_state(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_data_give_the_same_model() -> None:
    model, inputs = planted("separate")
    assert same_state(smoothed(int8(model, inputs), inputs), smoothed(int8(model, inputs), inputs))


def test_a_second_calibration_keeps_the_divisors() -> None:
    model, inputs = planted("separate")
    made = smoothed(int8(model, inputs), inputs)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    smoothed(made, inputs)
    after = made.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if not name.endswith("scale"))


def test_a_stored_model_is_read_back_into_what_the_policy_makes(tmp_path: Path) -> None:
    model, inputs = planted("fused")
    made = smoothed(int8(model, inputs), inputs)
    save_file({name: tensor.contiguous() for name, tensor in made.state_dict().items()}, tmp_path / "weights")
    other = int8(model, inputs)
    other.load_state_dict(load_file(tmp_path / "weights"))
    assert torch.equal(output(other, inputs), output(made, inputs))
    assert divisors(other).keys() == divisors(made).keys()


def test_weights_that_were_stored_without_divisors_divide_by_nothing() -> None:
    model, inputs = planted("fused")
    old = unsmoothed(int8(model, inputs), inputs)
    made = smoothed(int8(model, inputs), inputs)
    made.load_state_dict(old.state_dict())
    assert not divisors(made)
    assert torch.equal(output(made, inputs), output(old, inputs))


def test_undivided_is_for_the_block_alone() -> None:
    inputs = torch.randn(64, 16)
    made = smoothed(int8(Mlp({2: 50.0}), inputs), inputs)
    before = output(made, inputs)
    with undivided(made):
        assert not torch.allclose(output(made, inputs), before)
    assert torch.equal(output(made, inputs), before)


@pytest.mark.parametrize("shape", [lambda x: x, lambda x: x.unsqueeze(0), lambda x: x.view(8, 8, 16)])
def test_any_number_of_axes_before_the_channels(shape: Callable[[Tensor], Tensor]) -> None:
    model, inputs = Mlp({2: 50.0}), shape(torch.randn(64, 16))
    made = smoothed(int8(model, inputs), inputs)
    assert divisors(made)
    with quantization_mode(made, "off"):
        assert torch.equal(output(made, inputs), output(model, inputs))
