"""Any model that takes images, known by name, with the user's data, labelled or not, or noise where there is none."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from autocompress._optional import optional
from autocompress.config import TaskConfig
from autocompress.errors import ConfigError
from autocompress.tasks.augmentation import Augmentation
from autocompress.tasks.base import Task
from autocompress.tasks.cifar import as_tensors, read_stored_cifar10, split_roles, stored_folder
from autocompress.tasks.classification import ClassificationTask
from autocompress.tasks.images import Preprocess, has_classes, list_images, list_unlabelled, read_images
from autocompress.tasks.label_free import UnlabelledTask
from autocompress.tasks.samples import Normalization
from autocompress.tasks.split import Data
from autocompress.tasks.weights import apply_weights, read_weights

RANDOM = "random"
IMAGENET_CLASSES = 1000
_NOISE_SIZE = 256  # samples made where random weights come without data
# Decoded image folders up to this many bytes are kept in memory and in the cache directory; larger ones are streamed.
_IN_MEMORY_BYTES = 512 * 2**20
_READERS = 2  # processes that decode a streamed folder
_FASHION = "FashionMNIST"
_OFF = 1e-3  # the largest weight of a layer that is switched off
_HELD_OUT = 5  # every fifth unlabelled image is for testing, where there is no folder for that


@dataclass(frozen=True)
class ImageModel:
    """A model by name.

    Attributes:
        title: Short name for tables and folders.
        preprocess, normalization: What its images go through.
        build: Makes it with random weights for a number of classes.
        load: Makes it with the weights named.
        published: Names of weights that `load` knows besides files.
        outputs: ``"logits"`` ``(N, classes)``; ``"classes"``, as logits for every pixel; or ``"values"``.
    """

    title: str
    preprocess: Preprocess
    normalization: Normalization
    build: Callable[[int], nn.Module]
    load: Callable[[str], nn.Module]
    published: Sequence[str] = ()
    outputs: str = "logits"


def image_task(config: TaskConfig, model: ImageModel) -> Task:
    """Return the task of a named model with its data.

    Raises:
        ConfigError: Weights or data are missing or cannot be used, or their classes differ.
    """
    where = f"Task {config.name!r}"
    if config.model is not None:
        raise ConfigError(f"{where} names its model already; remove task.model: {config.model}.")
    if config.weights is None:
        names = f"the name of published weights ({', '.join(model.published)}), " if model.published else ""
        raise ConfigError(
            f"{where}: give task.weights: a safetensors file, {names}or 'random' to measure latency only."
        )
    if config.data is None and config.weights != RANDOM:
        raise ConfigError(
            f"{where}: give task.data: a folder with train/<class>/<image> and val/ or test/, a folder of images "
            "without labels (with task.metric: agreement), or CIFAR-10 or Fashion-MNIST as torchvision stores them."
        )
    path = None if config.data is None else Path(config.data).expanduser()
    labelled = model.outputs == "logits" and (path is None or stored(path) or has_classes(path))
    if not labelled and config.metric is None:
        raise ConfigError(
            f"{where}: there are no labels for what this model gives{'' if path is None else f' in {path}'}. Give "
            "--metric agreement (task.metric) to measure by the uncompressed model's own outputs."
        )
    network = None if config.weights == RANDOM else model.load(config.weights)
    options: dict[str, Any] = {
        "name": model.title,
        "normalization": model.normalization,
        "validation_fraction": config.validation_fraction,
        "calibration_size": config.calibration_size,
        "workers": min(_READERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0),
        "seed": config.seed,
    }
    if not labelled:
        side = model.preprocess.crop
        inputs, test = (_noise(side), _noise(side, 1)) if path is None else _unlabelled(path, model.preprocess)
        network = network or _seeded(config, model, IMAGENET_CLASSES)
        outputs = "values" if model.outputs == "values" else "classes"
        return UnlabelledTask(network, inputs, test, outputs=outputs, **options)
    side, classes = model.preprocess.crop, IMAGENET_CLASSES
    train: Data
    test_data: Data
    train, test_data, validation = _noise(side), _noise(side), None
    if path is not None:
        train, test_data, validation, classes, side = _data(path, model.preprocess)
    network = network or _seeded(config, model, classes)
    found = classes_of(network)
    if found != classes:
        raise ConfigError(
            f"{where}: the data {config.data} have {classes} classes but the model with weights {config.weights} "
            f"tells {found} apart. Use weights trained on these classes."
        )
    augmentation = Augmentation(padding=max(1, side // 8), flip=True)
    return ClassificationTask(network, train, test_data, validation, augmentation=augmentation, **options)


def _seeded(config: TaskConfig, model: ImageModel, classes: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return switch_on(model.build(classes))


def switch_on(model: nn.Module) -> nn.Module:
    """Give random values to what a builder sets to (all but) zero, and return the model.

    Heads and the ends of residual branches often start at zero for the sake of training. A model of random weights is
    run and compared, and what is zero would hide whatever lies behind it.
    """
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias") or float(value.abs().max()) > _OFF:
                continue
            if value.ndim > 1 and min(value.shape) > 1:
                nn.init.normal_(value, std=0.02)
            else:
                nn.init.uniform_(value, 0.5, 1.0)
    return model


def load_file(build: Callable[[int], nn.Module], weights: str, ignored: tuple[str, ...] = ()) -> nn.Module:
    """Return a classifier with a safetensors file of the user's, whose head says how many classes there are.

    Raises:
        ConfigError: The file cannot be read or does not fit.
    """
    state = {key: value for key, value in read_weights(weights).items() if not key.startswith(ignored or "\0")}
    model = build(IMAGENET_CLASSES)
    head = state.get(f"{_head(model)[0]}.weight")
    if head is not None and head.ndim > 0 and len(head) != IMAGENET_CLASSES:
        model = build(len(head))
    apply_weights(model, state, weights)
    return model


def _head(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the name and module of the layer that makes the logits: the last linear or convolution."""
    layers = [(key, module) for key, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return layers[-1]


def classes_of(model: nn.Module) -> int:
    """Return how many classes a classifier tells apart, by the width of its last layer."""
    weight = _head(model)[1].weight
    return len(weight) if isinstance(weight, Tensor) else 0


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


def stored(path: Path) -> bool:
    """Return whether there is a data set as torchvision stores it."""
    return stored_folder(path) is not None or (path / _FASHION / "raw").is_dir()


def _unlabelled(path: Path, preprocess: Preprocess) -> tuple[Dataset[Any], Dataset[Any]]:
    """Return training and test images without labels."""
    splits = list_unlabelled(path)
    train, test = splits["train"], splits.get("test") or splits.get("val")
    if not test:
        train, test = [file for number, file in enumerate(train) if number % _HELD_OUT], train[::_HELD_OUT]
    first, second = (FolderDataset([(file, 0) for file in files], preprocess) for files in (train, test))
    return first, second


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
    torchvision = optional("torchvision", "vision", "Fashion-MNIST")
    parts = []
    for train in (True, False):
        try:
            stored = torchvision.datasets.FashionMNIST(root=str(path), train=train, download=False)
        except (RuntimeError, OSError, ValueError) as error:
            raise ConfigError(f"Data {path / _FASHION} are not a whole Fashion-MNIST: {error}") from error
        parts.append((stored.data[:, None].expand(-1, 3, -1, -1).contiguous(), stored.targets))
    return parts[0], parts[1]


def _noise(side: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    images = torch.randint(0, 256, (_NOISE_SIZE, 3, side, side), generator=torch.Generator().manual_seed(seed))
    return images.to(torch.uint8), torch.arange(_NOISE_SIZE) % IMAGENET_CLASSES
