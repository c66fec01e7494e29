"""Shared weights: gradients of a cluster are summed, pruned weights stay zero, and plain weights come out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autocompress.errors import CompressionError, ConfigError
from autocompress.storage.quantizers import quantizer
from autocompress.storage.sharing import share_weights
from autocompress.storage.sparsity import bake, set_masks


def layer(weight: list[list[float]]) -> nn.Linear:
    made = nn.Linear(len(weight[0]), len(weight), bias=False)
    made.weight = nn.Parameter(torch.tensor(weight))
    return made


def test_a_level_takes_the_sum_of_its_weights_gradients() -> None:
    model = layer([[1.0, 1.0, 5.0], [0.0, 5.0, 1.0]])
    share_weights(model, 1, quantizer("codebook"))
    # d(sum of outputs)/d(weight) is the input of its column.
    model(torch.tensor([[10.0, 20.0, 40.0]])).sum().backward()
    levels = model.parametrizations["weight"].original
    assert levels.tolist() == [1.0, 5.0]
    assert levels.grad is not None and levels.grad.tolist() == [10 + 20 + 40, 40 + 20]
    torch.optim.SGD(model.parameters(), 0.01).step()
    bake(model)
    assert model.weight.flatten().tolist() == pytest.approx([0.3, 0.3, 4.4, 0.0, 4.4, 0.3])


def test_shared_weights_train_and_stay_shared() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    mask = torch.rand(16, 8) < 0.5
    set_masks(model, {"0.weight": mask})
    share_weights(model, {"0.weight": 2, "2.bias": 1}, quantizer("codebook"))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    inputs, targets = torch.randn(32, 8), torch.randint(0, 2, (32,))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    bake(model)
    assert losses[-1] < losses[0]
    assert torch.equal(model[0].weight != 0, mask)
    assert len(model[0].weight[mask].unique()) == 4
    assert len(model[2].bias.unique()) == 2 and len(model[2].weight.unique()) == 32
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_what_cannot_be_shared() -> None:
    with pytest.raises(ConfigError, match="'bias'"):
        share_weights(layer([[1.0]]), {"bias": 2}, quantizer("codebook"))
    with pytest.raises(CompressionError, match="no weights"):
        share_weights(layer([[0.0, 0.0]]), 2, quantizer("codebook"))
    with pytest.raises(ConfigError, match="not 3"):
        share_weights(layer([[1.0]]), 3, quantizer("ternary"))
