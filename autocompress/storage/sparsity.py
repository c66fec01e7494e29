"""Unstructured magnitude pruning for storage: single weights become zero, and stay so while the network is trained on.

No engine here skips single zeros, so this makes a file smaller and a network no faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autocompress.catalogue import Method
from autocompress.errors import CompressionError, ConfigError, nearest

METHOD = Method(
    name="magnitude-unstructured",
    family="storage",
    summary="Removes single weights of least magnitude, per layer or over the whole network",
    source="Han, Pool, Tran & Dally, Learning both weights and connections, NeurIPS 2015",
)
GRADUAL = Method(
    name="gradual-sparsity",
    family="storage",
    summary="Raises the sparsity along a cubic curve while the network is trained on",
    source="Zhu & Gupta, To prune, or not to prune, 2017",
)
METHODS = (METHOD, GRADUAL)

SCOPES = ("global", "layer")


def magnitude_masks(
    weights: Mapping[str, Tensor], sparsity: float | Mapping[str, float], scope: str = "layer"
) -> dict[str, Tensor]:
    """Return which weights stay: of every tensor a boolean mask of its shape.

    Args:
        weights: Name to weights, of any shape and floating dtype.
        sparsity: Fraction of the weights REMOVED, in [0, 1); or one per name, for those named alone.
        scope: ``"layer"``: that fraction of every tensor; ``"global"``: of all of them together, by one threshold.

    Raises:
        ConfigError: The sparsity is out of range, the scope is unknown, or a name has no weights.
        CompressionError: A tensor has NaN, or would lose every weight.
    """
    wanted = _wanted(weights, sparsity, scope)
    for name in wanted:
        if bool(torch.isnan(weights[name]).any()):
            raise CompressionError(f"{name!r} holds NaN, so its weights have no order. Check how it was trained.")
    if scope == "global" and wanted:
        masks = _globally(weights, next(iter(wanted.values())))
    else:
        masks = {name: _largest(weights[name].detach().abs().flatten(), value) for name, value in wanted.items()}
    for name, mask in masks.items():
        if mask.numel() and not bool(mask.any()):
            raise CompressionError(
                f"Sparsity {wanted[name]:g} leaves {name!r} ({mask.numel()} weights) no weight. Give less sparsity"
                + (", or use scope 'layer'." if scope == "global" else ".")
            )
    return {name: mask.reshape(weights[name].shape) for name, mask in masks.items()}


def _wanted(weights: Mapping[str, Tensor], sparsity: float | Mapping[str, float], scope: str) -> dict[str, float]:
    """Return the checked sparsity of every tensor that is to be pruned."""
    if scope not in SCOPES:
        raise ConfigError(f"Unknown scope {scope!r} of sparsity.{nearest(scope, SCOPES)}")
    if isinstance(sparsity, Mapping):
        if scope == "global":
            raise ConfigError("A sparsity per layer and the scope 'global' exclude each other; use scope 'layer'.")
        for name in sparsity:
            if name not in weights:
                raise ConfigError(f"Sparsity is given for {name!r}, which has no weights.{nearest(name, weights)}")
        wanted = {name: float(value) for name, value in sparsity.items()}
    else:
        wanted = dict.fromkeys(weights, float(sparsity))
    for name, value in wanted.items():
        if not 0 <= value < 1:
            raise ConfigError(f"Sparsity {value:g} of {name!r} is not in [0, 1): it is the fraction removed.")
    return wanted


def _largest(magnitudes: Tensor, sparsity: float) -> Tensor:
    """Return the mask ``(n,)`` of all but the ``round(sparsity * n)`` smallest; of equals the first stay."""
    kept = magnitudes.numel() - round(sparsity * magnitudes.numel())
    order = magnitudes.argsort(descending=True, stable=True)
    mask = torch.zeros_like(magnitudes, dtype=torch.bool)
    mask[order[:kept]] = True
    return mask


def _globally(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    every = torch.cat([weight.detach().abs().flatten().float() for weight in weights.values()])
    parts = torch.split(_largest(every, sparsity), [weight.numel() for weight in weights.values()])
    return dict(zip(weights, parts, strict=True))


def gradual_sparsity(progress: float, final: float, initial: float = 0.0) -> float:
    """Return the sparsity at `progress` in [0, 1] of a run that ends at `final`: steep at first, then ever flatter."""
    return final + (initial - final) * (1 - min(max(progress, 0.0), 1.0)) ** 3


class Mask(nn.Module):
    """A parametrization: the weight under a mask, so that no step of an optimizer brings a removed weight back."""

    removed: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("removed", ~mask)

    def forward(self, weight: Tensor) -> Tensor:
        """Return `weight` of any shape, zero where the mask is."""
        # Not a product with the mask: that makes minus zeros, which a container must keep apart from zeros.
        return weight.masked_fill(self.removed, 0.0)


def set_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Hold the parameters named at zero where their mask is, from now on; changes `model` in place.

    A parameter that has a mask gets the new one, so that sparsity can be raised while training.
    Undo with `bake`, which leaves the zeros in the weights.

    Raises:
        ConfigError: The model has no such parameter, or it is of another shape.
    """
    for name, mask in masks.items():
        owner, attribute = owner_of(model, name)
        weight = getattr(owner, attribute)
        if weight.shape != mask.shape:
            raise ConfigError(f"The mask of {name!r} is {tuple(mask.shape)}, its weight {tuple(weight.shape)}.")
        if parametrize.is_parametrized(owner, attribute):
            held = owner.parametrizations[attribute][0]  # type: ignore[index]
            if not isinstance(held, Mask):
                raise ConfigError(f"{name!r} has the parametrization {type(held).__name__} already; bake it first.")
            held.removed = ~mask.to(weight.device, torch.bool)
        else:
            parametrize.register_parametrization(owner, attribute, Mask(mask.to(weight.device, torch.bool)))


def masked_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that carry a mask, before it is applied, by name: what a higher sparsity is chosen from."""
    found = {}
    for prefix, module in model.named_modules():
        for attribute, chain in getattr(module, "parametrizations", {}).items():
            if isinstance(chain[0], Mask):
                found[f"{prefix}.{attribute}".lstrip(".")] = chain.original.detach()
    return found


def bake(model: nn.Module) -> None:
    """Make what masks and codebooks compute the plain parameters of `model` again, in place."""
    for module in list(model.modules()):
        for attribute in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds the parameter `name`, and the parameter's name in it.

    Raises:
        ConfigError: There is none.
    """
    prefix, _, attribute = name.rpartition(".")
    modules = dict(model.named_modules())
    owner = modules.get(prefix)
    if owner is None or not isinstance(getattr(owner, attribute, None), Tensor):
        known = [key for key, _ in model.named_parameters()]
        raise ConfigError(f"The model has no parameter {name!r}.{nearest(name, known)}")
    return owner, attribute


def baked_weights(model: nn.Module, weight_bits: int | Mapping[str, int]) -> Iterator[tuple[nn.Module, str, int]]:
    """Bake `model` in place; yield the module, the name in it, and the bits of each parameter that is to get levels.

    Args:
        model: Its masks and codebooks become plain weights.
        weight_bits: By parameter name, or one for all parameters of two or more axes.

    Raises:
        ConfigError: The model has no such parameter.
    """
    bake(model)
    if not isinstance(weight_bits, Mapping):
        weight_bits = {name: weight_bits for name, p in model.named_parameters() if p.ndim >= 2}
    for name, bits in weight_bits.items():
        yield *owner_of(model, name), bits


def prunable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that are worth pruning and sharing: floating tensors of two or more axes."""
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and tensor.ndim >= 2}
