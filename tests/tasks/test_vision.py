from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import nn

from autocompress.config import TaskConfig
from autocompress.errors import ConfigError
from autocompress.tasks import Task, load_task
from tests.tasks.conftest import MakeFolder, save_weights, seeded_model
from tests.tasks.contract import TaskContract, joined, same

torchvision = pytest.importorskip("torchvision")
from autocompress.tasks import image_task, vision  # noqa: E402


def network(name: str = "squeezenet1_1", classes: int = 3) -> nn.Module:
    return seeded_model(lambda: torchvision.models.get_model(name, num_classes=classes))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_weights(network(), tmp_path_factory.mktemp("weights") / "own.safetensors"))


@pytest.fixture(scope="module")
def folder(make_folder: MakeFolder) -> str:
    return str(make_folder(classes=3, train=6, test=2, side=48))


@pytest.fixture(autouse=True)
def _small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every model take 64-pixel crops, so that the tests are quick."""
    original = vision._transforms

    def small(name: str, weights: str) -> Any:
        preprocess, normalization = original(name, weights)
        return type(preprocess)(64, 72, preprocess.resample), normalization

    monkeypatch.setattr(vision, "_transforms", small)


def load(name: str = "squeezenet1_1", **options: Any) -> Task:
    return load_task(TaskConfig(**{"name": f"torchvision:{name}", "validation_fraction": 0.2, **options}))


class TestFolder(TaskContract):
    @pytest.fixture
    def task(self, weights: str, folder: str) -> Task:
        return load(weights=weights, data=folder)

    @pytest.fixture
    def again(self, weights: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> Task:
        """Streamed: where the pixels are kept must not show."""
        monkeypatch.setattr(image_task, "_IN_MEMORY_BYTES", 0)
        monkeypatch.setattr(image_task, "_READERS", 0)
        return load(weights=weights, data=folder)


def test_a_large_folder_is_streamed_by_workers(weights: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = load(weights=weights, data=folder)
    monkeypatch.setattr(image_task, "_IN_MEMORY_BYTES", 0)
    assert same(joined(load(weights=weights, data=folder).train_batches(4, 1)), joined(held.train_batches(4, 1)))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "googlenet", "regnet_y_400mf"])
def test_the_head_is_fitted_to_the_weights(
    name: str, folder: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = seeded_model(lambda: vision.build_model(name, 3))
    file = save_weights(model, tmp_path / "own.safetensors")
    got = load(name, weights=str(file), data=folder).model()
    assert all(torch.equal(value, got.state_dict()[key]) for key, value in model.state_dict().items())
    with torch.inference_mode():
        assert got(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert isinstance(got.train()(torch.randn(2, 3, 64, 64)), torch.Tensor)


def test_random_weights_need_no_data() -> None:
    task = load("mobilenet_v3_small", weights="random")
    assert task.example_inputs().shape == (1, 3, 64, 64)
    assert task.model()(task.example_inputs()).shape == (1, 1000)
    assert task.fingerprint() == load("mobilenet_v3_small", weights="random").fingerprint()


def test_random_weights_with_data_have_their_classes(folder: str) -> None:
    task = load(weights="random", data=folder)
    assert task.model()(task.example_inputs()).shape == (1, 3)


def write_fashion_mnist(root: Path) -> None:
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 10)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            header = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
            (raw / f"{prefix}-{kind}").write_bytes(header + array.tobytes())
            (raw / f"{prefix}-{kind}.gz").write_bytes(gzip.compress(header + array.tobytes()))


def test_fashion_mnist_is_repeated_to_three_channels(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    file = save_weights(network("resnet18", 10), tmp_path / "own.safetensors")
    task = load("resnet18", weights=str(file), data=str(tmp_path))
    inputs, targets = joined(task.test(10))
    assert inputs.shape == (10, 3, 28, 28)
    assert targets.tolist() == list(range(10))
    back = [
        inputs[:, i] * s + m for i, (m, s) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True))
    ]
    torch.testing.assert_close(back[0], back[2])
    assert task.train_size() == 32


def test_damaged_fashion_mnist_is_told(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    (tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte").unlink()
    with pytest.raises(ConfigError, match="not a whole Fashion-MNIST"):
        load("resnet18", weights="random", data=str(tmp_path))


def test_published_weights_that_cannot_be_fetched_are_told(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(
        ConfigError, match=r"cannot fetch the weights 'DEFAULT' of resnet18: .*no network.*pass that file"
    ):
        load("resnet18", weights="DEFAULT", data=folder)


def test_published_weights_are_used_without_auxiliary_heads(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {}

    def stored(*_: object, **__: object) -> dict[str, torch.Tensor]:
        if not state:
            model = torchvision.models.googlenet(init_weights=False, aux_logits=True)
            state.update({key: torch.full_like(value, 0.01) for key, value in model.state_dict().items()})
        return state

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", stored)
    model = vision._with_weights("googlenet", "IMAGENET1K_V1")
    assert not [key for key in model.state_dict() if key.startswith("aux")]
    assert isinstance(model.train()(torch.randn(2, 3, 64, 64)), torch.Tensor)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, r"unknown torchvision model 'resnet19'\. Did you mean 'resnet1\d\d?'\?"),
        ("resnet18", {"weights": None}, r"give task\.weights: a safetensors file.*IMAGENET1K_V1.*'random'"),
        ("resnet18", {"data": None}, r"give task\.data"),
        ("resnet18", {"model": "resnet18"}, r"names its model already"),
        (
            "resnet18",
            {"weights": "IMAGENET1K_V3"},
            r"neither a file nor weights of resnet18\. Did you mean 'IMAGENET1K_V1'",
        ),
        ("resnet18", {}, r"do not fit the model ResNet"),
        ("squeezenet1_1", {"data": "absent"}, r"Data folder absent does not exist"),
        ("squeezenet1_1", {"data": __file__}, r"are a file; unpack them"),
        ("vit_b_16", {"weights": "random"}, r"does not take inputs \(1, 3, 64, 64\)"),
    ],
)
def test_what_is_missing_or_wrong_is_told(
    weights: str, folder: str, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(name, **{"weights": weights, "data": folder, **options})


def test_other_classes_than_the_weights_are_told_with_both_numbers(weights: str, make_folder: MakeFolder) -> None:
    data = str(make_folder(classes=2, train=2, test=1))
    with pytest.raises(ConfigError, match=r"have 2 classes but the model with weights .* tells 3 apart"):
        load(weights=weights, data=data)


def test_preprocessing_is_the_weights_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for weights, crop, resize in (("IMAGENET1K_V1", 224, 256), ("DEFAULT", 224, 232), ("own.safetensors", 224, 256)):
        preprocess, normalization = vision._transforms("resnet50", weights)
        assert (preprocess.crop, preprocess.resize) == (crop, resize)
        assert normalization.mean == (0.485, 0.456, 0.406)
    assert vision._transforms("inception_v3", "own.safetensors")[0].crop == 299
