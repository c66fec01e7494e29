"""What is found in small networks whose layers, couplings and blocks are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress.compress import rewrite
from autocompress.errors import CompressionError
from autocompress.model.inventory import Inventory, count_macs, take_inventory
from autocompress.model.module_times import time_shares
from autocompress.tasks.cifar_models import CIFAR_MODELS
from tests import networks
from tests.networks import Concat, Mobile, Plain, Residual, Tokens, images


@pytest.fixture(scope="module")
def residual() -> Inventory:
    return take_inventory(Residual(), images())


@pytest.fixture(scope="module")
def mobile() -> Inventory:
    return take_inventory(Mobile(), images())


class Wrapped(nn.Module):
    """One module between a stem and a head."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.stem, self.inner, self.fc = nn.Conv2d(3, 8, 1), inner, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner(self.stem(x)).mean((2, 3)))


# -- layers -----------------------------------------------------------------------------------------------------------


def test_layers_macs_and_params_by_hand() -> None:
    found = take_inventory(Plain(), images(size=8))
    conv1, conv2, fc = found.layers.values()
    assert (conv1.name, conv1.kind, conv1.in_channels, conv1.out_channels, conv1.kernel) == (
        "conv1",
        "conv",
        3,
        8,
        (3, 3),
    )
    assert (fc.name, fc.kind, fc.in_channels, fc.out_channels, fc.kernel) == ("fc", "linear", 16, 5, ())
    assert conv1.macs == 8 * 8 * 8 * (3 * 9)
    assert conv2.macs == 4 * 4 * 16 * (8 * 9)
    assert fc.macs == 16 * 5
    assert (conv1.params, conv2.params, fc.params) == (3 * 8 * 9, 8 * 16 * 9 + 16, 16 * 5 + 5)
    assert found.macs == conv1.macs + conv2.macs + fc.macs
    assert found.params == conv1.params + 2 * 8 + conv2.params + fc.params


def test_macs_are_of_one_sample_and_count_every_position() -> None:
    model = Tokens()
    assert count_macs(model, images(4)) == count_macs(model, images(1)) == {"first": 12 * 16 * 8, "fc": 8 * 5}


def test_macs_of_grouped_strided_and_reused_layers() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4), nn.ReLU())
    assert count_macs(model, torch.zeros(1, 4, 8, 8)) == {"0": 4 * 4 * 8 * 9}
    layer = nn.Linear(6, 6)
    assert count_macs(nn.Sequential(layer, layer), torch.zeros(1, 6)) == {"0": 2 * 36}


def test_macs_leave_no_hooks_behind() -> None:
    model = Plain()
    with pytest.raises(RuntimeError):
        count_macs(model, torch.zeros(1, 5, 8, 8))
    assert not any(module._forward_hooks for module in model.modules())


def test_kinds_and_what_can_be_factorized(mobile: Inventory) -> None:
    kinds = {name: (layer.kind, layer.factorizable) for name, layer in mobile.layers.items()}
    assert kinds["stem"] == ("conv", True)
    assert kinds["features.0.conv.0"] == ("pointwise", True)
    assert kinds["features.0.conv.3"] == ("depthwise", False)
    assert kinds["fc"] == ("linear", True)
    grouped = take_inventory(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2)), images())
    assert (grouped.layers["1"].kind, grouped.layers["1"].factorizable) == ("grouped", False)


def test_the_model_is_not_changed() -> None:
    model = Residual().train()
    before = networks.state(model)
    model.stem.weight.requires_grad_(False)
    take_inventory(model, images())
    assert networks.same_state(model, before)
    assert model.training
    assert not model.stem.weight.requires_grad
    assert model.fc.weight.requires_grad


# -- what is left alone -----------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A layer never run, one that shares its weight, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.two.weight = self.one.weight
        self.up = nn.ConvTranspose2d(3, 8, 2, stride=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.up(self.two(self.one(x))).mean((2, 3)))


def test_what_is_skipped_says_why() -> None:
    found = take_inventory(Odd(), images())
    assert set(found.layers) == {"one", "fc"}
    assert found.skipped["unused"] == "not reached by the forward pass"
    assert found.skipped["two"] == "shares its weight with one"
    assert found.skipped["one (int8, low rank)"] == "its weight is that of two too"
    assert not found.layers["one"].quantizable
    assert not found.layers["one"].factorizable
    assert "ConvTranspose2d" in found.skipped["up"]
    assert not found.groups
    assert "output" in found.skipped["fc (channels)"]


class Reshaping(nn.Module):
    """Holds its width as a number, so pruning its first layer breaks it."""

    def __init__(self) -> None:
        super().__init__()
        self.broken, self.fine, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.broken(x)
        x = functional.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2)
        return self.fc(self.fine(x).mean((2, 3)))


