from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from autocompress.tasks import OptionAShortcut
from autocompress.tasks.cifar_models import CIFAR_MODELS

# Published sizes: He et al. table 6 (in millions: 0.27, 0.46, 0.66, 0.85), and torchvision's features for VGG-11.
PARAMETERS = {"resnet20": 269_722, "resnet32": 464_154, "resnet44": 658_586, "resnet56": 853_018, "vgg11_bn": 9_231_114}


@pytest.mark.parametrize("name", CIFAR_MODELS)
def test_models_have_their_published_size_and_can_be_traced(name: str) -> None:
    model = CIFAR_MODELS[name]().eval()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    inputs = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model(inputs)
        assert expected.shape == (2, 10)
        torch.testing.assert_close(fx.symbolic_trace(model)(inputs), expected)


def test_state_dict_names_are_the_usual_ones() -> None:
    names = set(CIFAR_MODELS["resnet20"]().state_dict())
    blocks = [f"layer{stage}.{block}." for stage in (1, 2, 3) for block in (0, 1, 2)]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert names == {
        "linear.weight",
        "linear.bias",
        *(
            f"{prefix}conv{i}.weight"
            for prefix, count in [("", 1), *((b, 2) for b in blocks)]
            for i in range(1, count + 1)
        ),
        *(
            f"{p}bn{i}.{n}"
            for p, count in [("", 1), *((b, 2) for b in blocks)]
            for i in range(1, count + 1)
            for n in norm
        ),
    }
    vgg = CIFAR_MODELS["vgg11_bn"]()
    convolutions = [name for name, module in vgg.named_modules() if isinstance(module, nn.Conv2d)]
    assert convolutions == [f"features.{i}" for i in (0, 4, 8, 11, 15, 18, 22, 25)]
    assert vgg.state_dict()["classifier.weight"].shape == (10, 512)


def test_vgg_features_are_torchvisions() -> None:
    models = pytest.importorskip("torchvision.models")
    ours, theirs = CIFAR_MODELS["vgg11_bn"]().eval(), models.vgg11_bn(num_classes=10).eval()
    ours.features.load_state_dict(theirs.features.state_dict())
    inputs = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours.features(inputs), theirs.features(inputs))


def test_only_blocks_that_change_shape_have_a_shortcut_of_their_own() -> None:
    model = CIFAR_MODELS["resnet32"]()
    shortcuts = {name: type(m) for name, m in model.named_modules() if name.endswith("shortcut")}
    assert {n for n, kind in shortcuts.items() if kind is OptionAShortcut} == {"layer2.0.shortcut", "layer3.0.shortcut"}
    assert set(shortcuts.values()) == {OptionAShortcut, nn.Identity}
    assert not list(OptionAShortcut(16, 32, 2).parameters())
    assert not OptionAShortcut(16, 32, 2).state_dict()


def test_the_shortcut_takes_every_second_pixel_between_zeros() -> None:
    x = torch.randn(2, 16, 8, 8)
    y = OptionAShortcut(16, 32, 2)(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_a_block_is_two_convolutions_and_a_shortcut() -> None:
    block = CIFAR_MODELS["resnet20"]().layer2[0].eval()  # type: ignore[index, union-attr]
    x = torch.randn(2, 16, 8, 8)
    with torch.inference_mode():
        inner = block.bn2(block.conv2(functional.relu(block.bn1(block.conv1(x)))))
        torch.testing.assert_close(block(x), functional.relu(inner + block.shortcut(x)))
