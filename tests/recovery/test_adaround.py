"""Learned rounding, against what can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from autocompress.compress.rounding import fake_quantize_weight
from autocompress.recovery.adaround import adaptive_rounding


def correlated(rows: int, size: int, seed: int = 0) -> Tensor:
    """Rows ``(rows, size)`` of few independent directions, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, max(2, size // 6), generator=generator)
    return (mixed @ torch.randn(mixed.shape[1], size, generator=generator)).relu()


def test_of_two_weights_that_work_together_one_goes_up() -> None:
    weight = torch.tensor([[127.0, 0.42, 0.38], [127.0, 0.42, 0.0]])
    together = torch.linspace(-1, 1, 64)
    inputs = torch.stack([torch.zeros(64), together, together], 1)
    found = adaptive_rounding(weight, inputs, inputs @ weight.T)
    # 0.8 is nearer to 1 than to 0; each alone would be rounded down.
    assert found[0].tolist() == [127, 1, 0] and found[1].tolist() == [127, 0, 0]
    assert fake_quantize_weight(weight)[0].tolist() == [127, 0, 0]


@pytest.mark.parametrize("shape", [(8, 24), (8, 4, 3, 3)])
def test_outputs_are_closer_and_weights_stay_on_the_grid(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) / 10
    weight[3] = 0
    inputs = correlated(512, weight[0].numel())
    wanted = inputs @ weight.flatten(1).T
    found = adaptive_rounding(weight, inputs, wanted)

    def error(rounded: Tensor) -> float:
        off = inputs @ rounded.flatten(1).T - wanted
        return float((off - off.mean(0)).square().mean())

    assert error(found) < 0.7 * error(fake_quantize_weight(weight))
    # What the simulation and the exporter make of them: nothing, and the same codes.
    torch.testing.assert_close(fake_quantize_weight(found), found, rtol=1e-6, atol=1e-30)
    step = weight.flatten(1).abs().amax(1, keepdim=True) / 127
    exported = np.abs(found.flatten(1).numpy()).max(1, keepdims=True) / 127
    np.testing.assert_allclose(exported, step.numpy(), rtol=1e-6)
    alive = step[:, 0] > 0
    codes = found.flatten(1)[alive] / step[alive]
    assert float((codes - codes.round()).abs().max()) < 1e-4 and float(codes.abs().max()) <= 127.001
    assert float((codes - weight.flatten(1)[alive] / step[alive]).abs().max()) < 1.001
    assert not bool(found[3].any())


def test_zeros_stay_zeros() -> None:
    weight = torch.randn(4, 16)
    weight.view(4, 4, 4)[:, :, :2] = 0
    inputs = correlated(256, 16)
    found = adaptive_rounding(weight, inputs, inputs @ weight.T)
    assert bool((found[weight == 0] == 0).all())


def test_groups_see_their_own_inputs() -> None:
    weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(2))
    inputs = correlated(256, 24)
    wanted = torch.cat([inputs[:, :12] @ weight[:3].T, inputs[:, 12:] @ weight[3:].T], 1)
    found = adaptive_rounding(weight, inputs, wanted, 2)

    def error(rounded: Tensor) -> float:
        off = torch.cat([inputs[:, :12] @ rounded[:3].T, inputs[:, 12:] @ rounded[3:].T], 1) - wanted
        return float((off - off.mean(0)).square().mean())

    assert error(found) < 0.8 * error(fake_quantize_weight(weight))


def test_nearest_is_kept_where_nothing_can_be_learned() -> None:
    weight = torch.randn(4, 8)
    for inputs in (torch.zeros(16, 8), torch.full((16, 8), torch.nan)):
        found = adaptive_rounding(weight, inputs, inputs @ weight.T)
        torch.testing.assert_close(found, fake_quantize_weight(weight))
