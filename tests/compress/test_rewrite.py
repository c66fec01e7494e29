"""Option-A shortcuts as convolutions: the same function, with channels that can be pruned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autocompress.compress import rewrite
from autocompress.tasks.cifar_models import CIFAR_MODELS, OptionAShortcut
from tests import networks


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 8, 2), (4, 7, 1), (3, 3, 2)])
def test_a_shortcut_computes_exactly_the_same(inputs: int, outputs: int, stride: int) -> None:
    shortcut = nn.Sequential(OptionAShortcut(inputs, outputs, stride))
    written = rewrite(shortcut)
    assert isinstance(written[0], nn.Conv2d)
    x = torch.randn(2, inputs, 7, 7)
    with torch.no_grad():
        assert torch.equal(written(x), shortcut(x))


def test_resnet20_computes_the_same_and_has_no_padded_shortcut_left() -> None:
    model = networks.randomize(CIFAR_MODELS["resnet20"]())
    before, x = networks.state(model), networks.images(2, 32)
    written = rewrite(model)
    with torch.no_grad():
        torch.testing.assert_close(written(x), model(x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(m, OptionAShortcut) for m in written.modules())
    assert sum(isinstance(m, OptionAShortcut) for m in model.modules()) == 2
    assert networks.same_state(model, before)
    assert not written.training


def test_other_models_are_copied_as_they_are() -> None:
    model = networks.Plain().train()
    written = rewrite(model)
    assert written is not model
    assert networks.same_state(written, networks.state(model))
    assert model.training
