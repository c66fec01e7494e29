"""Scores of channels, against what the papers say, computed by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from autocompress.compress import IMPORTANCES, score_channels
from autocompress.errors import CompressionError, ConfigError
from autocompress.inventory import Inventory, take_inventory
from tests import networks
from tests.networks import images


@pytest.fixture
def model() -> networks.Plain:
    made = networks.randomize(networks.Plain())
    assert isinstance(made, networks.Plain)
    return made


@pytest.fixture
def inventory(model: nn.Module) -> Inventory:
    return take_inventory(model, images())


def squares(weight: Tensor, axis: int) -> Tensor:
    return weight.detach().square().transpose(0, axis).flatten(1).sum(1)


def test_magnitude_by_hand(model: networks.Plain, inventory: Inventory) -> None:
    found = score_channels(model, images(), inventory, "magnitude")
    assert list(found) == ["conv1", "conv2"]
    wanted = squares(model.conv1.weight, 0) + model.bn1.weight.detach().square() + squares(model.conv2.weight, 1)
    torch.testing.assert_close(found["conv1"], wanted / wanted.mean())
    wanted = squares(model.conv2.weight, 0) + squares(model.fc.weight, 1)
    torch.testing.assert_close(found["conv2"], wanted / wanted.mean())


def test_magnitude_finds_the_dead_channel(model: networks.Plain, inventory: Inventory) -> None:
    with torch.no_grad():
        model.conv1.weight[3], model.bn1.weight[3], model.conv2.weight[:, 3] = 0, 0, 0
    scores = score_channels(model, images(), inventory, "magnitude")["conv1"]
    assert scores.argmin() == 3
    assert scores[3] == 0
    assert scores.mean() == pytest.approx(1)


def test_a_whole_dead_group_scores_zero_rather_than_nan(model: networks.Plain, inventory: Inventory) -> None:
    with torch.no_grad():
        for tensor in (model.conv2.weight, model.fc.weight):
            tensor.zero_()
    assert bool(score_channels(model, images(), inventory, "magnitude")["conv2"].isfinite().all())


def test_taylor_by_hand_over_several_batches(model: networks.Plain, inventory: Inventory) -> None:
    def losses() -> Iterator[Tensor]:
        for seed in (1, 2):
            yield model(images(4, seed=seed)).square().mean()

    found = score_channels(model, images(), inventory, "taylor", losses())
    for loss in losses():
        loss.backward()
    conv2, fc = model.conv2.weight, model.fc.weight
    assert conv2.grad is not None
    assert fc.grad is not None
    wanted = (conv2 * conv2.grad).abs().flatten(1).sum(1) + (fc * fc.grad).abs().sum(0)
    torch.testing.assert_close(found["conv2"], (wanted / wanted.mean()).detach(), rtol=1e-4, atol=1e-5)


def test_taylor_without_gradients_is_an_error(model: networks.Plain, inventory: Inventory) -> None:
    with pytest.raises(CompressionError, match="gradient of 'conv1'"):
        score_channels(model, images(), inventory, "taylor")
    model.conv2.weight.requires_grad_(False)
    with pytest.raises(CompressionError, match="gradient of 'conv2'"):
        score_channels(model, images(), inventory, "taylor", (model(images()).sum() for _ in range(1)))


def test_random_is_another_order_each_time(model: networks.Plain, inventory: Inventory) -> None:
    torch.manual_seed(0)
    first, second = (score_channels(model, images(), inventory, "random")["conv2"] for _ in range(2))
    assert first.shape == second.shape == (16,)
    assert not torch.equal(first.argsort(), second.argsort())


@pytest.mark.parametrize("method", list(IMPORTANCES))
def test_the_model_is_not_changed(model: networks.Plain, inventory: Inventory, method: str) -> None:
    before = networks.state(model)
    scores = score_channels(model, images(), inventory, method, (model(images()).sum() for _ in range(1)))
    assert all(scores[name].shape == (group.channels,) for name, group in inventory.groups.items())
    assert networks.same_state(model, before)
    assert all(p.grad is None for p in model.parameters())


def test_an_unknown_method(model: networks.Plain, inventory: Inventory) -> None:
    with pytest.raises(ConfigError, match="magnitude"):
        score_channels(model, images(), inventory, "magnitud")
