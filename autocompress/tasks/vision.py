"""The ``torchvision:<model>`` tasks: any torchvision classifier with weights and data of the user's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from autocompress.config import TaskConfig
from autocompress.errors import ConfigError, nearest
from autocompress.tasks.augmentation import Augmentation
from autocompress.tasks.base import Task
from autocompress.tasks.cifar import as_tensors, read_stored_cifar10, split_roles, stored_folder
from autocompress.tasks.classification import ClassificationTask, Data
from autocompress.tasks.images import Preprocess, list_images, read_images
from autocompress.tasks.samples import IMAGENET, Normalization
from autocompress.tasks.weights import apply_weights, read_weights

_IMAGENET_CLASSES = 1000
_RANDOM = "random"
_NOISE_SIZE = 256  # samples made where random weights come without data
# Decoded image folders up to this many bytes are kept in memory and in the cache directory; larger ones are streamed.
_IN_MEMORY_BYTES = 512 * 2**20
_READERS = 2  # processes that decode a streamed folder
_FASHION = "FashionMNIST"
# Their builders warn about slow initialisation and return auxiliary outputs in training unless told otherwise.
_WITHOUT_AUXILIARY = {
    "googlenet": {"init_weights": False, "aux_logits": False},
    "inception_v3": {"init_weights": False, "aux_logits": False},
}
_NO_AUXILIARY = {"aux_logits": False, "aux1": None, "aux2": None, "AuxLogits": None}
_AUXILIARY_KEYS = ("aux1.", "aux2.", "AuxLogits.")


class FolderDataset(Dataset[tuple[Tensor, int]]):
    """Image files decoded when read: 8-bit pixels ``(3, H, W)`` and the class number."""

    def __init__(self, files: Sequence[tuple[Path, int]], preprocess: Preprocess) -> None:
        self._files, self._preprocess = files, preprocess
        self.targets = [target for _, target in files]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, target = self._files[index]
        return torch.from_numpy(self._preprocess(file, str(file))), target


def torchvision_task(config: TaskConfig, name: str) -> Task:
    """Return a torchvision classifier with its data.

    Raises:
        ConfigError: The model is unknown, weights or data are missing or cannot be used, or their classes differ.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ConfigError(f"Task {config.name!r}: unknown torchvision model {name!r}.{nearest(name, known)}")
    if config.model is not None:
        raise ConfigError(f"Task {config.name!r} names its model already; remove task.model: {config.model}.")
    if config.weights is None:
        raise ConfigError(
            f"Task {config.name!r}: give task.weights: a safetensors file, the name of torchvision weights "
            f"({', '.join(_published(name).__members__)}), or 'random' to measure latency only."
        )
    if config.data is None and config.weights != _RANDOM:
        raise ConfigError(
            f"Task {config.name!r}: give task.data: a folder with train/<class>/<image> and val/ or test/, or CIFAR-10 "
            "or Fashion-MNIST as torchvision stores them."
        )
    preprocess, normalization = _transforms(name, config.weights)
    model = None if config.weights == _RANDOM else _with_weights(name, config.weights)
    if config.data is None:
        classes, side = _IMAGENET_CLASSES, preprocess.crop
        train: Data
        test: Data
        train, test, validation = _noise(side), _noise(side), None
    else:
        train, test, validation, classes, side = _data(Path(config.data).expanduser(), preprocess)
    if model is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = _build(name, classes)
    found = _classes(model)
    if found != classes:
        raise ConfigError(
            f"Task {config.name!r}: the data {config.data} have {classes} classes but the model with weights "
            f"{config.weights} tells {found} apart. Use weights trained on these classes."
        )
    return ClassificationTask(
        model,
        train,
        test,
        validation,
        name=f"torchvision-{name}",
        normalization=normalization,
        augmentation=Augmentation(padding=max(1, side // 8), flip=True),
        validation_fraction=config.validation_fraction,
        calibration_size=config.calibration_size,
        workers=min(_READERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0),
        seed=config.seed,
    )


def _published(name: str) -> Any:
    return torchvision.models.get_model_weights(name)


def _transforms(name: str, weights: str) -> tuple[Preprocess, Normalization]:
    """Return the preprocessing of the named weights; of the model's first ones where weights are the user's."""
    published = _published(name).__members__
    chosen = published.get(weights) or next(iter(published.values()), None)
    if chosen is None:
        return Preprocess(crop=224, resize=256), IMAGENET
    transforms = chosen.transforms()
    resample = Image.Resampling[transforms.interpolation.name]
    preprocess = Preprocess(int(transforms.crop_size[0]), int(transforms.resize_size[0]), int(resample))
    return preprocess, Normalization(tuple(transforms.mean), tuple(transforms.std))


def _build(name: str, classes: int) -> nn.Module:
    model: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=classes, **_WITHOUT_AUXILIARY.get(name, {})
    )
    return model


def _with_weights(name: str, weights: str) -> nn.Module:
    published = _published(name).__members__
    if weights in published:
        try:
            model: nn.Module = torchvision.models.get_model(name, weights=published[weights])
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"torchvision cannot fetch the weights {weights!r} of {name}: {error}. Fetch them on a machine with a "
                "network, save them with safetensors.torch.save_file, and pass that file as task.weights."
            ) from error
        for attribute, value in _NO_AUXILIARY.items():
            if hasattr(model, attribute):
                setattr(model, attribute, value)
        return model
    if not Path(weights).expanduser().exists():
        raise ConfigError(
            f"task.weights {weights!r} is neither a file nor weights of {name}."
            f"{nearest(weights, (*published, _RANDOM))}"
        )
    state = {key: value for key, value in read_weights(weights).items() if not key.startswith(_AUXILIARY_KEYS)}
    model = _build(name, _IMAGENET_CLASSES)
    head = state.get(f"{_head(model)[0]}.weight")
    if head is not None and head.ndim > 0 and len(head) != _IMAGENET_CLASSES:
        model = _build(name, len(head))
    apply_weights(model, state, weights)
    return model


