"""Unstructured sparsity: which weights go, that they stay away in training, and how sparsity rises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autocompress.errors import CompressionError, ConfigError
from autocompress.storage.sparsity import bake, gradual_sparsity, magnitude_masks, masked_weights, prunable, set_masks

WEIGHTS = {"a": torch.tensor([[1.0, -4.0], [3.0, -2.0]]), "b": torch.tensor([[10.0, -9.0, 0.5, 8.0]])}


def kept(*arguments: object, **options: object) -> dict[str, list[float]]:
    masks = magnitude_masks(WEIGHTS, *arguments, **options)  # type: ignore[arg-type]
    return {name: WEIGHTS[name][mask].tolist() for name, mask in masks.items()}


def test_per_layer_each_loses_its_smallest() -> None:
    assert kept(0.5) == {"a": [-4.0, 3.0], "b": [10.0, -9.0]}
    assert kept({"b": 0.25}) == {"b": [10.0, -9.0, 8.0]}
    assert kept(0.0) == {name: weight.flatten().tolist() for name, weight in WEIGHTS.items()}


def test_globally_one_threshold_decides() -> None:
    # Of eight, the four smallest are 0.5, 1, 2 and 3.
    assert kept(0.5, scope="global") == {"a": [-4.0], "b": [10.0, -9.0, 8.0]}


def test_of_equals_exactly_as_many_go_as_asked() -> None:
    assert int(magnitude_masks({"x": torch.ones(5, 2)}, 0.3)["x"].sum()) == 7


@pytest.mark.parametrize(
    ("sparsity", "scope", "error", "said"),
    [
        (1.0, "layer", ConfigError, r"\[0, 1\)"),
        (-0.1, "global", ConfigError, r"\[0, 1\)"),
        (0.5, "network", ConfigError, "Available: global, layer"),
        ({"c": 0.5}, "layer", ConfigError, "'c'"),
        ({"a": 0.5}, "global", ConfigError, "exclude each other"),
        (0.9, "layer", CompressionError, "no weight"),
        (0.75, "global", CompressionError, "'a'.*scope 'layer'"),
    ],
)
def test_what_cannot_be(sparsity: object, scope: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        magnitude_masks(WEIGHTS, sparsity, scope)  # type: ignore[arg-type]


def test_nan_has_no_order() -> None:
    with pytest.raises(CompressionError, match="'x' holds NaN"):
        magnitude_masks({"x": torch.tensor([1.0, float("nan")])}, 0.5)


def test_matrices_of_floats_are_worth_it() -> None:
    state = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)).state_dict()
    assert list(prunable(state)) == ["0.weight", "3.weight"]


def test_sparsity_rises_steeply_at_first() -> None:
    assert [gradual_sparsity(p, 0.8) for p in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([0.0, 0.7, 0.8, 0.8])
    assert gradual_sparsity(0.5, 0.9, 0.5) == pytest.approx(0.85)  # 0.9 - 0.4 / 8


# -- training -----------------------------------------------------------------------------------------------------


def stepped(model: nn.Module, steps: int = 5) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(2))
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()


def test_removed_weights_stay_away_and_others_train() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    masks = magnitude_masks({"weight": before}, 0.5)
    set_masks(model, masks)
    stepped(model)
    bake(model)
    assert isinstance(model.weight, nn.Parameter)
    assert torch.equal(model.weight != 0, masks["weight"])
    assert not torch.equal(model.weight[masks["weight"]], before[masks["weight"]])


def test_sparsity_can_be_raised_in_training() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    set_masks(model, magnitude_masks({"weight": model.weight}, 0.25))
    stepped(model, 1)
    held = masked_weights(model)
    assert list(held) == ["weight"]
    set_masks(model, magnitude_masks(held, 0.75))
    bake(model)
    assert int((model.weight != 0).sum()) == 3


def test_masks_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"\(2, 2\).*\(3, 4\)"):
        set_masks(nn.Linear(4, 3), {"weight": torch.ones(2, 2)})
    with pytest.raises(ConfigError, match="Did you mean 'weight'"):
        set_masks(nn.Linear(4, 3), {"weigth": torch.ones(3, 4)})
