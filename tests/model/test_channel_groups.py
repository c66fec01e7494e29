"""Couplings that Torch-Pruning guesses wrong, or does not come to an end with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.importance import score_channels
from autocompress.compress.shapes import network_shape
from autocompress.model.inventory import Inventory, dependency_graph, take_inventory
from autocompress.policy import CompressionPolicy
from tests.networks import randomize


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def inventory(model: nn.Module) -> Inventory:
    torch.manual_seed(0)
    return take_inventory(model, images())


def shuffled(x: Tensor, groups: int = 2) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Shuffle(nn.Module):
    """Reads its channels in another order than they were made in; runs at any even width."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.read, self.fc = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.read(shuffled(self.make(x)))).mean((2, 3)))


def test_a_pruned_model_that_runs_but_mixes_up_channels_is_found_out() -> None:
    found = inventory(Shuffle())
    assert set(found.groups) == {"read"}
    assert "make (channels)" in found.skipped


class ShuffleUnit(nn.Module):
    """A unit of ShuffleNetV2 (Ma et al., 2018): half the channels pass, half are worked on, then all are shuffled."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        half = width // 2
        self.stem = nn.Conv2d(3, width, 1)
        self.squeeze, self.each = nn.Conv2d(half, half, 1), nn.Conv2d(half, half, 3, padding=1, groups=half)
        self.expand, self.fc = nn.Conv2d(half, half, 1), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        passed, worked = self.stem(x).chunk(2, dim=1)
        worked = self.expand(self.each(torch.relu(self.squeeze(worked))))
        return self.fc(shuffled(torch.cat((passed, worked), 1)).mean((2, 3)))


def test_behind_a_shuffle_what_is_coupled_to_nothing_else_can_be_pruned() -> None:
    model = ShuffleUnit().eval()
    found = inventory(model)
    assert found.groups["squeeze"].producers == ("squeeze", "each")
    small = apply_policy(model, CompressionPolicy(pruning={"squeeze": 0.5}), CompressionContext(images()))
    assert small(images()).shape == (2, 5)
    assert small.get_submodule("each").weight.shape[0] == 4  # type: ignore[union-attr]


class Grouped(nn.Module):
    """A block of ResNeXt (Xie et al., 2017) without its shortcut: a convolution in four groups."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.grouped = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 24, 3, groups=4)
        self.after, self.fc = nn.Conv2d(24, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.after(torch.relu(self.grouped(torch.relu(self.before(x))))).mean((2, 3)))


def test_each_group_of_a_grouped_convolution_loses_the_same_places() -> None:
    model = Grouped().eval()
    found = inventory(model)
    assert found.groups["before"].parts == found.groups["grouped"].parts == 4
    assert found.groups["after"].parts == 1
    # Of the four places in a group the second and third are worth least, though single channels there are not.
    scores = torch.tensor([4.0, 3, 0, 9, 4, 1, 2, 9, 4, 0, 4, 9, 4, 3, 0, 9])
    policy = CompressionPolicy(pruning={"before": 0.5, "grouped": 0.5})
    small = apply_policy(model, policy, CompressionContext(images(), {"before": scores}))
    kept = torch.tensor([0, 3, 4, 7, 8, 11, 12, 15])
    assert torch.equal(small.get_parameter("before.weight"), model.before.weight[kept])
    assert small.get_parameter("grouped.weight").shape == (12, 2, 3, 3)
    assert torch.equal(small.get_parameter("grouped.weight"), model.grouped.weight[OUT][:, [0, 3]])
    shape = network_shape(found, policy)
    assert (shape.layers["grouped"].in_channels, shape.layers["grouped"].out_channels) == (8, 12)


# Without scores the last channels of every group of six go.
OUT = torch.tensor([0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20])


class Heads(nn.Module):
    """The heads of a detector (Liu et al., SSD, 2016): maps of two sizes, reshaped to anchors and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.scores = nn.ModuleList(nn.Conv2d(16, 6, 1) for _ in range(2))
        self.boxes = nn.ModuleList(nn.Conv2d(16, 8, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        fine = torch.relu(self.fine(x))
        maps = (fine, torch.relu(self.coarse(fine)))
        heads = []
        for layers, size in ((self.scores, 3), (self.boxes, 4)):
            made = [layer(each).permute(0, 2, 3, 1) for layer, each in zip(layers, maps, strict=True)]
            heads.append(torch.cat([each.reshape(len(x), -1, size) for each in made], 1))
        return torch.cat(heads, -1)


def test_the_maps_before_the_heads_of_a_detector_can_be_pruned() -> None:
    found = inventory(Heads())
    assert {"fine", "coarse"} <= set(found.groups)
    assert not any(name.startswith(("scores", "boxes")) for name in found.groups)


class Branching(nn.Module):
    """Cannot be traced at all."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("not with gradients")
        return self.fc(x.flatten(1))


