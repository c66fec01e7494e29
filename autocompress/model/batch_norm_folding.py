"""Folding batch-norms into the convolutions before them, as exporters and engines do. Imports torch."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

# Parameters and buffers by name.
Arrays = Mapping[str, NDArray[np.float32]]


def foldable(model: nn.Module, inputs: Tensor) -> dict[str, str]:
    """Return convolution to batch-norm where one batch-norm reads exactly what the convolution gave."""
    made: dict[int, tuple[str, Tensor]] = {}
    pairs: dict[str, str] = {}
    calls: dict[str, int] = {}
    hooks = []

    def after(name: str) -> object:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            made[id(output)] = (name, output)

        return hook

    def before(name: str) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            calls[name] = calls.get(name, 0) + 1
            if args and id(args[0]) in made:
                pairs[made[id(args[0])][0]] = name

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            hooks.append(module.register_forward_hook(after(name)))  # type: ignore[arg-type]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            hooks.append(module.register_forward_pre_hook(before(name)))  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in hooks:
            handle.remove()
    once = {conv: norm for conv, norm in pairs.items() if calls[conv] == calls[norm] == 1}
    marked = randomised(model)
    if _folds_truly(marked, once, inputs):
        return once
    # What some convolution gives is read by something else as well.
    return {conv: norm for conv, norm in once.items() if _folds_truly(marked, {conv: norm}, inputs)}


def _folds_truly(model: nn.Module, folds: Mapping[str, str], inputs: Tensor) -> bool:
    """Whether the model without these norms computes the same."""
    with torch.no_grad():
        wanted, found = model(inputs), without_norms(model, folds, folded(model, folds))(inputs)
    if not bool(wanted.isfinite().all()):
        return False  # Nothing can be told from it; an export folds what it can by itself.
    return bool(torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())))


def folded(model: nn.Module, folds: Mapping[str, str]) -> dict[str, NDArray[np.float32]]:
    """Return parameters and buffers as float32 arrays, batch-norms of `folds` folded into their convolutions."""
    state = {name: t.detach() for name, t in model.state_dict().items() if t.is_floating_point()}
    for conv, name in folds.items():
        layer, norm = submodule(model, conv), submodule(model, name)
        if layer is None or not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            continue
        last = f"{conv}.{len(layer) - 1}" if isinstance(layer, nn.Sequential) else conv
        mean, variance = state[f"{name}.running_mean"].double(), state[f"{name}.running_var"].double()
        scale = torch.rsqrt(variance + norm.eps) * state.get(f"{name}.weight", torch.ones_like(variance))
        weight = state[f"{last}.weight"]
        bias = state.get(f"{last}.bias", torch.zeros_like(mean))
        shift = state.get(f"{name}.bias", torch.zeros_like(mean))
        state[f"{last}.weight"] = weight * scale.view(-1, *[1] * (weight.ndim - 1))
        state[f"{last}.bias"] = (bias - mean) * scale + shift
    return {name: t.float().contiguous().numpy() for name, t in state.items()}


def randomised(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters and buffers are all different numbers between 0.5 and 1.5.

    Those of matrices and kernels are divided by the numbers that an output sums, so that deep networks do not overflow.
    """
    marked = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in marked.state_dict().values():
            if tensor.is_floating_point():
                summed = tensor[0].numel() if tensor.ndim > 1 and len(tensor) else 1
                tensor.copy_((torch.rand(tensor.shape, generator=generator) + 0.5) / max(1, summed))
    return marked


def without_norms(model: nn.Module, folds: Mapping[str, str], folded: Arrays) -> nn.Module:
    """Return a copy in which the convolutions of `folds` have the weights of `folded` and their norms are gone."""
    model = copy.deepcopy(model)
    for conv, norm in folds.items():
        layer = model.get_submodule(conv)
        layer.weight = nn.Parameter(torch.from_numpy(folded[f"{conv}.weight"].copy()))
        layer.bias = nn.Parameter(torch.from_numpy(folded[f"{conv}.bias"].copy()))
        parent, _, child = norm.rpartition(".")
        setattr(model.get_submodule(parent), child, _beside(model.get_submodule(norm)))
    return model.eval()


def _beside(norm: nn.Module) -> nn.Module:
    """Return what a batch-norm does besides normalising: some hold the activation behind it as well."""
    inner = OrderedDict(norm.named_children())
    return nn.Sequential(inner) if inner else nn.Identity()


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    """Return a module by its name; None when the model has none of that name."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
