"""Rows that layers are fitted to."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from autocompress.errors import ConfigError
from autocompress.recovery.fit_samples import patches, places
from autocompress.tasks.reading import first_samples


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), [(3, 1, 1, 1), (3, 2, 1, 1), (5, 1, 0, 2)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_patches_are_what_weights_are_multiplied_with(
    kernel: int, stride: int, padding: int, dilation: int, groups: int
) -> None:
    layer = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups)
    given = torch.randn(2, 4, 14, 14)
    output = layer(given)
    chosen, rows = places(layer, output, torch.Generator())
    assert torch.equal(rows, output.movedim(1, -1)[chosen])
    inputs = patches(layer, given, chosen)
    assert inputs is not None
    weight = layer.weight.flatten(1).unflatten(0, (groups, -1))
    parts = zip(inputs.chunk(groups, 1), weight, layer.bias.chunk(groups), strict=True)
    expected = torch.cat([functional.linear(x, w, b) for x, w, b in parts], 1)
    assert torch.allclose(rows, expected, atol=1e-4)


def test_rows_take_bounded_memory() -> None:
    chosen, rows = places(nn.Linear(1, 64), torch.zeros(8, 32, 32, 64), torch.Generator(), 640)
    assert [len(index) for index in chosen] == [10, 10, 10] and rows.shape == (10, 64)


def test_the_first_samples_are_kept_up_to_a_limit() -> None:
    assert torch.equal(first_samples([torch.zeros(300, 2), torch.ones(300, 2)])[:, 0].sum(), torch.tensor(212.0))
    assert len(first_samples([torch.eye(1024).expand(64, 3, 1024, 1024)])) == 5


def test_no_samples_and_samples_that_say_nothing() -> None:
    with pytest.raises(ConfigError, match="no calibration data"):
        first_samples([])
    with pytest.raises(ConfigError, match=r"Every value of the task's calibration data is 0\.5"):
        first_samples([torch.full((4, 3, 8, 8), 0.5)])
