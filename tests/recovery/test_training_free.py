"""A compressed network that tells its inputs apart no more is no candidate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from autocompress.compress import rewrite
from autocompress.errors import CompressionError
from autocompress.model.inventory import take_inventory
from autocompress.policy import CompressionPolicy
from autocompress.recovery import TrainingFreeCompressor, training_free
from tests import networks

POLICY = CompressionPolicy(pruning={"stem": 0.5})


def made(model: nn.Module) -> TrainingFreeCompressor:
    inputs = networks.images(48, 16)
    base = rewrite(model.eval())
    return TrainingFreeCompressor(base, take_inventory(base, inputs[:2]), {}, inputs[:2], [inputs])


@pytest.mark.parametrize(("value", "said"), [(0.0, "same outputs for every sample"), (math.nan, "NaN or infinite")])
def test_features_that_have_become_zero_or_nan_are_refused(
    value: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = made(networks.randomize(networks.Residual()))
    assert found.model(POLICY) is not None
    real = training_free.apply_policy

    def broken(*given: object) -> nn.Module:
        model = real(*given)  # type: ignore[arg-type]
        with torch.no_grad():
            model.get_submodule("fc").weight.fill_(value)  # type: ignore[operator]
        return model

    monkeypatch.setattr(training_free, "apply_policy", broken)
    monkeypatch.setattr(training_free.Reconstruction, "apply", lambda *_: 0)
    with pytest.raises(CompressionError, match=said):
        found.model(POLICY)


def test_a_network_that_says_one_thing_to_everything_is_taken_as_it_is() -> None:
    model = networks.randomize(networks.Residual())
    with torch.no_grad():
        model.fc.weight.zero_()
    assert made(model).model(POLICY) is not None
