"""Batch-norm statistics estimated anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autocompress.recovery import fast_dtype, recalibrate
from autocompress.recovery.recalibration import following
from tests import networks


def test_statistics_by_hand() -> None:
    norm = nn.BatchNorm1d(2, momentum=0.3)
    first, second = torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([[4.0, 0.0], [4.0, 4.0]])
    recalibrate(norm, [first, second])
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, torch.tensor([2.5, 1.5]))
    # The mean of the batches' unbiased variances: 2 and 0, 0 and 8.
    torch.testing.assert_close(norm.running_var, torch.tensor([1.0, 4.0]))
    assert norm.momentum == 0.3
    assert not norm.training


def test_broken_statistics_are_restored() -> None:
    model, batches = networks.randomize(networks.Residual()), [networks.images(32, seed=i) for i in range(3)]
    recalibrate(model, batches)
    wanted = networks.state(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.fill_(50)
        norm.running_var.fill_(1e-4)
    recalibrate(model, iter(batches))
    assert networks.same_state(model, wanted)


def test_weights_stay_and_only_batch_norm_trains_meanwhile() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.9), nn.BatchNorm2d(4)).eval()
    before = networks.state(model)
    recalibrate(model, [networks.images(16)])
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"2.running_mean", "2.running_var", "2.num_batches_tracked"}
    with torch.no_grad():
        # Dropout was off: these are the statistics of the convolution's own outputs.
        torch.testing.assert_close(after["2.running_mean"], model[0](networks.images(16)).mean((0, 2, 3)))


def test_models_without_batch_norm_read_no_data() -> None:
    recalibrate(networks.Tokens(), iter(int, 1))  # type: ignore[arg-type]


def test_the_momentum_comes_back_after_an_error() -> None:
    norm = nn.BatchNorm1d(2, momentum=0.3)
    try:
        recalibrate(norm, [torch.zeros(4, 5)])
    except RuntimeError:
        pass
    else:
        raise AssertionError
    assert norm.momentum == 0.3
    assert not norm.training


def test_fast_dtype_is_one_that_autocast_takes() -> None:
    assert fast_dtype() in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("came_with", "follows_by"), [(None, 0.1), (0.0, 0.1), (0.01, 0.1), (0.3, 0.3)])
def test_statistics_follow_training_whatever_momentum_a_network_came_with(
    came_with: float | None, follows_by: float
) -> None:
    norm = nn.BatchNorm1d(1, momentum=came_with)
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.fill_(100_000)
    with following(norm):
        norm(torch.tensor([[10.0], [30.0]]))
    torch.testing.assert_close(norm.running_mean, torch.tensor([20 * follows_by]))
    assert norm.momentum == came_with
