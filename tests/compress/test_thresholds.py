"""How much every group loses, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autocompress.compress import CompressionContext, apply_policy, score_channels
from autocompress.compress.shapes import network_macs
from autocompress.compress.thresholds import least_kept, policy_at_macs, threshold_policy
from autocompress.errors import ConfigError
from autocompress.model.inventory import ChannelGroup, Inventory, count_macs, take_inventory
from autocompress.policy import CompressionPolicy
from tests import networks
from tests.networks import images


def groups(**widths: int) -> Inventory:
    return Inventory({}, {n: ChannelGroup(n, w, (n,), (f"{n}.next",)) for n, w in widths.items()}, {})


def kept(policy: CompressionPolicy, inventory: Inventory) -> dict[str, int]:
    return {n: round(g.channels * (1 - policy.pruning.get(n, 0))) for n, g in inventory.groups.items()}


WEAK = torch.tensor([0.1, 0.2, 0.3, 0.4])
STRONG = torch.tensor([1.0, 0.35, 2.0, 3.0, 4.0, 5.0])
SCORES = {"weak": WEAK, "strong": STRONG}
TWO = groups(weak=4, strong=6)


def test_one_threshold_takes_the_least_of_all_groups() -> None:
    # The four lowest of ten are 0.1, 0.2, 0.3 and 0.35.
    assert kept(threshold_policy(SCORES, TWO, 0.4), TWO) == {"weak": 1, "strong": 5}
    assert kept(threshold_policy(SCORES, TWO, 0.2), TWO) == {"weak": 2, "strong": 6}


def test_a_group_keeps_its_least_and_others_pay() -> None:
    assert kept(threshold_policy(SCORES, TWO, 0.6), TWO) == {"weak": 1, "strong": 3}
    assert kept(threshold_policy(SCORES, TWO, 0.4, least={"weak": 3}), TWO) == {"weak": 3, "strong": 3}
    assert [least_kept(channels) for channels in (1, 4, 10, 64)] == [1, 1, 1, 7]


def test_the_same_ratio_everywhere_reads_no_scores() -> None:
    assert kept(threshold_policy({}, TWO, 0.5, scope="layer"), TWO) == {"weak": 2, "strong": 3}
    assert threshold_policy({}, TWO, 0.0, scope="layer").pruning == {}


def test_rounding_to_a_multiple_never_leaves_nothing() -> None:
    wide = groups(a=32, b=64)
    scores = {"a": torch.arange(32.0), "b": torch.arange(64.0) + 20}
    assert kept(threshold_policy(scores, wide, 0.5), wide) == {"a": 4, "b": 44}
    assert kept(threshold_policy(scores, wide, 0.5, multiple=8), wide) == {"a": 8, "b": 48}


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_too_much_is_an_error_that_says_how_much_may_go(scope: str) -> None:
    with pytest.raises(ConfigError, match=r"0\.95 of 10 channels .* 0\.800 at most"):
        threshold_policy(SCORES, TWO, 0.95, scope=scope)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratio": 1.0}, r"pruning_ratio 1\.0 .* in \[0, 1\)"),
        ({"ratio": -0.1}, r"pruning_ratio -0\.1"),
        ({"scope": "layers"}, "Unknown scope 'layers'. Did you mean 'layer'"),
        ({"multiple": 0}, "multiples of 0"),
        ({"inventory": Inventory({}, {}, {})}, "No channels of this model can be pruned"),
    ],
)
def test_bad_values(changes: dict[str, object], said: str) -> None:
    arguments: dict[str, object] = {"scores": SCORES, "inventory": TWO, "ratio": 0.5, **changes}
    with pytest.raises(ConfigError, match=said):
        threshold_policy(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [networks.Plain, networks.Residual, networks.Mobile, networks.Concat])
def test_macs_of_a_policy_are_those_of_the_pruned_network(make: type[nn.Module]) -> None:
    model = networks.randomize(make())
    inventory = take_inventory(model, images())
    policy = threshold_policy({}, inventory, 0.5, scope="layer")
    pruned = apply_policy(model, policy, CompressionContext(images()))
    assert network_macs(inventory, policy) == sum(count_macs(pruned, images()).values())
    assert network_macs(inventory, CompressionPolicy()) == inventory.macs


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_mildest_policy_within_a_share_of_the_macs(scope: str) -> None:
    model = networks.randomize(networks.Residual(16))
    inventory = take_inventory(model, images())
    scores = score_channels(model, images(), inventory, "magnitude")

    def at(ratio: float) -> CompressionPolicy:
        return threshold_policy(scores, inventory, ratio, scope=scope)

    policy = policy_at_macs(inventory, 0.5, at)
    assert network_macs(inventory, policy) <= 0.5 * inventory.macs
    total = sum(group.channels for group in inventory.groups.values())
    removed = total - sum(kept(policy, inventory).values())
    if scope == "global":  # one channel less is too much
        assert network_macs(inventory, at((removed - 1) / total)) > 0.5 * inventory.macs
    assert policy_at_macs(inventory, 1.0, at) == CompressionPolicy()


def test_a_share_of_the_macs_that_cannot_be_reached() -> None:
    model = networks.randomize(networks.Plain())
    inventory = take_inventory(model, images())
    scores: dict[str, Tensor] = {n: torch.arange(float(g.channels)) for n, g in inventory.groups.items()}
    with pytest.raises(ConfigError, match=r"0\.01x .* cannot be reached.* at most 9\d% of them go"):
        policy_at_macs(inventory, 0.01, lambda ratio: threshold_policy(scores, inventory, ratio))
    with pytest.raises(ConfigError, match=r"Target of 0x"):
        policy_at_macs(inventory, 0, lambda ratio: threshold_policy(scores, inventory, ratio))