def test_a_layer_that_reads_a_table_and_not_the_input_is_left_alone() -> None:
    class Biased(nn.Module):
        """As a Swin V2: a small network makes a bias of positions."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.rand(16, 2))
            self.inner, self.outer = nn.Linear(2, 8), nn.Linear(8, 16)
            self.fc = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x + self.outer(functional.relu(self.inner(self.table))).mean(0))

    found = take_inventory(Biased(), torch.randn(2, 16))
    assert set(found.layers) == {"fc"} and set(found.groups) == set()
    assert all("the same for every input" in found.skipped[name] for name in ("inner", "outer"))
    # Two equal ones tell as well, one does not.
    assert "inner" in take_inventory(Biased(), torch.ones(2, 16)).skipped
    assert "inner" in take_inventory(Biased(), torch.randn(1, 16)).layers


def test_a_layer_that_reads_one_table_for_each_sample_is_left_alone() -> None:
    class Embedded(nn.Module):
        """As an EdgeNeXt: positions, repeated for each sample, go through a convolution of their own."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.positions, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(2, 8, 1), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            table = torch.linspace(0, 1, 2 * 4 * 4).reshape(1, 2, 4, 4).expand(len(x), 2, 4, 4)
            # By keyword, as layers may be called.
            return self.fc(input=(self.conv(x) + self.positions(table)).relu().mean((2, 3)))

    found = take_inventory(Embedded(), torch.randn(2, 3, 4, 4))
    assert set(found.layers) == {"conv", "fc"} and "the same for every input" in found.skipped["positions"]
    # Equal samples tell nothing, and neither does a layer that reads zeros.
    assert "positions" in take_inventory(Embedded(), torch.ones(2, 3, 4, 4)).layers
    dead = Embedded()
    with torch.no_grad():
        dead.conv.weight.zero_()
        dead.conv.bias.fill_(-9.0)
        dead.positions.weight.zero_()
        dead.positions.bias.zero_()
    assert "fc" in take_inventory(dead, torch.randn(2, 3, 4, 4)).layers


def test_a_group_whose_pruning_breaks_the_model_is_left_alone_and_named() -> None:
    found = take_inventory(Reshaping(), images())
    assert set(found.groups) == {"fine"}
    assert "pruning it breaks the model" in found.skipped["broken (channels)"]


def test_channels_of_the_output_are_not_a_group() -> None:
    found = take_inventory(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)), images())
    assert set(found.groups) == {"0"}
    assert found.skipped == {"1 (channels)": "its channels are the model's output"}


def test_a_model_that_does_not_run_or_gives_several_tensors() -> None:
    with pytest.raises(CompressionError, match=r"\(2, 5, 8, 8\)"):
        take_inventory(Plain(), torch.zeros(2, 5, 8, 8))

    class Two(Plain):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return x, x

    with pytest.raises(CompressionError, match="tuple"):
        take_inventory(Two(), images())


# -- coupled channels -------------------------------------------------------------------------------------------------


def test_groups_through_residuals(residual: Inventory) -> None:
    stream, inner = residual.groups["stem"], residual.groups["same.conv1"]
    assert stream.producers == ("stem", "same.conv2")
    assert stream.consumers == ("same.conv1", "wider.conv1", "wider.downsample.0")
    assert stream.channels == 8
    assert (inner.producers, inner.consumers) == (("same.conv1",), ("same.conv2",))
    wide = residual.groups["wider.conv2"]
    assert set(wide.producers) == {"wider.conv2", "wider.downsample.0"}
    assert (wide.channels, wide.consumers) == (16, ("fc",))
    assert set(residual.groups) == {"stem", "same.conv1", "wider.conv1", "wider.conv2"}


def test_groups_through_concatenation() -> None:
    found = take_inventory(Concat(), images())
    assert {name: (group.channels, group.consumers) for name, group in found.groups.items()} == {
        "left": (4, ("join",)),
        "right": (8, ("join",)),
        "join": (16, ("fc",)),
    }


def test_groups_through_depthwise(mobile: Inventory) -> None:
    group = mobile.groups["features.0.conv.0"]
    assert group.producers == ("features.0.conv.0", "features.0.conv.3")
    assert group.consumers == ("features.0.conv.6",)
    assert mobile.groups["stem"].producers == ("stem", "features.0.conv.6", "features.1.conv.6")


def test_a_layer_that_reads_and_feeds_one_axis_is_both() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x)

    group = take_inventory(Wrapped(Both()), images()).groups["stem"]
    assert group.producers == ("stem", "inner.conv")
    assert group.consumers == ("inner.conv", "fc")


