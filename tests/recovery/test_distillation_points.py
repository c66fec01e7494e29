"""Where two networks are compared: chosen alike for every network, or named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autocompress.errors import CompressionError, ConfigError
from autocompress.recovery.distillation_points import Place, choose_places, observed
from autocompress.tasks.cifar_models import CIFAR_MODELS
from tests import networks

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def names(places: tuple[Place, ...]) -> list[str]:
    return [str(place) for place in places]


class Block(nn.Module):
    """A pre-norm encoder layer without attention, tokens ``(N, T, C)`` to tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Tokens(nn.Module):
    def __init__(self, width: int = 8, blocks: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x).flatten(2).movedim(1, 2)).mean(1))


def test_ends_of_stages_and_what_is_farthest_from_them() -> None:
    teacher, student = CIFAR_MODELS["resnet56"]().eval(), CIFAR_MODELS["resnet20"]().eval()
    found = choose_places(teacher, student, IMAGES)
    assert names(found) == ["layer1.2", "layer1", "layer2", "layer3"]
    assert [place.positions for place in found] == [(32, 32), (32, 32), (16, 16), (8, 8)]
    vgg = CIFAR_MODELS["vgg11_bn"]().eval()
    # Activation functions that write in place: what they overwrite is no place, what they give is.
    assert names(choose_places(vgg, vgg, IMAGES)) == ["features.6", "features.13", "features.20", "features.27"]
    assert choose_places(vgg, student, IMAGES) == ()


def test_a_removed_block_is_still_a_place() -> None:
    teacher, student = CIFAR_MODELS["resnet20"]().eval(), CIFAR_MODELS["resnet20"]().eval()
    student.get_submodule("layer1")[0] = nn.Identity()  # type: ignore[operator]
    found = choose_places(teacher, student, IMAGES)
    assert names(found) == ["layer1.0", "layer1", "layer2", "layer3"]


def test_blocks_of_tokens_spread_over_the_depth() -> None:
    found = choose_places(Tokens().eval(), Tokens(6).eval(), IMAGES)
    assert names(found)[-1] == "blocks" and len(found) == 4
    assert {place.axis for place in found} == {2} and {place.positions for place in found} == {(16,)}
    assert [(place.teacher_channels, place.student_channels) for place in found] == [(8, 6)] * 4
    assert all(name.startswith("blocks.") and name.count(".") == 1 for name in names(found)[:-1])
    assert found[0].rows(torch.zeros(2, 16, 8)).shape == (2, 16, 8)


def test_without_positions_vectors_are_places() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) if i % 2 == 0 else nn.Tanh() for i in range(9))).eval()
    found = choose_places(model, model, torch.randn(2, 4))
    assert len(found) == 4 and {place.positions for place in found} == {()}
    assert "8" not in names(found)  # the output


def test_a_module_that_runs_twice_is_no_place() -> None:
    block = networks.randomize(networks.BasicBlock(3, 3))
    found = names(choose_places(block, block, networks.images()))
    # Its ReLU runs twice, and what bn1 and bn2 give is overwritten.
    assert set(found) == {"conv1", "conv2"}


def test_pairs_as_they_are_named() -> None:
    teacher, student = CIFAR_MODELS["vgg11_bn"]().eval(), CIFAR_MODELS["resnet20"]().eval()
    (found,) = choose_places(teacher, student, IMAGES, {"features.10": "layer3"})
    assert found == Place("features.10", "layer3", 1, 256, 64, (8, 8)) and str(found) == "features.10:layer3"


@pytest.mark.parametrize(
    ("pair", "kind", "said"),
    [
        (("layer4", "layer3"), ConfigError, "the teacher has no module 'layer4'. Did you mean 'layer"),
        (("layer3", "layr3"), CompressionError, "the student has no module 'layr3'. Did you mean 'layer3'?"),
        (
            ("layer3", "layer2"),
            CompressionError,
            r"\(2, 64, 8, 8\) and 'layer2' of the student \(2, 32, 16, 16\)",
        ),
        (("linear", "linear"), ConfigError, "'linear' of the teacher cannot be compared"),
    ],
    ids=str,
)
def test_pairs_that_cannot_be(pair: tuple[str, str], kind: type[Exception], said: str) -> None:
    model = CIFAR_MODELS["resnet20"]().eval()
    with pytest.raises(kind, match=said):
        choose_places(model, model, IMAGES, dict([pair]))


def test_nothing_stays_on_a_model_that_was_observed() -> None:
    model = networks.randomize(networks.Plain())
    with pytest.raises(RuntimeError), observed(model, ["conv1", "conv1"]) as seen:
        model(networks.images())
        assert seen["conv1"].shape == (2, 8, 8, 8)
        raise RuntimeError
    assert not any(m._forward_hooks for m in model.modules())
