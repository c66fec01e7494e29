"""Low-rank factorization: layers become chains of thinner ones, as `factorizations` say."""

from __future__ import annotations

import copy

import torch
from torch import nn

from autocompress.compress.base import CompressionContext, LayerOutputs, Transform, check_names
from autocompress.compress.factorizations import factorization_of
from autocompress.errors import CompressionError
from autocompress.policy import CompressionPolicy, LayerPolicy


class LowRank(Transform):
    """Factorize every layer whose `rank_ratio` is below 1. Children of the new `nn.Sequential` are ``0, 1, (2)``."""

    def apply(self, model: nn.Module, policy: CompressionPolicy, context: CompressionContext) -> nn.Module:
        """See `Transform.apply`."""
        modules = dict(model.named_modules())
        factorized = {n: p for n, p in policy.layers.items() if p.rank_ratio < 1}
        check_names(factorized, model, policy)
        wanted = {n: p for n, p in factorized.items() if n in modules}
        if not wanted:
            return model
        model = copy.deepcopy(model)
        for name, own in wanted.items():
            layer = model.get_submodule(name)
            parent, _, child = name.rpartition(".")
            chain = factorize(layer, own, name, context.layer_outputs.get(name), weights=context.weights)
            setattr(model.get_submodule(parent), child, chain)
        return model


def factorize(
    layer: nn.Module,
    policy: LayerPolicy,
    name: str = "layer",
    outputs: LayerOutputs | None = None,
    *,
    weights: bool = True,
) -> nn.Sequential:
    """Return the low-rank form of a linear or ungrouped convolution layer; the layer is not changed.

    Args:
        layer: What is factorized.
        policy: Its `rank_ratio` and `factorization`.
        name: For messages.
        outputs: What the layer gives on calibration data; None where that is not known.
        weights: Whether the factors' weights are wanted, or their shapes alone.

    Raises:
        CompressionError: The layer has no low-rank form, or the factorization does not converge.
    """
    if isinstance(layer, nn.Linear):
        ins, outs, kernel = layer.in_features, layer.out_features, (1, 1)
    elif isinstance(layer, nn.Conv2d) and layer.groups == 1:
        high, wide = layer.kernel_size
        ins, outs, kernel = layer.in_channels, layer.out_channels, (high, wide)
    else:
        raise CompressionError(f"{name!r} ({type(layer).__name__}) has no low-rank form; leave its rank_ratio at 1.")
    factorization = factorization_of(policy.factorization, kernel)
    chain = factorization.build(layer, factorization.ranks(ins, outs, kernel, policy.rank_ratio))
    if outputs is not None and outputs.covariance.shape[0] != outs:
        outputs = None
    if weights:
        if not bool(layer.weight.isfinite().all()):
            raise CompressionError(f"{name!r} cannot be factorized by {factorization.name}: its weight is not finite.")
        try:
            with torch.no_grad():
                factorization.fill(chain, layer, outputs)
        except (torch.linalg.LinAlgError, CompressionError) as error:  # type: ignore[attr-defined]
            raise CompressionError(f"{name!r} cannot be factorized by {factorization.name}: {error}.") from error
    return chain
