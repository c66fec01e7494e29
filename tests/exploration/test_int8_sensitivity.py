"""What int8 does in each layer: attributed in one pass, measured by switching layers, and the harmful ones found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.quantization import calibrate
from autocompress.exploration.int8_sensitivity import Int8Sensitivity, harmful
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.tasks.divergence import ClassScores

LAYERS = ("0", "2", "4", "6")


def network(outlier: str | None = "2") -> tuple[nn.Module, Tensor]:
    """Four layers, one of which is given a value far from all others: what it is given loses all its digits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8)
    ).eval()
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight *= 3
    if outlier is not None:
        before = model[int(outlier) - 2]
        assert isinstance(before, nn.Linear)
        layer = model.get_submodule(outlier)
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            before.bias[0] += 300.0
            layer.bias -= 300.0 * layer.weight[:, 0]
    return model, torch.randn(96, 16)


def sensitivity(outlier: str | None = "2") -> tuple[Int8Sensitivity, nn.Module, Tensor]:
    model, inputs = network(outlier)
    policy = CompressionPolicy(layers=dict.fromkeys(LAYERS, LayerPolicy("int8")))
    made = apply_policy(model, policy, CompressionContext(inputs[:2]))
    calibrate(made, [inputs])
    return Int8Sensitivity(made, LAYERS, inputs, ClassScores()), made, inputs


def test_the_layer_that_int8_ruins_has_most_of_it_attributed_without_measuring_it_alone() -> None:
    found, _, _ = sensitivity()
    parts = found.attributed()
    assert sum(parts.values()) == pytest.approx(found.together())
    assert max(parts, key=parts.__getitem__) == "2" and parts["2"] > 0.5 * sum(parts.values())
    alone = {name: found.alone(name) for name in LAYERS}
    assert max(alone, key=alone.__getitem__) == "2"
    assert found.without(["2"]) < 0.5 * found.together()


def test_switching_layers_leaves_the_network_as_it_was() -> None:
    found, made, inputs = sensitivity()
    with torch.no_grad():
        before = made(inputs)
    found.attributed()
    found.alone("0")
    with torch.no_grad():
        assert torch.equal(made(inputs), before)
    assert all(parameter.grad is None for parameter in made.parameters())


def test_all_but_none_is_all_together_and_all_but_all_is_nothing() -> None:
    found, _, _ = sensitivity(None)
    assert found.without(()) == found.together() > 0
    assert found.without(LAYERS) == pytest.approx(0, abs=1e-4)


def test_token_ids_need_no_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 16), nn.Flatten(), nn.Linear(64, 8)).eval()
    ids = torch.randint(20, (40, 4))
    made = apply_policy(model, CompressionPolicy(layers={"2": LayerPolicy("int8")}), CompressionContext(ids[:2]))
    calibrate(made, [ids])
    found = Int8Sensitivity(made, ["2"], ids, ClassScores())
    assert found.attributed()["2"] == pytest.approx(found.together())


def test_as_few_layers_as_needed_are_left_out_the_worst_first() -> None:
    found, _, _ = sensitivity()
    parts = found.attributed()
    assert harmful(found, parts, 0.5 * found.together()) == ("2",)
    # Where nothing is enough, as many as may go.
    assert len(harmful(found, parts, 0.0)) == 2
