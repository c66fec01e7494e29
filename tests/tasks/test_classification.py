from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from autocompress.errors import ConfigError
from autocompress.tasks import Augmentation, ClassificationTask, Normalization, Task
from tests.tasks.conftest import seeded_model
from tests.tasks.contract import TaskContract, joined, same

MEAN_STD = Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def pixels(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = np.random.default_rng(seed)
    images = torch.from_numpy(generator.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8))
    return images, torch.arange(count) % 4


def network(classes: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    )


class Pictures(Dataset[tuple[Tensor, int]]):
    """A map-style dataset with a random transform of its own."""

    def __init__(self, count: int, seed: int, broken: int | None = None) -> None:
        self.images, self.labels = pixels(count, seed)
        self.broken = broken

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == self.broken:
            raise ConfigError(f"picture {index} is broken")
        noise = torch.rand(()) + random.random()
        return self.images[index] / 255 + 0.01 * noise, int(self.labels[index])


def in_memory(**options: Any) -> ClassificationTask:
    values: dict[str, Any] = {
        "train": pixels(60, 0),
        "test": pixels(20, 1),
        "normalization": MEAN_STD,
        "augmentation": Augmentation(2),
    }
    return ClassificationTask(seeded_model(network), **{**values, **options})


def streamed(workers: int = 0, **options: Any) -> ClassificationTask:
    return in_memory(**{"train": Pictures(60, 0), "test": Pictures(20, 1), "workers": workers, **options})


class TestInMemory(TaskContract):
    @pytest.fixture
    def task(self) -> Task:
        return in_memory()

    @pytest.fixture
    def again(self) -> Task:
        return in_memory()


class TestStreamed(TaskContract):
    @pytest.fixture
    def task(self) -> Task:
        return streamed()

    @pytest.fixture
    def again(self) -> Task:
        return streamed()

    @pytest.fixture
    def plain(self) -> Task:
        """Random transforms of the dataset would tell equal samples apart."""
        return streamed(train=_Still(60, 0), test=_Still(20, 1), augmentation=None)


class _Still(Pictures):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index] / 255, int(self.labels[index])


class TestOwnValidation(TaskContract):
    @pytest.fixture
    def task(self) -> Task:
        return in_memory(validation=pixels(12, 2))

    @pytest.fixture
    def again(self) -> Task:
        return in_memory(validation=pixels(12, 2))

    def test_all_of_train_is_kept_for_training(self, task: Task) -> None:
        assert task.train_size() == 60
        assert len(joined(task.validation(50))[1]) == 12


def test_pixels_are_normalised_per_channel() -> None:
    images, _ = pixels(20, 1)
    got, targets = joined(in_memory().test(7))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN_STD.mean, MEAN_STD.std))
    torch.testing.assert_close(got, (images / 255 - mean) / std)
    assert targets.tolist() == [i % 4 for i in range(20)]
    torch.testing.assert_close(joined(in_memory(normalization=None).test(7))[0], images / 255)


def test_float_inputs_are_taken_as_they_are() -> None:
    inputs = torch.linspace(-3, 3, 60 * 5).view(60, 5)
    task = ClassificationTask(nn.Linear(5, 4), (inputs, torch.arange(60) % 4), (inputs, torch.arange(60) % 4))
    assert torch.equal(joined(task.test(9))[0], inputs)


def test_sizes_follow_the_options() -> None:
    task = in_memory(validation_fraction=0.25, calibration_size=10)
    assert task.train_size() == 45
    assert len(joined(task.validation(64))[1]) == 15
    assert sum(len(x) for x in task.calibration(4)) == 10
    assert sum(len(x) for x in in_memory(calibration_size=10**6).calibration(64)) == 54


def test_without_validation_data_half_of_the_test_data_validates() -> None:
    task = in_memory(train=pixels(60, 0), test=pixels(240, 1), normalization=None)
    assert task.train_size() == 60 and task.test_size() == 120
    halves = [joined(batches) for batches in (task.validation(64), task.test(64))]
    for _, targets in halves:
        assert torch.bincount(targets).tolist() == [30, 30, 30, 30]
    rows = [{row.numpy().tobytes() for row in inputs} for inputs, _ in halves]
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] == {row.numpy().tobytes() for row in pixels(240, 1)[0] / 255}
    assert task.known_targets()["test"].tolist() == halves[1][1].tolist()
    assert task.fingerprint()["validation"] == task.fingerprint()["test"] == 120
    assert "120 of the 240 test samples are for validation, the other 120 are tested on" in task.data_notes[0]
    assert "of the test data" in task.sample_name("validation", 0)
    assert task.sample_name("test", 0) != task.sample_name("validation", 0)


