"""The ``cifar10`` task: CIFAR ResNets and VGG-11 on CIFAR-10 from image files or as torchvision stores it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from autocompress._optional import optional
from autocompress.config import TaskConfig
from autocompress.errors import ConfigError, nearest
from autocompress.tasks.augmentation import Augmentation
from autocompress.tasks.base import Task
from autocompress.tasks.cifar_models import CIFAR_MODELS
from autocompress.tasks.classification import ClassificationTask
from autocompress.tasks.images import Classes, Pixels, Preprocess, read_images
from autocompress.tasks.samples import IMAGENET
from autocompress.tasks.weights import load_weights

_CLASSES, _SIDE = 10, 32
_STORED = "cifar-10-batches-py"  # the folder torchvision makes

Split = tuple[Tensor, Tensor]
T = TypeVar("T")


def cifar10(config: TaskConfig) -> Task:
    """Return CIFAR-10 with one of `CIFAR_MODELS`.

    Raises:
        ConfigError: Model, weights or data are missing or cannot be used.
    """
    if config.model is None or config.model not in CIFAR_MODELS:
        raise ConfigError(
            f"Task cifar10: unknown task.model {config.model!r}.{nearest(str(config.model), CIFAR_MODELS)}"
        )
    if config.weights is None:
        raise ConfigError(
            f"Task cifar10: give task.weights, a safetensors file with trained weights of {config.model}."
        )
    if config.data is None:
        raise ConfigError(
            "Task cifar10: give task.data, a folder or .tar with train/<class>/<image> and test/<class>/<image>, or "
            f"the folder {_STORED} that torchvision makes."
        )
    model = CIFAR_MODELS[config.model]()
    load_weights(model, config.weights)
    data = Path(config.data).expanduser()
    folder = stored_folder(data)
    train, test, validation = _image_files(data) if folder is None else (*read_stored_cifar10(folder), None)
    return ClassificationTask(
        model,
        train,
        test,
        validation,
        name=f"cifar10-{config.model}",
        normalization=IMAGENET,
        augmentation=Augmentation(padding=4, flip=True),
        validation_fraction=config.validation_fraction,
        calibration_size=config.calibration_size,
        seed=config.seed,
    )


def stored_folder(data: Path) -> Path | None:
    """Return the ``cifar-10-batches-py`` folder that `data` is or holds, or None."""
    return next((folder for folder in (data, data / _STORED) if folder.name == _STORED and folder.is_dir()), None)


def read_stored_cifar10(folder: Path) -> tuple[Split, Split]:
    """Return train and test ``(images uint8 (N, 3, 32, 32), classes (N,))`` of torchvision's CIFAR-10 folder.

    These files are pickles, read because the user pointed at them; torchvision checks their MD5 sums first.

    Raises:
        ConfigError: Files are missing or damaged.
    """
    datasets = optional("torchvision.datasets", "vision", f"Reading {folder}")
    parts = []
    for train in (True, False):
        try:
            with warnings.catch_warnings():
                # The files were pickled by an old NumPy; a new one warns about their dtypes.
                warnings.filterwarnings("ignore", category=np.exceptions.VisibleDeprecationWarning)
                stored = datasets.CIFAR10(root=str(folder.parent), train=train, download=False)
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"Data {folder} are not a whole CIFAR-10 as torchvision stores it: {error}") from error
        images = torch.from_numpy(np.ascontiguousarray(stored.data.transpose(0, 3, 1, 2)))
        parts.append((images, torch.tensor(stored.targets)))
    return parts[0], parts[1]


def as_tensors(arrays: tuple[Pixels, Classes]) -> Split:
    """Return images and classes as tensors that share the arrays' memory."""
    return torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1])


def split_roles(parts: Mapping[str, T]) -> tuple[T, T, T | None]:
    """Return train, test and validation: ``val`` is validation beside ``test``, and stands in for it where alone."""
    if "test" in parts:
        return parts["train"], parts["test"], parts.get("val")
    return parts["train"], parts["val"], None


def _image_files(data: Path) -> tuple[Split, Split, Split | None]:
    images = read_images(data, Preprocess(crop=_SIDE))
    if len(images.classes) != _CLASSES:
        raise ConfigError(f"Data {data} have {len(images.classes)} classes but CIFAR-10 models tell {_CLASSES} apart.")
    return split_roles({split: as_tensors(arrays) for split, arrays in images.splits.items()})
