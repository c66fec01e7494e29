"""Which channels go, and that the network left computes what the original does without them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autocompress.compress import CompressionContext, Transform
from autocompress.compress.pruning import ChannelPruning, kept_channels
from autocompress.errors import CompressionError
from autocompress.policy import CompressionPolicy
from tests import networks
from tests.compress.contract import TransformContract

SCORES = torch.tensor([5.0, 1.0, 7.0, 2.0, 8.0, 3.0, 6.0, 4.0])


class TestChannelPruning(TransformContract):
    @pytest.fixture
    def transform(self) -> Transform:
        return ChannelPruning()

    @pytest.fixture
    def policy(self) -> CompressionPolicy:
        return CompressionPolicy(pruning={"stem": 0.5, "wider.conv1": 0.25})

    @pytest.fixture
    def unknown(self) -> CompressionPolicy:
        return CompressionPolicy(pruning={"nowhere": 0.5})

    @pytest.mark.parametrize("name", ["same", "same.relu", "same.bn1"])
    def test_a_module_without_output_channels_leads_no_group(
        self, transform: Transform, model: nn.Module, context: CompressionContext, name: str
    ) -> None:
        with pytest.raises(CompressionError, match=name):
            transform.apply(model, CompressionPolicy(pruning={name: 0.5}), context)

    def test_a_group_inside_a_removed_block_is_passed_over(
        self, transform: Transform, context: CompressionContext
    ) -> None:
        model = networks.Residual().eval()
        model.same = nn.Identity()  # type: ignore[assignment]
        policy = CompressionPolicy(pruning={"same.conv1": 0.5}, removed_blocks=("same",))
        assert transform.apply(model, policy, context) is model

    def test_scores_of_another_width_are_an_error(self, transform: Transform, model: nn.Module) -> None:
        context = CompressionContext(networks.images(), {"stem": torch.ones(5)})
        with pytest.raises(CompressionError, match="5 entries for 8 channels"):
            transform.apply(model, CompressionPolicy(pruning={"stem": 0.5}), context)


def test_kept_channels() -> None:
    assert [kept_channels(64, r) for r in (0, 0.25, 0.5, 0.99)] == [64, 48, 32, 1]
    assert kept_channels(8, 0.9999) == 1
    assert kept_channels(16, 0.01) == 16


def test_a_ratio_too_small_to_remove_anything() -> None:
    model = networks.Plain().eval()
    result = ChannelPruning().apply(
        model, CompressionPolicy(pruning={"conv1": 0.01}), CompressionContext(networks.images())
    )
    assert networks.same_state(result, networks.state(model))


def test_the_highest_scored_channels_stay_in_their_order() -> None:
    model = networks.randomize(networks.Plain())
    assert isinstance(model, networks.Plain)
    context = CompressionContext(networks.images(), {"conv1": SCORES})
    result = ChannelPruning().apply(model, CompressionPolicy(pruning={"conv1": 0.5}), context)
    assert isinstance(result, networks.Plain)
    kept = [0, 2, 4, 6]
    assert torch.equal(result.conv1.weight, model.conv1.weight[kept])
    assert torch.equal(result.bn1.weight, model.bn1.weight[kept])
    assert torch.equal(result.bn1.running_mean, model.bn1.running_mean[kept])
    assert torch.equal(result.conv2.weight, model.conv2.weight[:, kept])
    assert torch.equal(result.fc.weight, model.fc.weight)


def test_without_scores_the_last_channels_go() -> None:
    model = networks.Plain().eval()
    result = ChannelPruning().apply(
        model, CompressionPolicy(pruning={"conv1": 0.25}), CompressionContext(networks.images())
    )
    assert torch.equal(result.get_parameter("conv1.weight"), model.conv1.weight[:6])


def zeroed(model: nn.Module, readers: tuple[str, ...], channels: list[int]) -> nn.Module:
    """Make every reader of the axis blind to the channels; what those hold then changes nothing else."""
    for name in readers:
        model.get_parameter(f"{name}.weight").data[:, channels] = 0
    return model


@pytest.mark.parametrize(
    ("make", "group", "readers"),
    [
        (networks.Plain, "conv1", ("conv2",)),
        (networks.Residual, "stem", ("same.conv1", "wider.conv1", "wider.downsample.0")),
        (networks.Concat, "right", ("join",)),
        (networks.Mobile, "stem", ("features.0.conv.0", "features.1.conv.0", "last.conv.0")),
    ],
)
def test_the_pruned_network_is_the_original_blind_to_those_channels(
    make: type[nn.Module], group: str, readers: tuple[str, ...]
) -> None:
    model, x = networks.randomize(make()), networks.images(3, seed=5)
    context = CompressionContext(networks.images(), {group: SCORES})
    pruned = ChannelPruning().apply(model, CompressionPolicy(pruning={group: 0.5}), context)
    # Of a concatenation, the right branch begins after the left one's four channels.
    offset = 4 if group == "right" else 0
    blind = zeroed(model, readers, [offset + i for i in (1, 3, 5, 7)])
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), blind(x), rtol=1e-4, atol=1e-5)


def test_two_branches_of_a_concatenation_together() -> None:
    model, x = networks.randomize(networks.Concat()), networks.images()
    scores = {"left": SCORES[:4], "right": SCORES}
    pruned = ChannelPruning().apply(
        model, CompressionPolicy(pruning={"left": 0.5, "right": 0.5}), CompressionContext(x, scores)
    )
    blind = zeroed(model, ("join",), [1, 3, *(4 + i for i in (1, 3, 5, 7))])
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), blind(x), rtol=1e-4, atol=1e-5)
