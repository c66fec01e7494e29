"""From scores of channels to pruning ratios: how much each group loses, of a share that the whole model loses.

Owns the ratios only; which channels of a group go is `ChannelPruning`'s, by the same scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from autocompress.catalogue import Method
from autocompress.compress.shapes import network_macs
from autocompress.errors import ConfigError, nearest
from autocompress.model.inventory import Inventory
from autocompress.policy import CompressionPolicy

METHODS = (
    Method(
        "scope=global",
        "pruning",
        "one threshold (a percentile) for the scores of all groups",
        "Liu et al., Network slimming, ICCV 2017",
    ),
    Method(
        "scope=layer",
        "pruning",
        "the same ratio for every group, the least important channels of each",
        "Li et al., ICLR 2017",
    ),
)
SCOPES = ("global", "layer")
# Share of a group's channels that may go at most: a threshold for the whole model would cut some layers through.
MOST = 0.9


def threshold_policy(
    scores: Mapping[str, Tensor],
    inventory: Inventory,
    ratio: float,
    *,
    scope: str = "global",
    least: Mapping[str, int] | None = None,
    multiple: int = 1,
) -> CompressionPolicy:
    """Return the policy that removes `ratio` of all channels: those below one threshold, or as many of every group.

    Args:
        scores: Group name to importance of its channels ``(C,)``, as `score_channels` gives them.
        inventory: Of the model.
        ratio: Fraction of all groups' channels REMOVED, in [0, 1).
        scope: ``"global"`` or ``"layer"``.
        least: Group name to the channels it keeps at least; a tenth by default, and one always.
        multiple: Kept channels are rounded to multiples of it, which moves the ratio; attention heads are not.

    Raises:
        ConfigError: `scope` is unknown, `ratio` is out of range or would take more than may go, or there is nothing to
            prune.
    """
    _check(inventory, scope, multiple, ratio)
    wide = {name: group.channels for name, group in inventory.groups.items()}
    kept_least = {
        name: min(channels, max(1, (least or {}).get(name, least_kept(channels)))) for name, channels in wide.items()
    }
    if scope == "layer":
        kept = {name: max(kept_least[name], channels - round(ratio * channels)) for name, channels in wide.items()}
        if ratio * sum(wide.values()) >= sum(wide.values()) - sum(kept_least.values()) + 0.5:
            raise _too_much(ratio, wide, kept_least)
    else:
        kept = _below_one_threshold(scores, wide, kept_least, ratio)
    pruning = {}
    for name, channels in wide.items():
        # Heads are few, and each is many channels.
        step = 1 if inventory.groups[name].heads else multiple
        rounded = max(step, round(kept[name] / step) * step) if kept[name] < channels else channels
        pruning[name] = 1 - min(channels, max(kept_least[name], rounded)) / channels
    return CompressionPolicy(pruning=pruning)


def least_kept(channels: int) -> int:
    """Return how many channels of a group stay whatever their scores."""
    return max(1, channels - int(MOST * channels))


def policy_at_macs(
    inventory: Inventory, share: float, policy_at: Callable[[float], CompressionPolicy]
) -> CompressionPolicy:
    """Return the mildest policy within a share of the model's multiply-accumulates.

    Args:
        inventory: Of the model.
        share: Fraction of its multiply-accumulates that may be LEFT, in (0, 1].
        policy_at: Ratio to policy, such as `threshold_policy` with its other arguments bound.

    Raises:
        ConfigError: `share` is out of range, or not even the largest ratio gets there.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"Target of {share}x the multiply-accumulates; it is the share that is left, in (0, 1].")
    limit = share * inventory.macs

    def fits(policy: CompressionPolicy | None) -> bool:
        return policy is not None and network_macs(inventory, policy) <= limit

    def attempt(ratio: float) -> CompressionPolicy | None:
        try:
            return policy_at(ratio)
        except ConfigError:
            return None

    untouched = policy_at(0.0)
    if fits(untouched):
        return untouched
    low, high = 0.0, 1.0
    best, smallest = None, network_macs(inventory, untouched)
    # The number of channels is finite: after so many halvings neighbours are the same policy.
    for _ in range(24):
        middle = (low + high) / 2
        policy = attempt(middle)
        if policy is None:
            high = middle
        elif fits(policy):
            best, high = policy, middle
        else:
            low, smallest = middle, min(smallest, network_macs(inventory, policy))
    if best is None:
        raise ConfigError(
            f"{share:.2f}x the multiply-accumulates cannot be reached by pruning channels: at most "
            f"{1 - smallest / inventory.macs:.0%} of them go, since every group keeps some channels."
        )
    return best


def _below_one_threshold(
    scores: Mapping[str, Tensor], wide: Mapping[str, int], least: Mapping[str, int], ratio: float
) -> dict[str, int]:
    # The most important channels of a group, as many as it keeps at least, are no candidates.
    candidates = [scores[name].sort().values[: channels - least[name]] for name, channels in wide.items()]
    removed = round(ratio * sum(wide.values()))
    everything = torch.cat(candidates)
    if removed > len(everything):
        raise _too_much(ratio, wide, least)
    gone = torch.zeros(len(everything), dtype=torch.bool)
    gone[everything.argsort(stable=True)[:removed]] = True
    parts = torch.split(gone, [len(own) for own in candidates])
    return {name: wide[name] - int(part.sum()) for name, part in zip(wide, parts, strict=True)}


def _too_much(ratio: float, wide: Mapping[str, int], least: Mapping[str, int]) -> ConfigError:
    total = sum(wide.values())
    most = (total - sum(least.values())) / total
    return ConfigError(
        f"pruning_ratio {ratio} of {total} channels is more than may go: every group keeps some, so {most:.3f} at most."
    )


def _check(inventory: Inventory, scope: str, multiple: int, ratio: float) -> None:
    if not inventory.groups:
        raise ConfigError("No channels of this model can be pruned; `autocompress inspect` says why.")
    if scope not in SCOPES:
        raise ConfigError(f"Unknown scope {scope!r}.{nearest(scope, SCOPES)}")
    if multiple < 1:
        raise ConfigError(f"Channels cannot be kept in multiples of {multiple}; give 1 or more.")
    if not 0 <= ratio < 1:
        raise ConfigError(f"pruning_ratio {ratio} is the fraction of channels removed; give it in [0, 1).")
