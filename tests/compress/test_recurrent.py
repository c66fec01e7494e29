"""LSTMs in simulated int8: what is rounded, what is left as it was, and what training moves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.quantization import calibrate, quantization_mode
from autocompress.compress.recurrent import QuantLSTM, int8_lstms
from autocompress.compress.rounding import fake_quantize_weight
from autocompress.policy import CompressionPolicy, LayerPolicy

POLICY = CompressionPolicy(layers={"rnn": LayerPolicy("int8")})


class Tagger(nn.Module):
    """Two layers in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(6, 10, 2, batch_first=True, bidirectional=True), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0])


def int8() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Tagger().eval()
    return model, apply_policy(model, POLICY, CompressionContext(torch.randn(1, 5, 6)))


def test_it_computes_with_rounded_weights_and_its_own_biases() -> None:
    model, made = int8()
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in expected.rnn.named_parameters():  # type: ignore[union-attr]
            if "weight" in name:
                parameter.copy_(fake_quantize_weight(parameter))
    x = torch.randn(4, 5, 6)
    torch.testing.assert_close(made(x), expected(x))
    assert not torch.allclose(made(x), model(x))
    assert type(model.rnn) is nn.LSTM and made.state_dict().keys() == model.state_dict().keys()


def test_it_is_the_dense_network_where_quantization_is_off() -> None:
    model, made = int8()
    x = torch.randn(4, 5, 6)
    calibrate(made, [x])
    with quantization_mode(made, "off"):
        torch.testing.assert_close(made(x), model(x))
    assert not torch.allclose(made(x), model(x))


def test_training_moves_the_weights_through_the_rounding() -> None:
    _, made = int8()
    before = copy.deepcopy(made.state_dict())
    optimizer = torch.optim.SGD(made.parameters(), 0.1)
    made(torch.randn(4, 5, 6)).square().mean().backward()
    optimizer.step()
    moved = [name for name, value in made.state_dict().items() if not torch.equal(value, before[name])]
    assert {"rnn.weight_ih_l0", "rnn.weight_hh_l1_reverse", "rnn.bias_ih_l1"} <= set(moved)


def test_its_own_weights_are_back_after_an_error() -> None:
    _, made = int8()
    rnn = made.rnn
    assert isinstance(rnn, QuantLSTM)
    with pytest.raises(RuntimeError):
        made(torch.randn(4, 5, 7))
    assert all(own is kept for own, kept in zip(rnn.parameters(), rnn._flat_weights, strict=True))


def test_weights_are_stacked_by_layer_and_direction() -> None:
    _, made = int8()
    ((name, lstm),) = int8_lstms(made)
    assert name == "rnn"
    (first, states), (second, _) = lstm.stacked()
    assert first.shape == (2, 40, 6) and states.shape == (2, 40, 10) and second.shape == (2, 40, 20)
    assert torch.equal(first[1], lstm.weight_ih_l0_reverse)
