"""Scores of channels, against what the papers say, computed by hand."""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from autocompress.catalogue import Method
from autocompress.compress import IMPORTANCES, Evidence, importances, score_channels
from autocompress.errors import CompressionError, ConfigError
from autocompress.model.inventory import Inventory, take_inventory
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


def evidence(model: nn.Module, *, batches: int = 2, size: int = 4) -> Evidence:
    """Give losses of batches of any size, and outputs, over the same inputs."""
    inputs = images(batches * size, seed=1)

    def losses(batch_size: int) -> Iterator[Tensor]:
        for batch in inputs.split(batch_size):
            yield model(batch).square().mean()

    def outputs() -> Iterator[Tensor]:
        for batch in inputs.split(size):
            with torch.no_grad():
                yield model(batch)

    return Evidence(losses, outputs)


def relative(scores: Tensor) -> Tensor:
    return (scores / scores.mean()).detach()


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-5)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def rows(conv2: Tensor, fc: Tensor) -> Tensor:
    """Sum what belongs to each output channel of conv2: its filter, and the column of fc that reads it."""
    return conv2.flatten(1).sum(1) + fc.sum(0)


# -- weights ----------------------------------------------------------------------------------------------------------


def test_l1_by_hand(model: networks.Plain, inventory: Inventory) -> None:
    found = score_channels(model, images(), inventory, "magnitude_l1")["conv2"]
    close(found, relative(rows(model.conv2.weight.abs(), model.fc.weight.abs())))


@pytest.mark.parametrize(("method", "p"), [("magnitude_global", 2), ("magnitude_l1_global", 1)])
def test_global_magnitude_is_not_normalised(model: networks.Plain, inventory: Inventory, method: str, p: int) -> None:
    found = score_channels(model, images(), inventory, method)
    # The mean over conv2 and fc, which both hold every channel.
    close(found["conv2"], rows(model.conv2.weight.abs() ** p, model.fc.weight.abs() ** p) / 2)
    with torch.no_grad():
        model.conv1.weight.mul_(10), model.bn1.weight.mul_(10)
    again = score_channels(model, images(), inventory, method)
    assert again["conv1"].mean() > 2 * found["conv1"].mean()
    assert torch.equal(again["conv2"], found["conv2"])


def test_lamp_by_hand(model: networks.Plain, inventory: Inventory) -> None:
    with torch.no_grad():
        # The mean over two layers of what each channel has: 1, 4, 2 and 1 (and 12 channels of nothing).
        model.conv2.weight.zero_(), model.fc.weight.zero_()
        for channel, square in enumerate((1.0, 4.0, 2.0, 1.0)):
            model.conv2.weight[channel, 0, 0, 0] = (2 * square) ** 0.5
    found = score_channels(model, images(), inventory, "lamp")["conv2"]
    assert found[1].item() == pytest.approx(1)  # 4 / 4
    assert found[2].item() == pytest.approx(2 / 6)
    assert sorted(found[[0, 3]].tolist()) == pytest.approx([1 / 8, 1 / 7])  # equal ones have an order
    assert found[4:].tolist() == [0] * 12


def test_lamp_of_a_dead_group_is_zero(model: networks.Plain, inventory: Inventory) -> None:
    with torch.no_grad():
        model.conv2.weight.zero_(), model.fc.weight.zero_()
    assert score_channels(model, images(), inventory, "lamp")["conv2"].tolist() == [0] * 16


def test_batch_norm_scale_by_hand_and_where_there_is_none(model: networks.Plain, inventory: Inventory) -> None:
    found = score_channels(model, images(), inventory, "bn_scale")
    scale = model.bn1.weight.detach().abs()
    close(found["conv1"], scale)
    assert list(found.notes) == ["conv2"] and "no batch-norm" in found.notes["conv2"]
    close(found["conv2"], scale.mean() * relative(rows(model.conv2.weight.abs(), model.fc.weight.abs())))


def test_batch_norm_scale_is_the_mean_over_a_residual_stream() -> None:
    model = networks.randomize(networks.Residual())
    found = score_channels(model, images(), take_inventory(model, images()), "bn_scale")
    assert isinstance(model, networks.Residual)
    down = model.wider.downsample
    assert isinstance(down, nn.Sequential) and isinstance(down[1], nn.BatchNorm2d)
    close(found["wider.conv2"], (model.wider.bn2.weight + down[1].weight).abs() / 2)


def test_geometric_median_by_hand(model: networks.Plain, inventory: Inventory) -> None:
    with torch.no_grad():
        # On a line: filters at 0, 1, 3 and 5, the others at 100 times their number.
        model.conv2.weight.zero_()
        places = torch.tensor([0.0, 1, 3, -5, *(100.0 * n for n in range(4, 16))])
        model.conv2.weight[:, 0, 0, 0] = places
    found = score_channels(model, images(), inventory, "geometric_median")["conv2"]
    wanted = (places[:, None] - places).abs().sum(1)
    close(found, relative(wanted))
    assert found.argmin() == 7  # a median of sixteen


