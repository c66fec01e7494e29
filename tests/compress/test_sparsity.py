"""2:4 sparsity by hand-computed examples, on networks whose outputs must not move, and through fine-tuning."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from autocompress.compress import CompressionContext, apply_policy, rewrite
from autocompress.compress import sparsity as module
from autocompress.compress.quantization import QuantConv2d
from autocompress.compress.sparsity import better_order, keep_zeros, mask_2_4
from autocompress.policy import CompressionPolicy, LayerPolicy
from tests import networks


def sparse(*names: str, **changes: object) -> CompressionPolicy:
    return CompressionPolicy(layers={name: LayerPolicy(sparsity="2:4", **changes) for name in names})  # type: ignore[arg-type]


def is_2_4(weight: torch.Tensor) -> bool:
    rows = weight.detach().movedim(1, -1)
    return bool(((rows.unflatten(-1, (-1, 4)) != 0).sum(-1) <= 2).all())


def test_the_larger_two_of_every_four_input_channels_stay() -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 4.0, 4.0, 0.0, -5.0], [0.1, 0.2, 0.3, 0.4, -9.0, 8.0, 7.0, -6.0]])
    expected = [[0, 1, 1, 0, 1, 0, 0, 1], [0, 0, 1, 1, 1, 1, 0, 0]]
    found = mask_2_4(weight)
    # Of two that are equal, either.
    assert found[1].tolist() == expected[1] and found[0, :4].tolist() == expected[0][:4]
    assert found[0, 4:].sum() == 2 and found[0, 7] == 1 and found[0, 6] == 0
    # A kernel's taps are on their own; two of a last three stay.
    taps = torch.zeros(1, 7, 1, 2)
    taps[0, :, 0, 0], taps[0, :, 0, 1] = torch.arange(1.0, 8.0), torch.arange(7.0, 0.0, -1.0)
    kept = mask_2_4(taps)
    assert kept[0, :, 0, 0].tolist() == [0, 0, 1, 1, 0, 1, 1]
    assert kept[0, :, 0, 1].tolist() == [1, 1, 0, 0, 1, 1, 0]


def test_an_order_that_loses_nothing_is_found() -> None:
    # Large channels stand four together; two to a four, nothing large is lost.
    rows = np.tile([1.0, 1.0, 1.0, 1.0, 0.01, 0.01, 0.01, 0.01] * 2, (6, 1))
    order = better_order(rows)
    assert order is not None and sorted(order) == list(range(16))
    kept = np.sort(rows[:, order].reshape(6, 4, 4), axis=2)[..., 2:].sum()
    assert kept == pytest.approx(rows[:, rows[0] == 1].sum())
    assert better_order(rows) == order
    assert better_order(np.ones((4, 16))) is None and better_order(np.ones((4, 6))) is None


def test_reordering_leaves_the_outputs_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    base = rewrite(networks.randomize(networks.Residual(32)))
    inputs = networks.images(4, 16)
    context = CompressionContext(inputs)
    monkeypatch.setattr(module, "mask_2_4", torch.ones_like)
    names = ("same.conv1", "same.conv2", "wider.conv1", "wider.conv2")
    moved = apply_policy(base, sparse(*names), context)
    changed = [n for n in names if not torch.equal(moved.get_submodule(n).weight, base.get_submodule(n).weight)]
    assert changed
    with torch.no_grad():
        torch.testing.assert_close(moved(inputs), base(inputs), rtol=1e-4, atol=1e-5)


def test_reordering_keeps_more_than_the_given_order() -> None:
    base = rewrite(networks.randomize(networks.Residual(32)))
    policy = sparse("same.conv2")
    found = apply_policy(base, policy, CompressionContext(networks.images(2, 16)))
    weight = base.get_submodule("same.conv2").weight
    assert isinstance(weight, torch.Tensor)
    made = found.get_submodule("same.conv2").weight
    assert isinstance(made, torch.Tensor)
    assert float(made.detach().abs().sum()) > float((weight * mask_2_4(weight)).detach().abs().sum())


def test_sparse_with_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    base = rewrite(networks.randomize(networks.Residual(32)))
    before = copy.deepcopy(base.state_dict())
    policy = CompressionPolicy(
        pruning={"stem": 0.25},
        layers={
            "same.conv1": LayerPolicy("int8", sparsity="2:4"),
            "wider.conv2": LayerPolicy(rank_ratio=0.5, sparsity="2:4"),
        },
    )
    found = apply_policy(base, policy, CompressionContext(networks.images(2, 16)))
    first, factors = found.get_submodule("same.conv1"), found.get_submodule("wider.conv2")
    assert isinstance(first, QuantConv2d) and isinstance(factors, nn.Sequential)
    assert is_2_4(first.weight) and 0.4 < float((first.weight == 0).float().mean()) <= 0.5
    assert all(is_2_4(factor.weight) for factor in factors if factor.weight.shape[1] >= module.LEAST_CHANNELS)  # type: ignore[operator,union-attr,arg-type,index]
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


def test_training_keeps_the_zeros() -> None:
    base = rewrite(networks.randomize(networks.Residual(32)))
    model = apply_policy(base, sparse("same.conv1"), CompressionContext(networks.images(2, 16)))
    weight = model.get_submodule("same.conv1").weight
    assert isinstance(weight, torch.Tensor)
    zeros = weight == 0
    before = weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    keep_zeros(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(networks.images(8, 16)).square().mean().backward()
        optimizer.step()
    assert torch.equal(weight == 0, zeros) and not torch.equal(weight, before)


def test_policies_that_say_nothing_of_sparsity_hash_as_before() -> None:
    old = CompressionPolicy("bf16", {"g": 0.5}, {"c": LayerPolicy("int8", 0.5)})
    assert old.to_dict()["layers"] == {"c": {"dtype": "int8", "rank_ratio": 0.5}}
    new = CompressionPolicy("bf16", {"g": 0.5}, {"c": LayerPolicy("int8", 0.5, "2:4")})
    assert new.hash != old.hash and CompressionPolicy.from_dict(new.to_dict()) == new
    assert new.sparse_layers == ("c",) and "2:4 1l" in new.describe()
