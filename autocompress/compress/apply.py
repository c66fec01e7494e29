"""A policy applied to a model: the transforms in their order. The only place that knows the order."""

from __future__ import annotations

from torch import nn

from autocompress.compress.base import CompressionContext, Transform
from autocompress.compress.blocks import BlockRemoval
from autocompress.compress.heads import HeadPruning
from autocompress.compress.lowrank import LowRank
from autocompress.compress.pruning import ChannelPruning
from autocompress.compress.quantization import Quantization
from autocompress.compress.sparsity import SemiStructuredSparsity
from autocompress.policy import CompressionPolicy

# Blocks go first, since their channels need no pruning then; ranks are taken of what pruning left, zeros of what the
# ranks left; quantization last, since it quantizes whatever layers there are in the end.
TRANSFORMS: tuple[Transform, ...] = (
    BlockRemoval(),
    HeadPruning(),
    ChannelPruning(),
    LowRank(),
    SemiStructuredSparsity(),
    Quantization(),
)


def apply_policy(model: nn.Module, policy: CompressionPolicy, context: CompressionContext) -> nn.Module:
    """Return a compressed copy of `model`, which must have come through `rewrite` and is not changed.

    Activation ranges of int8 layers are unset until `quantization.calibrate`.

    Raises:
        CompressionError: The policy does not fit the model.
    """
    for transform in TRANSFORMS:
        model = transform.apply(model, policy, context)
    return model.eval()
