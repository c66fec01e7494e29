"""Weights of a network shared, and the shared levels trained on: the second stage of Deep Compression."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autocompress.storage.quantizers import StorageQuantizer
from autocompress.storage.sparsity import baked_weights


class SharedWeight(nn.Module):
    """A parametrization: the weight is looked up in its levels, which are the parameter.

    Autograd gives a level the sum of the gradients of the weights that share it (Deep Compression, section 3.3), and
    any optimizer can train it. Pruned weights stay zero.
    """

    indices: Tensor
    _levels: Tensor

    def __init__(self, weight: Tensor, quantizer: StorageQuantizer, weight_bits: int) -> None:
        super().__init__()
        kept = weight.detach() != 0
        shared = quantizer.fit(weight.detach()[kept], weight_bits)
        indices = torch.zeros(weight.shape, dtype=torch.int64)
        indices[kept] = shared.indices + 1
        self.register_buffer("indices", indices)
        self.register_buffer("_levels", shared.levels.to(weight.dtype), persistent=False)

    def forward(self, levels: Tensor) -> Tensor:
        """Return the weight for its levels ``(k,)``."""
        table = torch.cat([levels.new_zeros(1), levels])
        # An embedding sums gradients of equal indices many times faster than indexing does.
        return nn.functional.embedding(self.indices, table[:, None]).squeeze(-1)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the levels that `weight` was quantized to."""
        return self._levels


def share_weights(model: nn.Module, weight_bits: int | Mapping[str, int], quantizer: StorageQuantizer) -> None:
    """Make parameters of `model` share levels, in place: what is trained from now on are the levels.

    Masks are baked first. Make the optimizer after this, and call `bake` at the end.

    Args:
        model: Its parameters that are named get at most ``2 ** weight_bits`` levels, zero not counted.
        weight_bits: By parameter name, or one for all parameters of two or more axes.
        quantizer: Gives the first levels.

    Raises:
        ConfigError: The model has no such parameter, or the quantizer cannot do so many bits.
        CompressionError: A parameter has no weight that is not zero, or one that is not finite.
    """
    for owner, attribute, bits in baked_weights(model, weight_bits):
        shared = SharedWeight(getattr(owner, attribute), quantizer, bits)
        # `unsafe`: the levels are of another shape than the weight.
        parametrize.register_parametrization(owner, attribute, shared, unsafe=True)