def test_a_model_that_cannot_be_traced_is_still_scored() -> None:
    model = Branching().eval()
    found = inventory(model)
    assert not found.groups
    assert "not with gradients" in found.skipped["(channels)"]
    assert score_channels(model, images(), found, "magnitude") == {}


class Attention(nn.Module):
    """Holds the width of its heads as a number, as BERT does: only whole heads could go."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(3, 16) for _ in range(3))
        self.out, self.fc = nn.Linear(16, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        query, key, value = (
            layer(tokens).view(len(x), 64, -1, 4).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = (query @ key.transpose(2, 3)).softmax(-1) @ value
        return self.fc(torch.relu(self.out(mixed.transpose(1, 2).reshape(len(x), 64, -1))).mean(1))


def test_channels_of_heads_whose_width_is_fixed_are_left_alone() -> None:
    found = inventory(Attention())
    assert set(found.groups) == {"out"}
    assert "query (channels)" in found.skipped


class Remembering(nn.Module):
    """Keeps what it computed from its weights for the next pass, as LeViT does with its attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.bias = nn.Conv2d(3, 8, 1), nn.Linear(8, 5), nn.Parameter(torch.ones(5))
        self.known: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.known:
            self.known["bias"] = 2 * self.bias
        return self.fc(torch.relu(self.conv(x)).mean((2, 3))) + self.known["bias"]


def test_a_model_that_remembers_traced_tensors_can_still_be_copied() -> None:
    model = Remembering().eval()
    dependency_graph(model, images())
    assert torch.equal(copy.deepcopy(model)(images()), model(images()))
    assert set(inventory(Remembering()).groups) == {"conv"}


class Slopes(nn.Sequential):
    """PReLU with a slope for each channel, and one with a slope for all."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3), nn.PReLU(16), nn.Conv2d(16, 12, 3), nn.PReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(12, 24), nn.PReLU(24), nn.Linear(24, 5),
        )  # fmt: skip


def test_slopes_go_with_their_channels() -> None:
    torch.manual_seed(0)
    model = Slopes().eval()
    slopes = [model.get_submodule(name) for name in ("1", "7")]
    with torch.no_grad():
        for act in slopes:
            assert isinstance(act, nn.PReLU)
            act.weight.uniform_(-0.5, 0.9)
        # Half of the channels are read by nobody: without them the network computes the same.
        for name in ("2", "8"):
            model.get_submodule(name).weight[:, ::2] = 0  # type: ignore[index]
    found = inventory(model)
    assert {name: group.channels for name, group in found.groups.items()} == {"0": 16, "2": 12, "6": 24}
    scores = {"0": (torch.arange(16) % 2).float(), "6": (torch.arange(24) % 2).float()}
    policy = CompressionPolicy(pruning={"0": 0.5, "6": 0.5})
    small = apply_policy(model, policy, CompressionContext(images(), scores))
    assert [len(small.get_submodule(name).weight) for name in ("1", "3", "7")] == [8, 1, 12]  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(small(images()), model(images()))


class GroupNormed(nn.Module):
    """Convolutions behind group norms of different numbers of groups, one of them behind a concatenation."""

    def __init__(self, groups: int = 4) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(8, 16)
        self.body, self.n1 = nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.left, self.right = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
        self.both, self.last = nn.GroupNorm(groups, 16), nn.Conv2d(16, 12, 1)
        self.single, self.end = nn.InstanceNorm2d(12, affine=True), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n0(self.stem(x)).relu()
        x = x + self.n1(self.body(x)).relu()
        x = self.both(torch.cat([self.left(x), self.right(x)], 1)).relu()
        return self.end(self.single(self.last(x)).relu().mean((2, 3)))


def test_only_widths_that_a_group_norm_takes_are_left() -> None:
    model = randomize(GroupNormed())
    found = inventory(model)
    # The sum of both joins 8 and 4 groups: 8 parts of 2 channels.
    assert {name: (group.channels, group.parts) for name, group in found.groups.items()} == {
        "stem": (16, 8),
        "last": (12, 1),
    }
    assert "both normalises its channels in groups together" in found.skipped["left (channels)"]
    for ratio in (0.1, 0.3, 0.5, 0.9):
        policy = CompressionPolicy(pruning={"stem": ratio, "last": ratio})
        pruned = apply_policy(model, policy, CompressionContext(images()))
        assert pruned(images()).shape == (2, 4)
        assert pruned.get_submodule("n0").weight.numel() % 8 == 0


def test_one_group_over_all_channels_may_be_thinned_anyhow() -> None:
    found = inventory(randomize(GroupNormed(groups=1)))
    assert found.groups["left"].parts == found.groups["right"].parts == 1
