from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from autocompress.config import TaskConfig
from autocompress.errors import ConfigError
from autocompress.tasks import ClassificationTask, LabelFreeTask, Task, UnlabelledTask, load_task, measured_by
from tests.tasks.conftest import seeded_model
from tests.tasks.contract import TaskContract


def inputs(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Module:
    return seeded_model(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))


def unlabelled(outputs: str = "classes") -> UnlabelledTask:
    return UnlabelledTask(network(), inputs(40), inputs(10, 1), outputs=outputs, calibration_size=16)


class TestLabelFreeTask(TaskContract):
    @pytest.fixture
    def task(self) -> Task:
        return LabelFreeTask(unlabelled())

    @pytest.fixture
    def again(self) -> Task:
        return LabelFreeTask(unlabelled())


@pytest.mark.parametrize("metric", ["top1", "cosine", "kl"])
def test_the_uncompressed_model_agrees_with_itself(metric: str) -> None:
    task = LabelFreeTask(unlabelled(), metric)
    x, targets = next(task.validation(64))
    with torch.no_grad():
        outputs = task.model()(x)
    assert task.metric(outputs, targets) == pytest.approx(1)
    assert task.metric(-outputs, targets) < 0.9
    assert float(task.loss(outputs, targets)) < float(task.loss(-outputs, targets))


def test_the_metrics_are_what_they_say() -> None:
    outputs = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert LabelFreeTask(unlabelled(), "top1").metric(outputs, torch.tensor([0, 0])) == 0.5
    # Cosines 1 and 0.6.
    assert LabelFreeTask(unlabelled(), "cosine").metric(outputs, torch.tensor([[1.0, 0.0], [0.8, 0.6]])) == (
        pytest.approx(0.8)
    )
    # Equal chances against 3 to 1: KL(0.75, 0.25 || 0.5, 0.5).
    even, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert LabelFreeTask(unlabelled(), "kl").metric(even, teacher) == pytest.approx(math.exp(-divergence))


def test_pixels_count_in_segmentation() -> None:
    scores = torch.zeros(1, 2, 2, 2)
    scores[:, 1, 0, 0] = 1
    task = LabelFreeTask(unlabelled(), "top1")
    assert task.metric(scores, torch.zeros(1, 2, 2, dtype=torch.int64)) == 0.75


def test_agreement_is_what_fits_the_model() -> None:
    assert LabelFreeTask(unlabelled("classes")).kind == "top1"
    assert LabelFreeTask(unlabelled("values")).kind == "cosine"
    with pytest.raises(ConfigError, match="agreement, top1, cosine, kl"):
        LabelFreeTask(unlabelled(), "accuracy")


def test_labels_are_not_looked_at() -> None:
    wrong = torch.zeros(40, dtype=torch.int64), torch.zeros(10, dtype=torch.int64)
    labelled = ClassificationTask(network(), (inputs(40), wrong[0]), (inputs(10, 1), wrong[1]), calibration_size=16)
    task = measured_by("agreement", labelled)
    x, targets = next(task.test(64))
    with torch.no_grad():
        assert bool((task.model()(x).argmax(1) == targets).all())
    assert task.fingerprint() != labelled.fingerprint()
    assert measured_by("agreement", task) is task
    assert measured_by(None, labelled) is labelled


def test_without_labels_the_metric_must_be_given() -> None:
    task = unlabelled()
    with pytest.raises(ConfigError, match="--metric agreement"):
        task.metric(torch.ones(1, 2), torch.zeros(1))
    with pytest.raises(ConfigError, match=r"outputs is 'label'.*Did you mean 'labels'"):
        unlabelled("label")
    with pytest.raises(ConfigError, match="found tuple"):
        UnlabelledTask(Tupled(), inputs(40), inputs(10))


class Tupled(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Inputs(Dataset[Tensor]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        return inputs(40)[index]


def test_a_dataset_of_inputs_alone_is_streamed() -> None:
    task = UnlabelledTask(network(), Inputs(), inputs(10, 1), calibration_size=16)
    same = UnlabelledTask(network(), inputs(40), inputs(10, 1), calibration_size=16)
    assert torch.equal(next(task.calibration(16)), next(same.calibration(16)))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unlabelled")
    generator = np.random.default_rng(0)
    for number in range(40):
        pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


def test_a_folder_of_images_without_labels_is_enough(images: Path) -> None:
    pytest.importorskip("torchvision")
    config = TaskConfig(name="torchvision:squeezenet1_1", weights="random", data=str(images), calibration_size=16)
    with pytest.raises(ConfigError, match=r"no labels for what this model gives in .*--metric agreement"):
        load_task(config)
    task = load_task(config.model_copy(update={"metric": "agreement"}))
    assert task.example_inputs(1).shape == (1, 3, 224, 224)
    # Every fifth is for testing.
    assert sum(len(x) for x, _ in task.test(8)) == 8
    assert task.train_size() + sum(len(x) for x, _ in task.validation(8)) == 32
