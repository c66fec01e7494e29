"""Data as people have them: dicts, loaders, other labels, samples that raise, NaN; channels that are dead or huge."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from autocompress import ClassificationTask
from benchmarks.cases.making import CLASSES, Data, Plain, fitted, gratings, images_task, sizes


class Items(Dataset[Any]):
    """Gratings in one of the forms that datasets give.

    Args:
        count: Samples.
        seed: Of the images.
        form: Which.
    """

    def __init__(self, count: int, seed: int, form: str = "") -> None:
        (self._images, self._targets), self._form = gratings(count, seed), form

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Any:
        image, target = self._images[index], self._targets[index]
        if self._form == "broken" and index % 100 == 7:
            raise OSError("image file is truncated (12 bytes not processed)")
        forms: dict[str, Any] = {
            "dict": {"image": image, "label": int(target)},
            "one-hot": (image, F.one_hot(target, CLASSES)),
            "triple": (image, int(target), f"file-{index}.png"),
            "unlabelled": (image, -1 if index % 10 == 0 else int(target)),
            "from-one": (image, int(target) + 1),
            "numpy": (image, target.numpy()),
        }
        return forms.get(self._form, (image, int(target)))


def _task(form: str, *, broken: bool = False) -> ClassificationTask:
    train, validation, test = sizes().values()
    model = fitted(Plain, "plain")
    others = "" if broken else form
    return ClassificationTask(
        model,
        train=Items(train, 1, form),
        validation=Items(validation, 2, others),
        test=Items(test, 3, others),
        name=f"data-{form}",
    )


def dicts() -> ClassificationTask:
    """Samples are dicts."""
    return _task("dict")


def one_hot() -> ClassificationTask:
    """Labels are one-hot."""
    return _task("one-hot")


def triples() -> ClassificationTask:
    """Samples are triples with the name of a file."""
    return _task("triple")


def numpy_labels() -> ClassificationTask:
    """Labels are arrays of numpy's without axes."""
    return _task("numpy")


def broken_sample() -> ClassificationTask:
    """One training sample in a hundred raises."""
    return _task("broken", broken=True)


def without_labels() -> ClassificationTask:
    """A tenth of the labels is -1."""
    return _task("unlabelled")


def labels_from_one() -> ClassificationTask:
    """Labels count from 1."""
    return _task("from-one")


def loaders() -> ClassificationTask:
    """DataLoaders instead of datasets."""
    train, _, test = sizes().values()
    loaded = [DataLoader(Items(count, seed), batch_size=64) for count, seed in ((train, 1), (test, 3))]
    return ClassificationTask(fitted(Plain, "plain"), train=loaded[0], test=loaded[1], name="data-loaders")


def _with_nan(count: int, seed: int) -> Data:
    images, targets = gratings(count, seed)
    if seed == 1:
        images[::50, 0, 3, 3] = float("nan")
        images[7::500, 0, 3, 3] = float("inf")
    return images, targets


def nan_in_training_images() -> ClassificationTask:
    """One training image in fifty holds a NaN, one in five hundred an infinity."""
    return images_task(fitted(Plain, "plain"), "nan-in-training-images", _with_nan)


class DeadAndHuge(nn.Module):
    """A network to be given channels that are dead or huge; the second layer has no norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 48, 5, padding=2), nn.BatchNorm2d(48)
        self.b = nn.Conv2d(48, 64, 3, 2, 1)
        self.c, self.nc = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, CLASSES)
        self.kill()

    def kill(self) -> None:
        """Make a quarter of the first layer's channels give zero."""
        with torch.no_grad():
            for tensor in (self.a.weight, self.a.bias, self.na.weight, self.na.bias):
                tensor[:12] = 0  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.na(self.a(x)))))
        scores: Tensor = self.fc(F.relu(self.nc(self.c(x))).mean((2, 3)))
        return scores


def dead_and_huge_channels() -> ClassificationTask:
    """A quarter of the first layer dead, variances of 0 included; one channel of the second 10,000 times as large.

    The third layer takes that back, so that the network computes what it did.
    """
    model = fitted(DeadAndHuge, "dead-and-huge")
    assert isinstance(model, DeadAndHuge) and model.b.bias is not None
    model.kill()
    with torch.no_grad():
        for statistics in (model.na.running_mean, model.na.running_var):
            assert statistics is not None
            statistics[:12] = 0
        model.b.weight[5] *= 1e4
        model.b.bias[5] *= 1e4
        model.c.weight[:, 5] *= 1e-4
    return images_task(model, "dead-and-huge")
