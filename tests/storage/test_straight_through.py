"""Weights that are seen quantized: levels to the bit in the forward pass, the weight's own gradient in the backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autocompress.errors import CompressionError, ConfigError
from autocompress.storage.quantizers import QUANTIZERS, quantizer
from autocompress.storage.sparsity import bake, set_masks
from autocompress.storage.straight_through import quantize_through


def layer(weight: list[list[float]]) -> nn.Linear:
    made = nn.Linear(len(weight[0]), len(weight), bias=False)
    made.weight = nn.Parameter(torch.tensor(weight))
    return made


def test_levels_go_forward_and_gradients_straight_through() -> None:
    model = layer([[0.9, -0.5, 0.1]])
    # Two bits, symmetric: codes -1, 0 and 1 times 0.9; -0.5 / 0.9 rounds to -1.
    quantize_through(model, 2, quantizer("uniform"))
    inputs = torch.tensor([[1.0, 10.0, 100.0]])
    outputs = model(inputs)
    assert outputs.item() == pytest.approx(0.9 - 9.0)
    outputs.sum().backward()
    trained = model.parametrizations["weight"].original
    assert trained.grad is not None and trained.grad.tolist() == [[1.0, 10.0, 100.0]]
    # A step moves the weights, and one of them to another level: 0.1 - 0.005 * 100 = -0.4, beyond half of 0.895.
    torch.optim.SGD(model.parameters(), 0.005).step()
    model.eval()
    bake(model)
    assert model.weight.tolist() == [pytest.approx([0.895, -0.895, 0.0])]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_can_be_trained_through(name: str) -> None:
    torch.manual_seed(0)
    bits = max(2, QUANTIZERS[name].BITS[0]) if 2 in QUANTIZERS[name].BITS else QUANTIZERS[name].BITS[0]
    teacher, model = nn.Linear(8, 4), nn.Linear(8, 4)
    set_masks(model, {"weight": torch.arange(32).reshape(4, 8) % 4 > 0})
    quantize_through(model, {"weight": bits}, quantizer(name))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    inputs = torch.randn(256, 8)

    def loss() -> torch.Tensor:
        return nn.functional.mse_loss(model(inputs), teacher(inputs).detach())

    before = loss().item()
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    model.eval()
    bake(model)
    assert loss().item() < before
    values = model.weight.detach()
    assert (values.flatten()[::4] == 0).all() and not torch.signbit(values.flatten()[::4]).any()
    assert len(values[values != 0].unique()) <= 2**bits
    # To the bit what the quantizer makes of it: quantizing again changes nothing.
    if name in ("codebook", "power-of-two"):
        assert torch.equal(quantizer(name).fit(values[values != 0], bits).values(), values[values != 0])


def test_what_training_saw_is_kept_where_a_quantizer_parts_values_elsewhere() -> None:
    # Ternary: what is above 0.7 times the mean of 0.49 counts as large, 0.45 too; but their mean is 0.96, zero nearer.
    model = layer([[1.0, -1.0, 1.4, 0.45, -0.03, 0.02, 0.01, -0.02]])
    quantize_through(model, 2, quantizer("ternary"))
    seen = [model.weight.detach().clone() for _ in range(2)]
    bake(model.eval())
    assert model.weight[0, 3] == 0 and all(torch.equal(one, model.weight) for one in seen)


def test_a_convolution_whose_channels_are_last() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last)
    weight = model.weight.detach().clone()
    quantize_through(model, 3, quantizer("uniform"))
    images = torch.randn(2, 8, 6, 6)
    # The first pass fits levels, the second one goes to the nearest; warnings are errors here.
    once, again = model(images), model(images)
    assert torch.allclose(once, again)
    bake(model.eval())
    assert torch.equal(model.weight, quantizer("uniform").fit(weight, 3).values())


def test_what_cannot_be_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match="does 2 alone"):
        quantize_through(layer([[1.0, 2.0]]), 3, quantizer("ternary"))
    with pytest.raises(ConfigError, match="no parameter 'wieght'"):
        quantize_through(layer([[1.0, 2.0]]), {"wieght": 3}, quantizer("uniform"))
    with pytest.raises(CompressionError, match="NaN"):
        quantize_through(layer([[1.0, float("nan")]]), 3, quantizer("uniform"))
    with pytest.raises(CompressionError, match="no weights"):
        quantize_through(layer([[0.0, 0.0]]), 3, quantizer("uniform"))