def test_equal_filters_are_at_no_distance_and_opposite_ones_are_not(
    model: networks.Plain, inventory: Inventory
) -> None:
    with torch.no_grad():
        model.conv2.weight.copy_(model.conv2.weight[:1].expand_as(model.conv2.weight).clone())
    assert score_channels(model, images(), inventory, "geometric_median")["conv2"].abs().max() < 1e-3
    with torch.no_grad():
        model.conv2.weight[5].neg_()
    assert score_channels(model, images(), inventory, "geometric_median")["conv2"].argmax() == 5


# -- gradients --------------------------------------------------------------------------------------------------------


def test_taylor_by_hand_over_several_batches(model: networks.Plain, inventory: Inventory) -> None:
    found = score_channels(model, images(), inventory, "taylor", evidence(model))["conv2"]
    # Two batches of four, asked for as one of 128.
    g = gradients(model, model(images(8, seed=1)).square().mean())
    close(
        found, relative(rows((model.conv2.weight * g["conv2.weight"]).abs(), (model.fc.weight * g["fc.weight"]).abs()))
    )


def test_stochastic_gradients_by_hand(model: networks.Plain, inventory: Inventory) -> None:
    parts = images(64, seed=2).split(32)

    def losses(batch_size: int) -> Iterator[Tensor]:
        assert batch_size == 32
        yield from (model(part).square().mean() for part in parts)

    found = score_channels(model, images(), inventory, "gradient", Evidence(losses))["conv2"]
    each = [gradients(model, model(part).square().mean()) for part in parts]
    wanted = [rows(g["conv2.weight"].abs(), g["fc.weight"].abs()) for g in each]
    close(found, relative(wanted[0] + wanted[1]))


def test_fisher_is_of_single_samples(model: networks.Plain, inventory: Inventory) -> None:
    found = score_channels(model, images(), inventory, "fisher", evidence(model))["conv2"]
    each = [gradients(model, model(sample[None]).square().mean()) for sample in images(8, seed=1)]
    conv2 = sum(g["conv2.weight"] ** 2 for g in each) * model.conv2.weight**2
    fc = sum(g["fc.weight"] ** 2 for g in each) * model.fc.weight**2
    close(found, relative(rows(conv2, fc)))


@pytest.mark.parametrize("method", ["taylor", "gradient", "fisher"])
def test_without_gradients_is_an_error(model: networks.Plain, inventory: Inventory, method: str) -> None:
    with pytest.raises(CompressionError, match=rf"'{method}' needs the gradient of 'conv1'.*no training batches"):
        score_channels(model, images(), inventory, method)
    model.conv2.weight.requires_grad_(False)
    with pytest.raises(CompressionError, match="gradient of 'conv2'"):
        score_channels(model, images(), inventory, method, evidence(model))
    model.requires_grad_(False)
    with pytest.raises(CompressionError, match=r"gradient of 'conv1'.*frozen"):
        score_channels(model, images(), inventory, method, evidence(model))


def test_a_loss_that_is_not_finite_is_an_error(model: networks.Plain, inventory: Inventory) -> None:
    bad = Evidence(lambda size: [model(images()).sum() / 0])
    with pytest.raises(CompressionError, match=r"'taylor'.*batch 0 is -?inf"):
        score_channels(model, images(), inventory, "taylor", bad)
    assert all(p.grad is None for p in model.parameters())


# -- activations ------------------------------------------------------------------------------------------------------


def seen_by_conv2(model: networks.Plain) -> Tensor:
    """Return what conv2 reads, ``(8, 8, positions)``: after batch-norm, ReLU and the pool."""
    with torch.no_grad():
        return model.pool(model.bn1(model.conv1(images(8, seed=1))).relu()).flatten(2)


def test_activation_mean_by_hand(model: networks.Plain, inventory: Inventory) -> None:
    found = score_channels(model, images(), inventory, "activation_mean", evidence(model))
    close(found["conv1"], relative(seen_by_conv2(model).mean((0, 2))))


def test_apoz_by_hand_and_where_nothing_is_zero(model: networks.Plain, inventory: Inventory) -> None:
    with torch.no_grad():
        model.bn1.bias[2], model.bn1.bias[3] = -1e3, 1e3  # never, and always, alive
    found = score_channels(model, images(), inventory, "apoz", evidence(model))
    share = (seen_by_conv2(model) > 0).float().mean((0, 2))
    assert (share[2], share[3]) == (0, 1)
    close(found["conv1"], relative(share))
    assert found.notes == {}


