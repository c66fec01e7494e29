"""Small real image data: files, tars and the cache they are decoded into."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

MakeFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory for one test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """Write a folder-per-class data set of distinct JPEG files."""

    def make(*, classes: int = 10, train: int = 8, test: int = 2, side: int = 32, held: str = "test") -> Path:
        root = tmp_path_factory.mktemp("images")
        generator = np.random.default_rng(0)
        for split, count in (("train", train), (held, test)):
            for label in range(classes):
                folder = root / split / f"class{label}"
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number:04d}.jpg", quality=90)
        return root

    return make


@pytest.fixture(scope="session")
def cifar_folder(make_folder: MakeFolder) -> Path:
    """Ten classes of 32x32 images: 80 for training, 20 for testing. Read only."""
    return make_folder()


@pytest.fixture(scope="session")
def cifar_tar(cifar_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cifar_folder` as a tar. Read only."""
    path = tmp_path_factory.mktemp("tar") / "cifar.tar"
    pack(cifar_folder, path)
    return path


def pack(folder: Path, path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for split in sorted(folder.iterdir()):
            archive.add(split, split.name)


def save_weights(model: nn.Module, path: Path) -> Path:
    save_file({name: value.clone() for name, value in model.state_dict().items()}, path)
    return path


def seeded_model(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()