def _head(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the name and module of the layer that makes the logits: the last linear or convolution."""
    layers = [(key, module) for key, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return layers[-1]


def _classes(model: nn.Module) -> int:
    weight = _head(model)[1].weight
    return len(weight) if isinstance(weight, Tensor) else 0


def _data(path: Path, preprocess: Preprocess) -> tuple[Data, Data, Data | None, int, int]:
    """Return train, test, validation (or None), the number of classes, and the images' side in pixels."""
    stored = stored_folder(path)
    if stored is not None:
        train, test = read_stored_cifar10(stored)
        return train, test, None, 10, 32
    if (path / _FASHION / "raw").is_dir():
        return *_fashion_mnist(path), None, 10, 28
    if path.is_file():
        raise ConfigError(f"Data {path} are a file; unpack them and point task.data at the folder.")
    files, classes = list_images(path)
    if sum(map(len, files.values())) * 3 * preprocess.crop**2 <= _IN_MEMORY_BYTES:
        arrays = read_images(path, preprocess).splits
        parts: dict[str, Data] = {split: as_tensors(pair) for split, pair in arrays.items()}
    else:
        parts = {split: FolderDataset(items, preprocess) for split, items in files.items()}
    return *split_roles(parts), len(classes), preprocess.crop


def _fashion_mnist(path: Path) -> tuple[Data, Data]:
    """Return train and test with the one channel repeated to three, as torchvision's networks take."""
    parts = []
    for train in (True, False):
        try:
            stored = torchvision.datasets.FashionMNIST(root=str(path), train=train, download=False)
        except (RuntimeError, OSError, ValueError) as error:
            raise ConfigError(f"Data {path / _FASHION} are not a whole Fashion-MNIST: {error}") from error
        parts.append((stored.data[:, None].expand(-1, 3, -1, -1).contiguous(), stored.targets))
    return parts[0], parts[1]


def _noise(side: int) -> Data:
    images = torch.randint(0, 256, (_NOISE_SIZE, 3, side, side), generator=torch.Generator().manual_seed(0))
    return images.to(torch.uint8), torch.arange(_NOISE_SIZE) % _IMAGENET_CLASSES