@pytest.mark.parametrize(
    ("options", "held", "notes"),
    [
        ({"test": pixels(199, 1)}, 6, 1),  # halves of 99 would tell too little
        ({"test": pixels(240, 1), "validation_fraction": 0.25}, 15, 0),  # the network has not seen all of train
    ],
)
def test_a_part_of_train_validates(options: dict[str, Any], held: int, notes: int) -> None:
    task = in_memory(**options)
    assert (task.train_size(), task.test_size()) == (60 - held, len(options["test"][1]))
    assert len(joined(task.validation(64))[1]) == held
    assert "of the training data" in task.sample_name("validation", 0)
    assert len(task.data_notes) == notes
    assert all(note.startswith(f"{held} of the training samples are for validation") for note in task.data_notes)


def test_another_seed_is_another_split() -> None:
    first, second = (joined(in_memory(seed=seed).validation(64)) for seed in (0, 1))
    assert not same(first, second)


@pytest.mark.parametrize(
    ("batch", "sizes"), [(16, [16, 16, 16]), (20, [20, 20, 14]), (53, [53]), (54, [54]), (200, [54])]
)
def test_a_last_batch_under_half_is_dropped(batch: int, sizes: list[int]) -> None:
    assert [len(x) for x, _ in in_memory().train_batches(batch, 0)] == sizes


def test_training_in_batches_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2 samples"):
        in_memory().train_batches(1, 0)


def test_top_1_accuracy() -> None:
    outputs = torch.eye(4)[[0, 1, 2, 2]]
    assert in_memory().metric(outputs, torch.tensor([0, 1, 2, 3])) == 0.75


def test_workers_read_the_same_batches() -> None:
    task, parallel = streamed(), streamed(workers=2)
    assert same(joined(task.train_batches(16, 3)), joined(parallel.train_batches(16, 3)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_dataset_arrives_in_one_line(workers: int) -> None:
    task = streamed(workers, test=Pictures(20, 1, broken=7))
    with pytest.raises(ConfigError, match=r"^picture 7 is broken$"):
        joined(task.test(4))


def test_the_fingerprint_knows_weights_data_and_split() -> None:
    base = in_memory().fingerprint()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        other = ClassificationTask(network(), pixels(60, 0), pixels(20, 1), augmentation=Augmentation(2))
    assert other.fingerprint()["weights_sha256"] != base["weights_sha256"]
    assert in_memory(train=pixels(60, 5)).fingerprint()["data_sha256"] != base["data_sha256"]
    assert in_memory(seed=1).fingerprint()["seed"] != base["seed"]
    assert base["train"] == 54
    assert base["validation"] == 6


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"train": (torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.long))}, r"train data: .* inputs \(0, 3, 8, 8\)"),
    ({"test": (torch.zeros(5, 3, 8, 8), torch.zeros(4, dtype=torch.long))}, r"test data: .*targets \(4,\)"),
    ({"validation": (torch.zeros(5, 3, 8, 8), torch.zeros(5))}, r"validation data: .* of torch.float32"),
    ({"train": pixels(1, 0)}, "1 training samples are too few"),
    ({"train": object()}, "train data: Dataset object has no length"),
    ({"train": iter([1])}, r"train data: Dataset list_iterator: sample 0 must be \(input tensor, .* found int"),
    ({"train": "pictures/"}, "train data: found 'pictures/', a str. Give samples"),
    ({"test": []}, "test data: Dataset list is empty"),
    ({"test": [(3, 1)]}, r"sample 0 must be \(input tensor, class number\), found tuple"),
    (
        {"train": (torch.zeros(20, 3, 8, 8), torch.arange(20))},
        "the data have 20 classes but model Sequential tells only 4",
    ),
    ({"train": (torch.zeros(20, 5), torch.zeros(20, dtype=torch.long)), "normalization": None}, "does not take inputs"),
    ({"train": (torch.zeros(20, 1, 8, 8), torch.zeros(20, dtype=torch.long))}, "Normalisation has 3 channels"),
    ({"validation_fraction": 1.0}, "validation_fraction 1.0 must be between"),
    ({"calibration_size": 0}, "calibration_size 0 must be"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_used_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        in_memory(**options)


def test_a_model_without_logits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must return logits \(N, classes\), found \(1, 3, 8, 8\)"):
        ClassificationTask(nn.Identity(), pixels(60, 0), pixels(20, 1))


def test_samples_of_different_shapes_are_refused() -> None:
    mixed: Any = [(torch.zeros(3, 8, 8 + i % 2), 0) for i in range(20)]
    with pytest.raises(ConfigError, match=r"different shapes, \(3, 8, 8\) and \(3, 8, 9\)"):
        joined(in_memory(test=mixed).test(4))


def test_a_normalisation_without_spread_is_refused() -> None:
    with pytest.raises(ConfigError, match="one positive std per channel"):
        Normalization((0.5,), (0.0,))