def test_apoz_says_where_no_activation_is_ever_zero() -> None:
    model = networks.randomize(networks.Concat())
    inventory = take_inventory(model, images())
    found = score_channels(model, images(), inventory, "apoz", evidence(model))
    # Behind the mean over all positions nothing is zero; before it, a ReLU's outputs are.
    assert list(found.notes) == ["join"] and "their mean was taken" in found.notes["join"]
    close(found["join"], score_channels(model, images(), inventory, "activation_mean", evidence(model))["join"])


def test_entropy_by_hand() -> None:
    class Chosen(nn.Module):
        """Three channels: the same for all, one of two values, another for each of four samples."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 1)
            with torch.no_grad():
                self.first.weight.copy_(torch.tensor([[0.0, 0], [1, 0], [0, 1]]))
                self.first.bias.fill_(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    model = Chosen().eval()
    samples = torch.tensor([[0.0, 0], [0, 1], [1, 2], [1, 3]])

    def outputs() -> Iterator[Tensor]:
        yield from (model(part) for part in samples.split(2))

    inventory = take_inventory(model, samples)
    found = score_channels(model, samples, inventory, "activation_entropy", Evidence(outputs=outputs))["first"]
    close(found, relative(torch.tensor([0, math.log(2), math.log(4)])))


def test_channels_are_found_behind_a_concat() -> None:
    model = networks.randomize(networks.Concat())
    assert isinstance(model, networks.Concat)
    found = score_channels(model, images(), take_inventory(model, images()), "activation_mean", evidence(model))
    for name, layer in (("left", model.left), ("right", model.right)):
        close(found[name], relative(layer(images(8, seed=1)).relu().mean((0, 2, 3))))


def test_channels_are_found_behind_a_flatten() -> None:
    model = networks.randomize(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 2)))
    found = score_channels(model, images(), take_inventory(model, images()), "activation_mean", evidence(model))
    close(found["0"], relative(model[0](images(8, seed=1)).relu().mean((0, 2, 3))))  # type: ignore[index]


def test_tokens_are_averaged_over_positions() -> None:
    model = networks.randomize(networks.Tokens())
    assert isinstance(model, networks.Tokens)
    found = score_channels(model, images(), take_inventory(model, images()), "activation_mean", evidence(model))
    with torch.no_grad():
        tokens = images(8, seed=1).flatten(2).transpose(1, 2).reshape(8, 12, 16)
        # The head reads the mean over positions.
        close(found["first"], relative(model.first(tokens).relu().mean((0, 1))))


@pytest.mark.parametrize("method", ["activation_mean", "apoz", "activation_entropy"])
def test_without_calibration_data_is_an_error(model: networks.Plain, inventory: Inventory, method: str) -> None:
    with pytest.raises(CompressionError, match=f"'{method}' needs calibration data"):
        score_channels(model, images(), inventory, method)
    assert not any(module._forward_pre_hooks for module in model.modules())


# -- all --------------------------------------------------------------------------------------------------------------


def test_random_is_another_order_each_time(model: networks.Plain, inventory: Inventory) -> None:
    torch.manual_seed(0)
    first, second = (score_channels(model, images(), inventory, "random")["conv2"] for _ in range(2))
    assert first.shape == second.shape == (16,)
    assert not torch.equal(first.argsort(), second.argsort())


@pytest.mark.parametrize("method", list(IMPORTANCES))
def test_every_method_scores_every_kind_of_group_and_changes_nothing(method: str) -> None:
    model = networks.randomize(networks.Mobile())
    inventory, before = take_inventory(model, images()), networks.state(model)
    scores = score_channels(model, images(), inventory, method, evidence(model))
    assert list(scores) == list(inventory.groups)
    for name, group in inventory.groups.items():
        assert scores[name].shape == (group.channels,)
        assert bool((scores[name] >= 0).all()) and len(scores[name].unique()) > 1
    assert networks.same_state(model, before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_every_method_says_what_it_is() -> None:
    said = [
        method.name
        for info in pkgutil.iter_modules(importances.__path__, f"{importances.__name__}.")
        for method in said_by(import_module(info.name))
    ]
    assert sorted(said) == sorted(IMPORTANCES)


def said_by(module: ModuleType) -> tuple[Method, ...]:
    return getattr(module, "METHODS", ()) or ((module.METHOD,) if hasattr(module, "METHOD") else ())


@pytest.mark.parametrize("method", ["magnitude", "random", "taylor", "apoz"])
def test_weights_that_are_not_finite_are_named(model: networks.Plain, inventory: Inventory, method: str) -> None:
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(CompressionError, match="layer 'conv2' hold NaN"):
        score_channels(model, images(), inventory, method, evidence(model))


def test_an_unknown_method(model: networks.Plain, inventory: Inventory) -> None:
    with pytest.raises(ConfigError, match=r"'magnitud'\. Did you mean 'magnitude'\? Available: activation_entropy, "):
        score_channels(model, images(), inventory, "magnitud")
