"""What has levels of its own: a tensor, each of its channels, or groups of consecutive weights.

Group sizes are those that a container looks for (`storage.scaled`). Quantizers know values only, not where they stand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.errors import ConfigError
from autocompress.storage.quantizers import QUANTIZERS, StorageQuantizer
from autocompress.storage.scaled import GROUPS

TENSOR, CHANNEL = "tensor", "channel"


def check_granularity(kind: StorageQuantizer, granularity: str | int) -> None:
    """Refuse what is no granularity, or none of this quantizer's.

    Raises:
        ConfigError: Which, and what there is instead.
    """
    if granularity not in (TENSOR, CHANNEL, *GROUPS):
        raise ConfigError(
            f"Unknown granularity {granularity!r}. It is {TENSOR!r}, {CHANNEL!r}, or so many weights: "
            f"{', '.join(map(str, sorted(GROUPS)))}."
        )
    if granularity != TENSOR and not kind.SCALED:
        able = ", ".join(sorted(name for name, one in QUANTIZERS.items() if one.SCALED))
        raise ConfigError(
            f"The quantizer {kind.method.name!r} has a table of levels, and one for every channel or group would take "
            f"what it saves. Leave granularity at {TENSOR!r}, or take {able}."
        )


def quantized(weight: Tensor, weight_bits: int, kind: StorageQuantizer, granularity: str | int = TENSOR) -> Tensor:
    """Return `weight` with every value at one of its levels; zeros stay zero.

    Args:
        weight: Of any shape and floating dtype; channels are those of the first axis.
        weight_bits: At most ``2 ** weight_bits`` levels in each slice, kept zeros not counted.
        kind: Gives the levels.
        granularity: ``"tensor"``, ``"channel"``, or so many consecutive weights in row-major order.

    Raises:
        ConfigError: The quantizer cannot do so many bits, or has no such granularity.
        CompressionError: A weight is not finite.
    """
    check_granularity(kind, granularity)
    found = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    values, made = weight.detach().reshape(-1), found.view(-1)
    length = granularity if isinstance(granularity, int) else max(weight.numel(), 1)
    if granularity == CHANNEL and weight.ndim > 1:
        length //= weight.shape[0]
    for start in range(0, len(values), length):
        given = values[start : start + length]
        kept = given != 0
        if bool(kept.any()):
            made[start : start + length][kept] = kind.fit(given[kept], weight_bits).values().to(weight.dtype)
    return found
