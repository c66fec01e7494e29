from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autocompress.config import TaskConfig
from autocompress.errors import ConfigError
from autocompress.tasks import Task, load_task
from autocompress.tasks.cifar_models import CIFAR_MODELS
from tests.tasks.conftest import MakeFolder, pack, save_weights, seeded_model
from tests.tasks.contract import TaskContract, joined


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet20.safetensors"
    return save_weights(seeded_model(CIFAR_MODELS["resnet20"]), path)


def load(weights: Path | None, data: Path | None, **options: Any) -> Task:
    texts = {key: None if value is None else str(value) for key, value in (("weights", weights), ("data", data))}
    return load_task(TaskConfig(**{"name": "cifar10", "model": "resnet20", **texts, **options}))


class TestCifar(TaskContract):
    @pytest.fixture
    def task(self, weights: Path, cifar_folder: Path) -> Task:
        return load(weights, cifar_folder)

    @pytest.fixture
    def again(self, weights: Path, cifar_tar: Path) -> Task:
        return load(weights, cifar_tar)


def test_the_task_is_named_after_its_model_and_normalised(weights: Path, cifar_folder: Path) -> None:
    task = load(weights, cifar_folder)
    assert task.name == "cifar10-resnet20"
    inputs, targets = joined(task.test(50))
    assert inputs.shape == (20, 3, 32, 32)
    assert targets.tolist() == [i // 2 for i in range(20)]
    assert -2.2 < float(inputs.min()) < -1
    assert 1 < float(inputs.max()) < 2.7


def test_val_stands_in_for_test_where_alone(weights: Path, make_folder: MakeFolder) -> None:
    assert len(joined(load(weights, make_folder(held="val")).test(50))[1]) == 20


def test_val_beside_test_is_validation(weights: Path, make_folder: MakeFolder) -> None:
    folder = make_folder(train=4, test=2)
    (make_folder(train=1, test=1, held="valid") / "valid").rename(folder / "valid")
    task = load(weights, folder)
    assert task.train_size() == 40
    assert len(joined(task.validation(50))[1]) == 10


def test_torchvisions_own_folder_is_read(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    with pytest.raises(ConfigError, match="not a whole CIFAR-10 as torchvision stores it"):
        load(weights, tmp_path)
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {"data": generator.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    for path in (tmp_path, folder):
        task = load(weights, path)
        assert task.train_size() == 90
        assert task.example_inputs().shape == (1, 3, 32, 32)
    stored = pickle.loads((folder / "test_batch").read_bytes())["data"].reshape(-1, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (torch.from_numpy(stored) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(joined(task.test(20))[0], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, r"unknown task\.model None.*Available: resnet20"),
        ({"model": "vgg11"}, r"unknown task\.model 'vgg11'\. Did you mean 'vgg11_bn'\?"),
        ({"weights": None}, r"give task\.weights"),
        ({"data": None}, r"give task\.data"),
        ({"model": "vgg11_bn"}, r"do not fit the model VGG11: \d+ missing in the file: features\.0"),
        ({"data": "absent.tar"}, r"Data absent\.tar do not exist"),
    ],
)
def test_what_is_missing_or_wrong_is_told(
    weights: Path, cifar_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_task(
            TaskConfig(
                **{
                    "name": "cifar10",
                    "model": "resnet20",
                    "weights": str(weights),
                    "data": str(cifar_folder),
                    **options,
                }
            )
        )


@pytest.mark.parametrize("tarred", [True, False])
def test_other_than_ten_classes_are_told(weights: Path, make_folder: MakeFolder, tmp_path: Path, tarred: bool) -> None:
    folder = make_folder(classes=7, train=2, test=1)
    if tarred:
        pack(folder, tmp_path / "data.tar")
    with pytest.raises(ConfigError, match="have 7 classes but CIFAR-10 models tell 10 apart"):
        load(weights, tmp_path / "data.tar" if tarred else folder)
