"""The ``timm:<model>`` tasks: any model of timm (PyTorch Image Models), with the preprocessing that it asks for."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from autocompress._optional import optional
from autocompress.config import TaskConfig
from autocompress.errors import ConfigError, nearest
from autocompress.tasks.base import Task
from autocompress.tasks.image_task import ImageModel, image_task, load_file
from autocompress.tasks.images import Preprocess
from autocompress.tasks.samples import Normalization

timm: Any = optional("timm", "timm", "A timm task")


def timm_task(config: TaskConfig, name: str) -> Task:
    """Return a timm classifier with its data; weights are a safetensors file of the user's, or ``random``.

    Raises:
        ConfigError: The model is unknown, weights or data are missing or cannot be used, or their classes differ.
    """
    known = timm.list_models()
    if not timm.is_model(name):
        raise ConfigError(f"Task {config.name!r}: unknown timm model {name!r}.{nearest(name, known)}")
    wanted = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    side = int(wanted["input_size"][-1])
    resample = int(Image.Resampling[wanted["interpolation"].upper()])
    preprocess = Preprocess(side, math.floor(side / wanted["crop_pct"]), resample)
    normalization = Normalization(tuple(wanted["mean"]), tuple(wanted["std"]))
    build = partial(build_model, name)
    return image_task(config, ImageModel(f"timm-{name}", preprocess, normalization, build, partial(_load, build)))


def build_model(name: str, classes: int) -> nn.Module:
    """Return a timm classifier with random weights.

    Raises:
        ConfigError: There is no such model.
    """
    if not timm.is_model(name):
        raise ConfigError(f"Unknown timm model {name!r}.{nearest(name, timm.list_models())}")
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes)
    return model


def _load(build: partial[nn.Module], weights: str) -> nn.Module:
    if not Path(weights).expanduser().exists():
        raise ConfigError(
            f"task.weights {weights!r} is not a file. Save the model's state_dict() with "
            "safetensors.torch.save_file, or take 'random' to measure latency only."
        )
    return load_file(build, weights)
