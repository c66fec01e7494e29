"""Statistics of batch-norms move by what compression changed, wherever the calibration data lie."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from autocompress.model.inventory import take_inventory
from autocompress.policy import CompressionPolicy
from autocompress.recovery import TrainingFreeCompressor
from autocompress.recovery.batch_norm_transfer import BatchNormTransfer


class Net(nn.Sequential):
    """Convolution, ReLU, batch-norm: what a layer feeds is not what its batch-norm is given."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
            nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
        )  # fmt: skip


def trained(shift: float = 0.0) -> tuple[nn.Module, Tensor]:
    """A network whose statistics are of many images, and other images that are brighter by `shift`."""
    torch.manual_seed(0)
    model = Net()
    model.train()
    with torch.no_grad():
        for _ in range(60):
            model(torch.randn(64, 3, 8, 8))
    return model.eval(), torch.randn(64, 3, 8, 8) + shift


def test_a_network_in_which_nothing_changed_stays_what_it_was() -> None:
    model, images = trained(shift=1.0)
    transfer = BatchNormTransfer(model)
    with torch.no_grad(), transfer.watching():
        model(images)
    again = copy.deepcopy(model)
    with torch.no_grad(), transfer.moving(again):
        again(images)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_what_is_twice_as_large_is_normalised_to_the_same() -> None:
    model, images = trained(shift=0.5)
    transfer = BatchNormTransfer(model)
    with torch.no_grad(), transfer.watching():
        expected = model(images)
    louder = copy.deepcopy(model)
    first = louder.get_submodule("0")
    assert isinstance(first, nn.Conv2d) and first.bias is not None
    with torch.no_grad():
        first.weight *= 2
        first.bias *= 2
        assert not torch.allclose(louder(images), expected, atol=1e-2)
        with transfer.moving(louder):
            found = louder(images)
    # Already in the pass that moves them, and ever after.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(louder(images), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_channels_that_are_left_are_found_by_their_statistics(shift: float) -> None:
    model, images = trained(shift)
    inventory = take_inventory(model, images[:2])
    group = next(iter(inventory.groups))
    made = TrainingFreeCompressor(model, inventory, {}, images[:2], [images]).model(
        CompressionPolicy(pruning={group: 0.5})
    )
    norm = made.get_submodule("2")
    whole = model.get_submodule("2")
    assert isinstance(norm, nn.BatchNorm2d) and isinstance(whole, nn.BatchNorm2d)
    assert norm.running_mean is not None and whole.running_mean is not None and norm.running_var is not None
    assert len(norm.running_mean) == 8
    # Nothing was changed before it: its statistics are those of the channels that are left, not of these few images.
    assert all(bool(((whole.running_mean - mean).abs() < 1e-2).any()) for mean in norm.running_mean)


def test_channels_that_cannot_be_told_apart_get_the_statistics_of_what_they_are_given() -> None:
    torch.manual_seed(0)
    model, images = Net().eval(), torch.randn(64, 3, 8, 8)  # never trained: all statistics are 0 and 1
    transfer = BatchNormTransfer(model)
    with torch.no_grad(), transfer.watching():
        model(images)
    part = copy.deepcopy(model)
    with torch.no_grad():
        norm = part.get_submodule("2")
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        norm.running_mean[0] += 0.5
        with transfer.moving(part):
            part(images)
        given = torch.relu(part.get_submodule("0")(images))
    torch.testing.assert_close(norm.running_mean, given.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
