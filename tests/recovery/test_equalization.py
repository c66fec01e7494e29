"""Cross-layer equalization: the same function, more even ranges."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.quantization import quantization_mode
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.recovery.equalization import equalize, factors_of
from tests import networks

INT8 = LayerPolicy("int8")


def int8(model: nn.Module, inputs: Tensor, *names: str) -> nn.Module:
    policy = CompressionPolicy(layers=dict.fromkeys(names, INT8))
    return apply_policy(model.eval(), policy, CompressionContext(inputs[:2]))


class Pair(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)
        self.activation = activation
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[8.0], [0.5]]))
            self.second.weight.copy_(torch.tensor([[1.0, 4.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.first(x)))  # type: ignore[no-any-return]


def test_both_ranges_become_equal_by_hand() -> None:
    inputs = torch.linspace(0, 1, 16)[:, None]
    model = int8(Pair(nn.ReLU()), inputs, "first", "second")
    done, left = equalize(model, inputs)
    # sqrt(8 / 1) and sqrt(0.5 / 4), whose geometric mean is 1.
    assert (done, left) == (["first"], {})
    even = torch.tensor([8.0, 2.0]).sqrt()
    torch.testing.assert_close(model.get_parameter("first.weight").data[:, 0], even)
    torch.testing.assert_close(model.get_parameter("second.weight").data[0], even)


def test_factors_leave_dead_channels_alone_and_stay_small() -> None:
    found = factors_of(torch.tensor([4.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 4.0]))
    torch.testing.assert_close(found, torch.tensor([2.0, 1.0, 1.0, 0.5]))
    assert torch.equal(factors_of(torch.zeros(2), torch.ones(2)), torch.ones(2))
    assert float(factors_of(torch.tensor([1e12, 1.0]), torch.ones(2)).max()) == 32


@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.GELU(), nn.Hardswish(), nn.Sigmoid()])
def test_what_is_not_homogeneous_is_undone(activation: nn.Module) -> None:
    inputs = torch.linspace(-1, 1, 16)[:, None] / 4
    model = int8(Pair(activation), inputs, "first", "second")
    before = copy.deepcopy(model.state_dict())
    done, left = equalize(model, inputs)
    assert done == [] and "not homogeneous" in left["first"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Mixed(nn.Module):
    """conv, batch-norm, ReLU, pool, conv, SiLU, flatten, linear: one pair of two can be equalized."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(8 * 16, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.conv2(functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 2)))
        return self.fc2(functional.relu(self.fc1(x.flatten(1))))  # type: ignore[no-any-return]


def test_pairs_that_fail_do_not_keep_others_back() -> None:
    inputs = networks.images(16)
    original = networks.randomize(Mixed())
    model = int8(original, inputs, "conv1", "conv2", "fc1", "fc2")
    done, left = equalize(model, inputs)
    assert done == ["conv1", "fc1"] and list(left) == ["conv2"]
    with torch.no_grad(), quantization_mode(model, "off"):
        torch.testing.assert_close(model(inputs), original(inputs), rtol=1e-3, atol=1e-4)
    # Behind a batch-norm its scale and shift are divided; the convolution stays.
    assert torch.equal(model.get_parameter("conv1.weight"), original.get_parameter("conv1.weight"))
    assert not torch.equal(model.get_parameter("bn1.weight"), original.get_parameter("bn1.weight"))


def test_a_flatten_multiplies_the_channels_that_are_read() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).relu().flatten(1))  # type: ignore[no-any-return]

    inputs = networks.images(16)
    model = int8(networks.randomize(Flat()), inputs, "fc")
    assert equalize(model, inputs) == (["conv"], {})


def test_what_several_layers_make_or_nobody_reads_in_int8_is_left() -> None:
    inputs = networks.images(16)
    model = int8(networks.randomize(networks.Residual()), inputs, "same.conv2")
    done, left = equalize(model, inputs)
    assert done == ["same.conv1"]
    assert left["stem"] == "several layers make its channels"
    assert left["wider.conv1"] == "no int8 layer reads it"
    joined = int8(networks.randomize(networks.Concat()), inputs, "join", "fc")
    done, left = equalize(joined, inputs)
    assert done == ["join"]
    assert left == dict.fromkeys(("left", "right"), "it is read together with others' channels")