def test_resnet20_streams_are_groups_once_rewritten() -> None:
    torch.manual_seed(0)
    found = take_inventory(rewrite(CIFAR_MODELS["resnet20"]()), images(size=32))
    assert set(found.groups["conv1"].producers) == {"conv1", *(f"layer1.{i}.conv2" for i in range(3))}
    # Torch-Pruning's own order decides which of the two that start a stream comes first; both are in it.
    for stage, width in (("layer2", 32), ("layer3", 64)):
        (stream,) = (group for group in found.groups.values() if f"{stage}.0.shortcut" in group.producers)
        assert stream.channels == width
        assert set(stream.producers) == {f"{stage}.0.shortcut", *(f"{stage}.{i}.conv2" for i in range(3))}
    assert len(found.groups) == 3 + 9
    assert set(found.blocks) == {f"layer1.{i}" for i in range(3)} | {f"layer{s}.{i}" for s in (2, 3) for i in (1, 2)}


# -- residual blocks --------------------------------------------------------------------------------------------------


def test_blocks_with_identity_shortcuts_alone(residual: Inventory) -> None:
    assert {name: block.layers for name, block in residual.blocks.items()} == {
        "same": ("same.conv1", "same.conv2"),
    }


def test_chained_blocks_are_offered_one_by_one(mobile: Inventory) -> None:
    # `features` as a whole computes f(x) + x too; removing it whole is removing both.
    assert set(mobile.blocks) == {"features.0", "features.1"}
    assert mobile.blocks["features.1"].layers == tuple(f"features.1.conv.{i}" for i in (0, 3, 6))


class Shaped(nn.Module):
    """A convolution and a shortcut that keep the shape; `kind` says what is wrong with the shortcut."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.other = kind, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.relu, self.drop = nn.ReLU(), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        made = {
            "identity": lambda: functional.relu(self.conv(x).add(x)),
            "dropout": lambda: torch.add(self.drop(x), self.conv(x)),
            "projection": lambda: self.conv(x) + self.other(x),
            "activated": lambda: self.conv(x) + self.relu(x),
            "product": lambda: self.conv(x) * x,
            "subtracted": lambda: self.conv(x) - x,
            "none": lambda: self.conv(x),
        }
        return made[self.kind]()


@pytest.mark.parametrize("kind", ["identity", "dropout"])
def test_a_block_however_it_is_written(kind: str) -> None:
    assert set(take_inventory(Wrapped(Shaped(kind)), images()).blocks) == {"inner"}


@pytest.mark.parametrize("kind", ["projection", "activated", "product", "subtracted", "none"])
def test_no_block_without_an_identity_shortcut(kind: str) -> None:
    assert not take_inventory(Wrapped(Shaped(kind)), images()).blocks


def test_a_block_that_runs_twice_is_not_offered() -> None:
    block = networks.BasicBlock(8, 8)
    assert not take_inventory(Wrapped(nn.Sequential(block, nn.ReLU(), block)), images()).blocks


class Unused(nn.Module):
    """A pooler whose result nobody reads, beside a layer behind a block without gradients, which counts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pooler, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.stem(x).relu()
        x = x.mean((2, 3))
        self.pooler(x)
        return self.fc(x)


def test_what_no_output_depends_on_is_no_layer() -> None:
    found = take_inventory(Unused(), images())
    assert list(found.layers) == ["stem", "fc"]
    assert found.skipped["pooler"] == "its result is not used"


class Recurrent(nn.Module):
    """Channels that an LSTM reads, and an LSTM that takes most of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn, self.fc = nn.Conv1d(4, 24, 3), nn.LSTM(24, 160, batch_first=True), nn.Linear(160, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(self.conv(x).relu().transpose(1, 2))[0][:, -1])


def test_channels_that_an_unknown_module_reads_are_not_called_the_output() -> None:
    found = take_inventory(Recurrent().eval(), torch.randn(2, 4, 30))
    assert found.skipped["conv (channels)"] == "no layer that can be pruned reads its channels"
    assert "output" in found.skipped["fc (channels)"]
    assert list(found.whole_left_alone) == ["rnn"] and list(found.axes_left_alone) == ["conv"]


def test_what_is_left_alone_is_said_with_its_share_of_the_time() -> None:
    found = take_inventory(Recurrent().eval(), torch.randn(2, 4, 30))
    said = found.left_alone({"rnn": 0.41, "conv": 0.12, "fc": 0.2})
    assert said is not None and "1 layer, 41% of the time (rnn: LSTM" in said
    assert "the channels of 1 layer, 12% of the time (conv: no layer" in said
    assert "%" not in (found.left_alone() or "%")
    assert take_inventory(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.ones(2, 4)).left_alone() is None


def test_shares_of_the_time_add_up_to_less_than_all_of_it() -> None:
    model, inputs = Recurrent().eval(), torch.randn(1, 4, 30)
    shares = time_shares(model, inputs, {"rnn", "fc", "missing"})
    assert shares.keys() == {"rnn", "fc"} and shares["rnn"] > shares["fc"] > 0 and sum(shares.values()) < 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
