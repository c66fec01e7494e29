"""All transforms of one policy, in their order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.quantization import calibrate, quantized_layers
from autocompress.errors import CompressionError
from autocompress.model.inventory import take_inventory
from autocompress.policy import CompressionPolicy, LayerPolicy
from tests import networks

FULL = CompressionPolicy(
    pruning={"stem": 0.25, "same.conv1": 0.5, "wider.conv1": 0.5, "wider.conv2": 0.25},
    layers={
        "stem": LayerPolicy("int8"),
        "same.conv2": LayerPolicy("int8", 0.5),
        "wider.conv2": LayerPolicy("int8", 0.5),
        "fc": LayerPolicy(rank_ratio=0.5),
    },
    removed_blocks=("same",),
)


@pytest.fixture
def model() -> nn.Module:
    return networks.randomize(networks.Residual())


@pytest.fixture
def context() -> CompressionContext:
    return CompressionContext(networks.images())


def test_everything_at_once(model: nn.Module, context: CompressionContext) -> None:
    before = networks.state(model)
    result = apply_policy(model.train(), FULL, context)
    assert not result.training
    assert isinstance(result.get_submodule("same"), nn.Identity)
    # What pruning left of 8 and 16 channels is what ranks are taken of.
    shapes = {name: tuple(m.weight.shape) for name, m in result.named_modules() if isinstance(m, nn.Conv2d)}
    assert shapes["stem"] == (6, 3, 3, 3)
    assert shapes["wider.conv1"] == (8, 6, 3, 3)
    assert shapes["wider.downsample.0"] == (12, 6, 1, 1)
    assert [shapes[f"wider.conv2.{i}"][:2] for i in range(3)] == [(4, 8), (8, 4), (12, 8)]
    assert [name for name, _ in quantized_layers(result)] == ["stem", *(f"wider.conv2.{i}" for i in range(3))]
    calibrate(result, [networks.images(16)])
    with torch.no_grad():
        assert result(context.inputs).shape == (2, 5)
    assert networks.same_state(model, before)


def test_the_empty_policy_is_the_same_function(model: nn.Module, context: CompressionContext) -> None:
    with torch.no_grad():
        result = apply_policy(model, CompressionPolicy(), context)
        assert torch.equal(result(context.inputs), model(context.inputs))


@pytest.mark.parametrize("make", [networks.Plain, networks.Residual, networks.Concat, networks.Mobile, networks.Tokens])
@pytest.mark.parametrize("ratio", [0.5, 0.95])
def test_every_group_of_every_network_together(make: type[nn.Module], ratio: float) -> None:
    model, x = networks.randomize(make()), networks.images()
    inventory = take_inventory(model, x)
    policy = CompressionPolicy(pruning=dict.fromkeys(inventory.groups, ratio))
    result = apply_policy(model, policy, CompressionContext(x))
    for group in inventory.groups.values():
        weight = result.get_parameter(f"{group.producers[0]}.weight")
        assert weight.shape[0] == max(1, group.channels - round(group.channels * ratio))
    with torch.no_grad():
        assert result(x).shape == model(x).shape


def test_a_policy_of_another_model(context: CompressionContext) -> None:
    with pytest.raises(CompressionError):
        apply_policy(networks.Plain(), FULL, context)
