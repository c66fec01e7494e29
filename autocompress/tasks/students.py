"""Smaller models by name, to be taught by a task's own: a factory of the user's, or a known network."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import nn

from autocompress._optional import optional
from autocompress.config import TaskConfig
from autocompress.errors import ConfigError, nearest
from autocompress.tasks.cifar_models import CIFAR_MODELS
from autocompress.tasks.user_code import from_user
from autocompress.tasks.weights import load_weights

# What is before the colon to "module:builder"; a builder takes a name and a number of classes.
_LIBRARIES = {
    "torchvision": ("vision", "autocompress.tasks.vision:build_model"),
    "timm": ("timm", "autocompress.tasks.timm_models:build_model"),
}
_FORMS = ("torchvision:<model>", "timm:<model>", "<module>:<factory>")


def load_student(name: str, config: TaskConfig, classes: int, weights: str | None = None) -> nn.Module:
    """Return a model that is to be trained, with random weights unless it brings its own.

    Args:
        name: ``module:factory``, ``torchvision:MODEL``, ``timm:MODEL``, or one of the networks of the task ``cifar10``.
        config: What a factory that takes an argument gets; its seed makes random weights repeatable.
        classes: Width of the outputs, for models known by name. Those of CIFAR have ten.
        weights: Safetensors file to begin with.

    Raises:
        ConfigError: There is no such model, or the weights do not fit it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = _named(name, config, classes)
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def _named(name: str, config: TaskConfig, classes: int) -> nn.Module:
    where = f"Student {name!r}"
    prefix, separator, rest = name.partition(":")
    if prefix in _LIBRARIES and separator:
        extra, place = _LIBRARIES[prefix]
        optional(prefix, extra, where)
        module, _, attribute = place.partition(":")
        build: Callable[[str, int], nn.Module] = getattr(importlib.import_module(module), attribute)
        return build(rest, classes)
    if not separator:
        if name not in CIFAR_MODELS:
            raise ConfigError(f"Unknown student {name!r}.{nearest(name, (*CIFAR_MODELS, *_FORMS))}")
        return CIFAR_MODELS[name]()
    model = from_user(where, name, config, returns="torch.nn.Module")
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{where}: {rest!r} in module {prefix!r} returned a {type(model).__name__}, not a torch.nn.Module."
        )
    return model
