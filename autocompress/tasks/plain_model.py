"""The door that every model comes in by: a copy in the one form that the rest of the package works on.

Compiled wrappers are taken off, weights that other tensors are computed into become plain ones, everything floats in
fp32 on the CPU and has gradients. What cannot be changed at all is refused here, before anything was spent.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from autocompress.errors import ConfigError
from autocompress.model.eval_caches import remembered

# Modules whose weights are integers already; float ones are needed.
_QUANTIZED = (
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torch.nn.quantized",
    "torchao.",
    "bitsandbytes.",
)
# Hooks of torch.nn.utils that compute a weight before every forward, with what takes them off, by class name.
_NORMS = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}
_NAMED = 3  # layers named in a sentence
_EXTRA = "_extra_state"


def plain_copy(model: object, where: str) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a copy of a model in eval mode that is plain, and what was done to it, a sentence each.

    Args:
        model: The user's; not changed.
        where: Who says so: ``"Task 'mine'"``.

    Raises:
        ConfigError: It is no module, its layers cannot be changed, or it has no weights.
    """
    said: list[str] = []
    module = _unwrapped(model, where, said)
    _refuse(module, where)
    found = _copied(module, where).eval()
    for name, inner in list(found.named_modules()):
        if name and (plain := _inside(inner)) is not inner:
            parent, _, child = name.rpartition(".")
            setattr(found.get_submodule(parent), child, plain)
            said.append(f"{name} was unwrapped from {type(inner).__name__}")
    for inner in found.modules():
        # `model.compile()` leaves its compiled call on the module itself.
        inner._compiled_call_impl = None
    _bake(found, where, said)
    _plain_numbers(found, said)
    _tensors_alone(found)
    return found, tuple(said)


def _inside(model: Any) -> Any:
    """Return what a wrapper that changes no result is around, the model itself where there is none."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def _unwrapped(model: object, where: str, said: list[str]) -> nn.Module:
    module = _inside(model)
    if module is not model:
        said.append(f"the model was unwrapped from {type(model).__name__}")
    if isinstance(module, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise ConfigError(
            f"{where}: the model is a {type(module).__name__} of torch.jit, whose layers cannot be changed. Give the "
            "nn.Module that was traced or scripted."
        )
    if isinstance(module, torch.export.ExportedProgram):
        raise ConfigError(
            f"{where}: the model is an ExportedProgram, whose layers cannot be changed. Give the nn.Module that was "
            "exported."
        )
    if not isinstance(module, nn.Module):
        hint = ""
        if isinstance(module, dict):
            hint = " A state dict holds weights alone: make the network and call load_state_dict."
        elif isinstance(module, type) and issubclass(module, nn.Module):
            hint = f" {module.__name__} is a class: call it."
        raise ConfigError(f"{where}: the model must be an nn.Module, found {type(module).__name__}.{hint}")
    return module


def _refuse(model: nn.Module, where: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(
                f"{where}: layer {name!r} is a {type(module).__name__} of torch.jit, which cannot be changed. Put the "
                "nn.Module that was traced or scripted in its place."
            )
        kind = f"{type(module).__module__}.{type(module).__name__}"
        if kind.startswith(_QUANTIZED):
            raise ConfigError(
                f"{where}: layer {name!r} is a {kind}, which is quantized already. Give the model with its float "
                "weights: int8 is chosen layer by layer here."
            )
        for key, value in _tensors(module):
            if nn.parameter.is_lazy(value):
                raise ConfigError(
                    f"{where}: {_joined(name, key)} has no shape yet, as lazy modules have before their first call. "
                    "Run the model once on real inputs, and load its weights."
                )
            if value.is_meta:
                raise ConfigError(
                    f"{where}: {_joined(name, key)} is on the meta device, so it has no values. Load the weights: "
                    "model.to_empty(device='cpu') and load_state_dict, or make the model without torch.device('meta')."
                )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for key, value in (*module._parameters.items(), *module._buffers.items()):
        if value is not None:
            yield key, value


def _copied(model: nn.Module, where: str) -> nn.Module:
    """Copy a model, also one that remembers results of its last forward, which torch does not copy."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in remembered(vars(module)):
            memo[id(value)] = value.detach().clone()
    try:
        with torch.no_grad():
            return copy.deepcopy(model, memo).cpu()
    except Exception as error:  # a lock, a file, a generator among its attributes
        raise ConfigError(
            f"{where}: model {type(model).__name__} cannot be copied: {type(error).__name__}: {error}. Keep what is no "
            "weight and no setting (files, locks, loggers, loaders) out of the module."
        ) from error


def _bake(model: nn.Module, where: str, said: list[str]) -> None:
    """Make plain weights of those that are computed from others before each forward."""
    done: dict[str, list[str]] = {}
    for name, module in list(model.named_modules()):
        try:
            # Without gradients, torch would leave a buffer where the parameter was.
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for what in _baked(module):
                    done.setdefault(what, []).append(name or type(model).__name__)
        except Exception as error:  # a parametrization of the user's own may raise anything
            raise ConfigError(
                f"{where}: the weight of layer {name!r} is computed from other tensors, and cannot be made plain: "
                f"{type(error).__name__}: {error}. Take that off the layer before "
                "(torch.nn.utils.parametrize.remove_parametrizations)."
            ) from error
    said += [f"{what} of {_listed(names)} became plain weights" for what, names in done.items()]


def _baked(module: nn.Module) -> Iterator[str]:
    if parametrize.is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        for key in list(module.parametrizations):
            steps = module.parametrizations[key].children()
            kinds = " and ".join(type(step).__name__.strip("_") for step in steps)
            parametrize.remove_parametrizations(module, key, leave_parametrized=True)
            yield f"the parametrization {kinds}"
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
            yield "the pruning mask"
        elif (remove := _NORMS.get(type(hook).__name__)) is not None and hasattr(hook, "name"):
            getattr(torch.nn.utils, remove)(module, hook.name)
            yield f"the {type(hook).__name__}"


def _plain_numbers(model: nn.Module, said: list[str]) -> None:
    """Have every number of the model in fp32, and every weight ready to be trained."""
    other = {
        t.dtype for m in model.modules() for _, t in _tensors(m) if t.is_floating_point() and t.dtype != torch.float32
    }
    if other:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in other))
        model.float()
        said.append(f"weights in {names} became float32; engines choose their own dtype")
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if frozen:
        said.append(f"{len(frozen)} frozen parameters ({_listed(frozen)}) are trained as well when fine-tuning")


def _tensors_alone(model: nn.Module) -> None:
    """Have the model's state dict hold tensors alone, also where modules put more into it (``get_extra_state``)."""
    own = [name for name, module in model.named_modules() if _has_extra_state(module)]
    if not own:
        return

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for key in [key for key, value in state.items() if not isinstance(value, Tensor)]:
            del state[key]

    def fill(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in own:
            with suppress(AttributeError):  # a block that was removed
                state.setdefault(f"{prefix}{_joined(name, _EXTRA)}", module.get_submodule(name).get_extra_state())

    model._register_state_dict_hook(drop)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(fill)  # type: ignore[no-untyped-call]


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
