"""Simulated int8, number by number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autocompress.compress import CompressionContext, Transform
from autocompress.compress.calibration import calibration
from autocompress.compress.lowrank import LowRank
from autocompress.compress.quantization import (
    ActivationQuantizer,
    QuantConv2d,
    Quantization,
    QuantizationRange,
    QuantLinear,
    activation_ranges,
    calibrate,
    quantization_mode,
    quantized_layers,
)
from autocompress.compress.rounding import fake_quantize_weight
from autocompress.config import QuantizationConfig
from autocompress.errors import CompressionError
from autocompress.policy import CompressionPolicy, LayerPolicy
from tests import networks
from tests.compress.contract import TransformContract

INT8 = LayerPolicy("int8")
EVERY = CompressionPolicy(layers=dict.fromkeys(("conv1", "conv2", "fc"), INT8))


class TestQuantization(TransformContract):
    @pytest.fixture
    def transform(self) -> Transform:
        return Quantization()

    @pytest.fixture
    def policy(self) -> CompressionPolicy:
        return CompressionPolicy(layers=dict.fromkeys(("stem", "same.conv2", "fc"), INT8))

    @pytest.fixture
    def unknown(self) -> CompressionPolicy:
        return CompressionPolicy(layers={"nowhere": INT8})

    def test_names_of_parameters_stay_and_two_buffers_come(
        self, transform: Transform, policy: CompressionPolicy, model: nn.Module, context: CompressionContext
    ) -> None:
        result = transform.apply(model, policy, context)
        assert [n for n, _ in result.named_parameters()] == [n for n, _ in model.named_parameters()]
        assert set(result.state_dict()) - set(model.state_dict()) == {
            f"{layer}.input_quantizer.{name}" for layer in policy.int8_layers for name in ("scale", "signed")
        }
        assert [name for name, _ in quantized_layers(result)] == ["stem", "same.conv2", "fc"]

    def test_every_factor_of_a_factorized_layer(
        self, transform: Transform, model: nn.Module, context: CompressionContext
    ) -> None:
        policy = CompressionPolicy(layers={"wider.conv2": LayerPolicy("int8", 0.5)})
        result = transform.apply(LowRank().apply(model, policy, context), policy, context)
        assert [name for name, _ in quantized_layers(result)] == [f"wider.conv2.{i}" for i in range(3)]


def quantized(*batches: Tensor) -> nn.Module:
    model = Quantization().apply(networks.randomize(networks.Plain()), EVERY, CompressionContext(networks.images()))
    calibrate(model, batches or (networks.images(64),))
    return model


def observed(*batches: Tensor) -> QuantizationRange:
    quantizer = ActivationQuantizer(calibration(QuantizationConfig()))
    quantizer.mode = "observe"
    for batch in batches:
        assert torch.equal(quantizer(batch), batch)
    quantizer.finish("layer")
    assert quantizer.mode == "quantize"
    return quantizer.range()


# -- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_rounded_per_output_channel_by_hand() -> None:
    weight = torch.tensor([[1.27, 0.006, -0.004, -1.27], [12.7, 0.06, -0.04, 0.5], [0.0, 0.0, 0.0, 0.0]])
    wanted = torch.tensor([[1.27, 0.01, 0.0, -1.27], [12.7, 0.1, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(fake_quantize_weight(weight), wanted)


def test_a_rounded_weight_passes_its_gradient_through() -> None:
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    rounded = fake_quantize_weight(weight)
    assert len(rounded[0].unique()) <= 255
    rounded.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones_like(weight))


# -- activations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "signed", "levels"), [(0.0, False, 255), (-0.01, True, 127)])
def test_unsigned_where_nothing_is_negative(low: float, signed: bool, levels: int) -> None:
    found = observed(torch.linspace(low, 4, 10001))
    assert found.signed is signed
    # Evenly spread values leave nothing to gain from clipping.
    assert found.scale == pytest.approx(4 / levels, rel=0.02)


def test_activations_by_hand() -> None:
    quantizer = ActivationQuantizer(calibration(QuantizationConfig()))
    quantizer.scale.fill_(0.5)
    x = torch.tensor([0.2, 0.3, -1.3, 63.5, 99.0, -99.0])
    torch.testing.assert_close(quantizer(x), torch.tensor([0.0, 0.5, -1.5, 63.5, 63.5, -64.0]))
    quantizer.signed.fill_(False)
    torch.testing.assert_close(quantizer(x), torch.tensor([0.0, 0.5, 0.0, 63.5, 99.0, 0.0]))
    quantizer.mode = "off"
    assert torch.equal(quantizer(x), x)


def test_clipping_an_outlier_beats_the_whole_range() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    x[0] = 8.0
    top = float(x.abs().max())

    def error(scale: float) -> float:
        return float(((x / scale).round().clamp(-128, 127) * scale - x).square().mean())

    scale = observed(x).scale
    assert scale < 0.8 * top / 127
    assert error(scale) < 0.7 * error(top / 127)
    # Nothing else on the grid that it searches is better by more than a histogram bin's worth.
    assert error(scale) <= 1.02 * min(error(clip * top / 127) for clip in torch.linspace(0.3, 1, 57).tolist())


def test_batches_in_any_order_and_size_give_the_same_range() -> None:
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    whole = observed(x)
    for parts in (x.sort().values.split(7000), x.split(3000)):
        found = observed(*parts)
        assert found.signed == whole.signed
        assert found.scale == pytest.approx(whole.scale, rel=0.05)


def test_calibrating_again_forgets_what_was_seen() -> None:
    model = quantized(1000 * networks.images(64))
    before = activation_ranges(model)["conv1"].scale
    calibrate(model, [networks.images(64)])
    assert activation_ranges(model)["conv1"].scale == pytest.approx(before / 1000, rel=1e-3)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([torch.zeros(4, 3, 8, 8)], "zeros"),
        ([], "zeros"),
        ([torch.full((4, 3, 8, 8), torch.nan)], "NaN"),
        ([networks.images(4), torch.full((4, 3, 8, 8), torch.nan)], "NaN"),
        ([torch.full((4, 3, 8, 8), torch.inf), networks.images(4)], "NaN or an infinite"),
        ([torch.full((4, 3, 8, 8), torch.nan), networks.images(4)], "NaN"),
    ],
)
def test_data_that_cannot_set_a_range(batches: list[Tensor], words: str) -> None:
    model = Quantization().apply(networks.Plain(), EVERY, CompressionContext(networks.images()))
    with pytest.raises(CompressionError, match=rf"{words}.*'conv1'"):
        calibrate(model, batches)


def test_a_failed_calibration_leaves_nothing_behind() -> None:
    model = Quantization().apply(networks.randomize(networks.Plain()), EVERY, CompressionContext(networks.images()))
    with pytest.raises(CompressionError):
        calibrate(model, [torch.full((4, 3, 8, 8), torch.inf)])
    calibrate(model, [networks.images(64)])
    assert activation_ranges(model) == activation_ranges(quantized())


# -- layers -----------------------------------------------------------------------------------------------------------


def test_a_layer_computes_what_integers_give() -> None:
    layer = nn.Linear(6, 4)
    model = Quantization().apply(
        nn.Sequential(layer), CompressionPolicy(layers={"0": INT8}), CompressionContext(torch.zeros(1, 6))
    )
    x = torch.randn(50, 6)
    calibrate(model, [x])
    scale = activation_ranges(model)["0"].scale
    steps = layer.weight.detach().abs().amax(1) / 127
    codes = (layer.weight.detach() / steps[:, None]).round()
    inputs = (x / scale).round().clamp(-128, 127)
    with torch.no_grad():
        torch.testing.assert_close(model(x), inputs @ codes.T * scale * steps + layer.bias)


def test_int8_is_close_to_float_and_a_mode_restores_what_was() -> None:
    model, x = quantized(), networks.images(8, seed=3)
    original = networks.randomize(networks.Plain())
    layers = [layer for _, layer in quantized_layers(model)]
    assert [type(layer) for layer in layers] == [QuantConv2d, QuantConv2d, QuantLinear]
    layers[0].simulate, layers[0].input_quantizer.mode = False, "off"
    with torch.no_grad():
        mixed = model(x)
        with quantization_mode(model, "off"):
            assert torch.equal(model(x), original(x))
        assert torch.equal(model(x), mixed)
        with quantization_mode(model, "quantize"):
            error = (model(x) - original(x)).norm() / original(x).norm()
        assert 0 < float(error) < 0.05
    with pytest.raises(KeyError), quantization_mode(model, "observe"):
        raise KeyError
    assert [layer.input_quantizer.mode for layer in layers] == ["off", "quantize", "quantize"]
    assert [layer.simulate for layer in layers] == [False, True, True]


def test_ranges_travel_with_the_weights() -> None:
    model, x = quantized(), networks.images(8)
    again = Quantization().apply(networks.Plain().eval(), EVERY, CompressionContext(x))
    again.load_state_dict(model.state_dict())
    assert activation_ranges(again) == activation_ranges(model)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_calibrating_a_model_without_int8_reads_no_data() -> None:
    def batches() -> Tensor:
        raise AssertionError

    calibrate(networks.Plain(), (batches() for _ in range(1)))


def test_of_a_factorized_linear_layer_the_first_factor_is_int8() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 8, bias=False), nn.Linear(8, 4)), nn.Linear(4, 4))
    policy = CompressionPolicy(layers={"0": LayerPolicy("int8", 0.5), "1": LayerPolicy("int8")})
    found = Quantization().apply(model, policy, CompressionContext(torch.zeros(1, 16)))
    assert [name for name, _ in quantized_layers(found)] == ["0.0", "1"]


def test_the_histogram_sees_every_column_of_a_map() -> None:
    # Large in all columns but the first, and so many values that only some are looked at: one in 64, two rows apart.
    values = torch.rand(512, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    values[..., 0] *= 1e-3
    quantizer = ActivationQuantizer(calibration(QuantizationConfig(calibration="percentile", percentile=50.0)))
    quantizer.mode = "observe"
    quantizer(values)
    quantizer.finish("layer")
    middle = float(values.flatten()[:: values.numel() // 2**20 + 1].median())
    assert float(quantizer.scale) * 255 == pytest.approx(middle, rel=0.02)
