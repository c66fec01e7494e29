"""Weights trained while quantized for storage: every forward pass sees levels, gradients pass straight through.

Bengio, Leonard & Courville, Estimating or propagating gradients through stochastic neurons, 2013; Jacob et al., CVPR
2018. For levels that are themselves to be trained, as a codebook's are, see `storage.sharing`. Owns no quantizer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autocompress.catalogue import Method
from autocompress.storage.quantizers import StorageQuantizer
from autocompress.storage.sparsity import baked_weights

METHOD = Method(
    name="straight-through",
    family="storage",
    summary="Trains weights that every forward pass sees as their levels, by any quantizer",
    source="Bengio, Leonard & Courville, 2013; Jacob et al., CVPR 2018",
)

# Levels follow the weights slowly, and fitting them sorts all weights.
_REFIT_EVERY = 16


class QuantizedWeight(nn.Module):
    """A parametrization: the weight is read as its level, and trained as itself. Zeros stay zero."""

    kept: Tensor

    def __init__(self, weight: Tensor, quantizer: StorageQuantizer, weight_bits: int) -> None:
        super().__init__()
        self._quantizer, self._bits, self._uses = quantizer, weight_bits, 0
        self.register_buffer("kept", weight.detach() != 0)
        # Says at once what a quantizer cannot do.
        self._levels = self._fit(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the levels of `weight`, of any shape; the gradient is that of `weight`."""
        # Contiguous, as convolutions trained with their channels last are not.
        exact = weight.detach().float().contiguous()
        if not (self.training and self._uses % _REFIT_EVERY):
            self._levels = self._fit(weight)
        # The nearest level always, also where a quantizer parts values elsewhere, as ternary ones do: what training
        # sees is what is kept, though weights gather where two levels part.
        middles = (self._levels[1:] + self._levels[:-1]) / 2
        values = self._levels[torch.bucketize(exact, middles, right=True)].masked_fill(~self.kept, 0.0)
        self._uses += self.training
        # The difference is zero: what comes out is the level to the bit.
        return values.to(weight.dtype) + (weight - weight.detach())

    def _fit(self, weight: Tensor) -> Tensor:
        return self._quantizer.fit(weight.detach()[self.kept], self._bits).levels


def quantize_through(model: nn.Module, weight_bits: int | Mapping[str, int], quantizer: StorageQuantizer) -> None:
    """Let parameters of `model` be seen quantized and trained all the same, in place; end with `bake` in eval mode.

    Masks are baked first, and the zeros they left are kept.

    Args:
        model: Its parameters that are named get at most ``2 ** weight_bits`` levels, kept zeros not counted.
        weight_bits: By parameter name, or one for all parameters of two or more axes.
        quantizer: Gives the levels, again and again.

    Raises:
        ConfigError: The model has no such parameter, or the quantizer cannot do so many bits.
        CompressionError: A parameter has no weight that is not zero, or one that is not finite, also later on.
    """
    for owner, attribute, bits in baked_weights(model, weight_bits):
        seen = QuantizedWeight(getattr(owner, attribute), quantizer, bits)
        parametrize.register_parametrization(owner, attribute, seen)
