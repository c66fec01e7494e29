"""Weights lie channels last where the forward takes that, and as they are made where it does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autocompress.compress.layout import in_fast_layout, layout_of


class Viewed(nn.Module):
    """Uses `view`, which takes one order of memory alone: on features always, or where it is trained."""

    def __init__(self, *, training_only: bool = False) -> None:
        super().__init__()
        self.conv, self.fc, self.training_only = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5), training_only

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        viewed = self.training or not self.training_only
        found: Tensor = self.fc(x.view(len(x), -1) if viewed else x.flatten(1))
        return found


@pytest.mark.parametrize("training_only", [False, True])
def test_a_forward_that_views_keeps_its_order(training_only: bool) -> None:
    model = Viewed(training_only=training_only).eval()
    images = torch.randn(2, 3, 8, 8)
    expected = model(images)
    assert in_fast_layout(model, images) is model
    assert layout_of(model) == torch.contiguous_format
    assert not model.training
    assert torch.equal(model(images), expected)


def test_any_other_forward_gets_the_fast_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    images = torch.randn(2, 3, 8, 8)
    expected, counted = model(images), int(model[1].num_batches_tracked)  # type: ignore[arg-type]
    assert layout_of(in_fast_layout(model, images)) == torch.channels_last
    torch.testing.assert_close(model(images), expected)
    assert int(model[1].num_batches_tracked) == counted  # type: ignore[arg-type]


class Targeted(nn.Module):
    """Wants targets where it is trained, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.training and targets is None:
            raise ValueError("targets should not be none when in training mode")
        found: Tensor = self.conv(x)
        return found


def test_what_cannot_be_run_in_training_at_all_is_laid_out_fast() -> None:
    assert layout_of(in_fast_layout(Targeted().eval(), torch.randn(2, 3, 8, 8))) == torch.channels_last


def test_the_callers_random_numbers_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5)).eval()
    before = torch.get_rng_state()
    in_fast_layout(model, torch.zeros(2, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_maps_there_is_nothing_to_lay_out() -> None:
    assert layout_of(in_fast_layout(nn.Linear(3, 2), torch.randn(2, 3))) == torch.contiguous_format


@pytest.mark.parametrize(("channels", "size", "stride"), [(3, 1, 2), (12, 1, (1, 2)), (16, 1, 2), (3, 3, 2), (3, 1, 1)])
def test_what_torch_would_write_beyond_its_memory_for_is_not_trained_channels_last(
    channels: int, size: int, stride: int | tuple[int, int]
) -> None:
    model = nn.Sequential(nn.Conv2d(channels, 8, size, stride), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    overruns = channels < 16 and size == 1 and stride != 1
    images = torch.randn(4, channels, 24, 24)
    layout = layout_of(in_fast_layout(model, images))
    assert layout == (torch.contiguous_format if overruns else torch.channels_last)
    for _ in range(10):
        model(images.contiguous(memory_format=layout)).square().mean().backward()
