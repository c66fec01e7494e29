"""Shapes by arithmetic are the shapes of the model that `apply_policy` makes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import Tensor, nn

from autocompress.compress import CompressionContext, apply_policy, rewrite
from autocompress.compress.shapes import LayerShape, network_shape
from autocompress.model.inventory import Inventory, take_inventory
from autocompress.policy import FACTORIZATIONS, CompressionPolicy, LayerPolicy
from autocompress.tasks.cifar_models import CIFAR_MODELS
from tests import networks


class Flattened(nn.Module):
    """A convolution read through a flatten: sixteen inputs of the linear layer for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, padding=1)
        self.fc = nn.Linear(24 * 16, 10)
        self.out = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.conv(x).relu(), 2).flatten(1)
        return self.out(self.fc(x).relu())


class Twice(nn.Module):
    """One tensor beside itself in a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.join = nn.Conv2d(24, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        return self.fc(self.join(torch.cat([x, x], 1)).mean((2, 3)))


@dataclass(frozen=True)
class Known:
    model: nn.Module
    inputs: Tensor
    inventory: Inventory


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": networks.Plain,
    "residual": networks.Residual,
    "mobile": networks.Mobile,
    "concat": networks.Concat,
    "tokens": networks.Tokens,
    "flattened": Flattened,
    "twice": Twice,
    "resnet20": CIFAR_MODELS["resnet20"],
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(weights=None, width_mult=0.35, num_classes=10),
}
_known: dict[str, Known] = {}


def known(name: str) -> Known:
    """Return a model with its inventory; made once."""
    if name not in _known:
        torch.manual_seed(0)
        model, x = rewrite(MODELS[name]()), networks.images(2, 32 if name == "mobilenet_v2" else 8)
        _known[name] = Known(model, x, take_inventory(model, x))
    return _known[name]


def random_policy(inventory: Inventory, rng: random.Random) -> CompressionPolicy:
    share = rng.random()
    layers = {
        name: LayerPolicy(
            "int8" if layer.quantizable and rng.random() < share else "dense",
            rng.choice([1.0, 0.75, 0.5, 0.25]) if layer.factorizable and rng.random() < share else 1.0,
            factorization=rng.choice(FACTORIZATIONS),
        )
        for name, layer in inventory.layers.items()
    }
    pruning = {name: rng.choice([0.0, 0.125, 0.3, 0.5, 0.75]) for name in inventory.groups if rng.random() < share}
    blocks = tuple(name for name in inventory.blocks if rng.random() < share / 2)
    return CompressionPolicy("bf16", pruning, layers, blocks)


def found_in(model: nn.Module, name: str) -> LayerShape | None:
    """Read a layer's shape off its weights."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    parts = list(module) if isinstance(module, nn.Sequential) else [module]
    weights = [part.weight for part in parts]
    first, last = weights[0], weights[-1]
    ins, outs = first.shape[1] * getattr(parts[0], "groups", 1), last.shape[0]
    return LayerShape(ins, outs, tuple(weight.shape[0] for weight in weights[:-1]), "")


@pytest.mark.parametrize("name", MODELS)
def test_the_shapes_are_those_of_the_compressed_model(name: str) -> None:
    base, rng = known(name), random.Random(name)
    for _ in range(3 if name == "mobilenet_v2" else 8):
        policy = random_policy(base.inventory, rng)
        made = apply_policy(base.model, policy, CompressionContext(base.inputs, weights=False))
        shape = network_shape(base.inventory, policy)
        real = {layer: found for layer in base.inventory.layers if (found := found_in(made, layer)) is not None}
        assert {layer: found._replace(dtype="", factorization="") for layer, found in shape.layers.items()} == real
        assert shape.removed_blocks == policy.removed_blocks and shape.dense_dtype == "bf16"
        assert {layer for layer, found in shape.layers.items() if found.dtype == "int8"} == {
            layer for layer in policy.int8_layers if layer in real
        }
        for group, kept in shape.groups.items():
            assert real[group].out_channels == kept


def test_the_untouched_model_and_what_it_is_said_to_run_in() -> None:
    base = known("residual")
    shape = network_shape(base.inventory, CompressionPolicy("fp16"))
    for name, layer in base.inventory.layers.items():
        assert shape.layers[name] == LayerShape(layer.in_channels, layer.out_channels, (), "fp16")
    assert shape.groups == {name: group.channels for name, group in base.inventory.groups.items()}


def test_several_inputs_of_a_layer_go_with_one_channel() -> None:
    behind = known("flattened").inventory
    assert behind.groups["conv"].multiples == {"fc": 16}
    twice = known("twice").inventory
    assert twice.groups["conv"].multiples == {"join": 2}
    shape = network_shape(twice, CompressionPolicy(pruning={"conv": 0.5}))
    assert (shape.layers["conv"].out_channels, shape.layers["join"].in_channels) == (6, 12)


def test_names_of_another_model_are_passed_over() -> None:
    base = known("residual")
    policy = CompressionPolicy(
        pruning={"nowhere": 0.5}, layers={"nowhere": LayerPolicy("int8")}, removed_blocks=("nowhere",)
    )
    assert network_shape(base.inventory, policy).layers == network_shape(base.inventory, CompressionPolicy()).layers


def test_a_layer_that_cannot_be_factorized_is_not() -> None:
    base = known("mobile")
    name = next(n for n, layer in base.inventory.layers.items() if layer.kind == "depthwise")
    policy = CompressionPolicy(layers={name: LayerPolicy(rank_ratio=0.5)})
    assert network_shape(base.inventory, policy).layers[name].ranks == ()
