"""Validation data on disk: which samples, how many, in what order, and what is said of them."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from autocompress.config import TaskConfig
from autocompress.errors import ConfigError
from autocompress.tasks import Batch, ClassificationTask, LabelFreeTask, Task, load_task, validation
from autocompress.tasks.array_file import ArrayFile, reorder_rows
from autocompress.tasks.validation import REFERENCE_SAMPLES, ValidationData, write_validation
from tests.tasks.conftest import seeded_model

CLASSES = 20


def labelled(per_class: int, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Class after class, as folders are listed; the inputs hold the sample's number and its class."""
    targets = torch.arange(classes).repeat_interleave(per_class)
    return torch.stack([torch.arange(len(targets)), targets], 1).float(), targets


def network() -> nn.Module:
    return seeded_model(lambda: nn.Sequential(nn.Linear(2, CLASSES)))


class SortedTask(Task):
    """A user's own task, whose validation data come class after class."""

    name = "sorted"

    def __init__(self, per_class: int = 50, classes: int = CLASSES, break_at: int | None = None) -> None:
        self.data, self.break_at, self.reads = labelled(per_class, classes), break_at, 0

    def model(self) -> nn.Module:
        return network()

    def example_inputs(self, batch_size: int = 1) -> Tensor:
        return torch.zeros(batch_size, 2)

    def calibration(self, batch_size: int) -> Iterator[Tensor]:
        yield self.data[0][:batch_size]

    def train_batches(self, batch_size: int, epoch: int) -> Iterator[Batch]:
        yield self.data[0][:batch_size], self.data[1][:batch_size]

    def train_size(self) -> int:
        return len(self.data[0])

    def validation(self, batch_size: int) -> Iterator[Batch]:
        self.reads += 1
        for start in range(0, len(self.data[0]), batch_size):
            if self.break_at is not None and start >= self.break_at:
                raise OSError("image file is truncated")
            yield self.data[0][start : start + batch_size], self.data[1][start : start + batch_size]

    def test(self, batch_size: int) -> Iterator[Batch]:
        return self.validation(batch_size)

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        return float((outputs.argmax(1) == targets).double().mean())

    def fingerprint(self) -> Mapping[str, str | int | float]:
        return {"task": self.name}


def stored(data: ValidationData) -> Tensor:
    return torch.from_numpy(np.load(data.inputs))


def consistent(data: ValidationData) -> bool:
    """Whether inputs and targets are of the same samples, none twice."""
    inputs = stored(data)
    return torch.equal(inputs[:, 1].long(), data.targets) and len(set(inputs[:, 0].tolist())) == len(inputs)


def split_task(**options: object) -> ClassificationTask:
    return ClassificationTask(network(), labelled(100), labelled(3), labelled(50), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [20, 100, 1000, 5000])
def test_a_split_task_is_validated_on_all_its_classes(tmp_path: Path, limit: int) -> None:
    data = write_validation(split_task(), tmp_path / "v.npy", limit, 8)
    count = min(limit, 1000)
    assert consistent(data) and len(data.targets) == count and data.total == 1000
    assert Counter(data.targets.tolist()) == dict.fromkeys(range(CLASSES), count // CLASSES)
    # So is every first part of them, which the first look takes, and the samples that forms of a model are compared on.
    assert set(data.targets[:CLASSES].tolist()) == set(range(CLASSES))
    assert torch.equal(data.reference, stored(data)[:REFERENCE_SAMPLES])


def test_a_split_off_part_and_calibration_hold_all_classes() -> None:
    task = ClassificationTask(network(), labelled(100), labelled(3), calibration_size=CLASSES)
    targets = torch.cat([y for _, y in task.validation(64)])
    assert Counter(targets.tolist()) == dict.fromkeys(range(CLASSES), 10)
    calibration = torch.cat(list(task.calibration(64)))
    assert set(calibration[:, 1].tolist()) == set(range(CLASSES))


def test_a_users_sorted_task_is_read_once_and_sampled_whole(tmp_path: Path) -> None:
    task = SortedTask()
    data = write_validation(task, tmp_path / "v.npy", 200, 8)
    assert task.reads == 1
    assert consistent(data) and len(data.targets) == 200 and data.total == 1000
    found = Counter(data.targets.tolist())
    assert len(found) == CLASSES and max(found.values()) < 25
    # The first ones are of many classes, too.
    assert len(set(data.targets[:CLASSES].tolist())) >= CLASSES - 2
    again = write_validation(SortedTask(), tmp_path / "w.npy", 200, 8)
    assert torch.equal(stored(data), stored(again))


def test_every_sample_of_a_stream_is_as_likely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: Counter[float] = Counter()
    real = np.random.default_rng
    for seed in range(120):
        monkeypatch.setattr(np.random, "default_rng", lambda _, seed=seed: real(seed))
        taken.update(stored(write_validation(SortedTask(5), tmp_path / "v.npy", 40, 8))[:, 0].tolist())
    shares = np.array([sum(taken[n] for n in range(start, start + 20)) for start in range(0, 100, 20)]) / (120 * 20)
    assert shares == pytest.approx(np.full(5, 0.4), abs=0.05)


def test_a_sorted_task_that_is_used_whole_is_shuffled(tmp_path: Path) -> None:
    data = write_validation(SortedTask(), tmp_path / "v.npy", 5000, 8)
    assert consistent(data) and len(data.targets) == data.total == 1000
    assert Counter(data.targets[:CLASSES].tolist()) == Counter(range(CLASSES))


def test_reading_ends_when_its_time_is_over(tmp_path: Path) -> None:
    data = write_validation(SortedTask(500), tmp_path / "v.npy", 300, 8, seconds=0)
    assert consistent(data) and len(data.targets) == 300
    assert data.total is None and 300 <= data.seen < 1000
    assert f"300 of the first {data.seen}" in data.describe()


def test_the_order_does_not_depend_on_the_limit(tmp_path: Path) -> None:
    few = write_validation(split_task(), tmp_path / "few.npy", 64, 8)
    many = write_validation(split_task(), tmp_path / "many.npy", 256, 8)
    assert torch.equal(stored(many)[:64], stored(few))


@pytest.mark.parametrize("make", [split_task, SortedTask])
def test_without_labels_the_targets_are_what_the_model_gives(make: type[Task], tmp_path: Path) -> None:
    task = LabelFreeTask(make())
    data = write_validation(task, tmp_path / "v.npy", 100, 8)
    with torch.no_grad():
        assert torch.equal(task.model()(stored(data)).argmax(1), data.targets)
    # Of all classes, whatever the model makes of them.
    assert len(set(stored(data)[:, 1].tolist())) == CLASSES


def test_no_more_samples_than_the_loss_to_tell_takes(tmp_path: Path) -> None:
    task = SortedTask(400)
    few = write_validation(task, tmp_path / "v.npy", 5000, 8, 0.05)
    assert len(few.targets) == 1024 and few.total == 8000
    assert few.describe() == "validated on 1,024 of 8,000 samples: ±0.99 pp"
    many = write_validation(task, tmp_path / "v.npy", 5000, 8, 0.01)
    assert many.describe() == "validated on 4,000 of 8,000 samples: ±0.5 pp"
    assert many.standard_error is not None and many.standard_error <= 0.005
    capped = write_validation(task, tmp_path / "v.npy", 500, 8, 0.001)
    assert len(capped.targets) == 500
    assert "±1.4 pp, more than the 0.1 pp that may be lost" in capped.describe()
    whole = write_validation(SortedTask(10), tmp_path / "v.npy", 5000, 8)
    assert whole.describe() == "validated on all 200 samples: ±2.2 pp"


def test_a_metric_that_is_no_share_of_samples_has_no_standard_error(tmp_path: Path) -> None:
    task = LabelFreeTask(SortedTask(), "cosine")
    data = write_validation(task, tmp_path / "v.npy", 100, 8, 0.01)
    assert data.standard_error is None
    assert data.describe() == "validated on 100 of 1,000 samples"


def test_the_bound_on_bytes_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "_MOST_BYTES", 8 * 37)
    data = write_validation(split_task(), tmp_path / "v.npy", 5000, 4)
    assert len(data.targets) == 37
    # What a network gives may be larger than what it takes.
    assert len(write_validation(split_task(), tmp_path / "v.npy", 5000, 80).targets) == 3


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """Rows are written as they come: arrays never hold all of them."""
    inputs, targets = torch.zeros(600, 1, 100, 100), torch.arange(600) % 2
    model = nn.Sequential(nn.AvgPool2d(100), nn.Flatten(), nn.Linear(1, 2))
    task = ClassificationTask(model, (inputs, targets), (inputs, targets), (inputs, targets))
    tracemalloc.start()
    try:
        data = write_validation(task, tmp_path / "v.npy", 600, 8)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert data.inputs.stat().st_size > 600 * 40_000
    assert peak < 0.5 * data.inputs.stat().st_size


def test_one_class_alone_is_said(tmp_path: Path) -> None:
    data = write_validation(SortedTask(50, classes=1), tmp_path / "v.npy", 100, 8)
    assert data.only_class == 0
    assert "all are of class 0, so accuracy tells little" in data.describe()


def test_no_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Task 'sorted' has no validation data"):
        write_validation(SortedTask(0), tmp_path / "v.npy", 100, 8)
    assert not list(tmp_path.iterdir())


def test_a_sample_that_raises_is_named(tmp_path: Path) -> None:
    task = SortedTask(500, break_at=512)
    with pytest.raises(ConfigError, match="validation data: reading on after 512 samples raised OSError: image file"):
        write_validation(task, tmp_path / "v.npy", 100, 8)
    assert not list(tmp_path.iterdir())


def test_samples_with_nan_are_named_and_nothing_is_compared_on_them(tmp_path: Path) -> None:
    inputs, targets = labelled(5)
    inputs[::3, 0] = math.nan
    task = ClassificationTask(network(), labelled(10), labelled(3), (inputs, targets))
    data = write_validation(task, tmp_path / "v.npy", 100, 8)
    assert torch.isfinite(data.reference).all() and len(data.reference) == REFERENCE_SAMPLES
    assert data.bad == 34
    assert int(data.bad_name.split("number ")[1].split()[0]) % 3 == 0
    assert "34 of them hold NaN or infinity, such as validation sample" in data.describe()


def test_a_file_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot write .*v\.npy: .*Free some space"):
        write_validation(SortedTask(), tmp_path / "absent" / "v.npy", 100, 8)


def test_a_full_disk_is_an_error_and_leaves_no_file() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    # A link, so that what is removed is not the device.
    link = Path("full.npy").absolute()
    link.symlink_to(full)
    try:
        with pytest.raises(ConfigError, match="No space left"), ArrayFile(link) as file:
            file.write(0, np.zeros((100_000, 4), np.float32))
    finally:
        assert not link.is_symlink()


def test_an_array_file_is_an_npy_file(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(10, 2, 3)).astype(np.float32)
    with ArrayFile(tmp_path / "a.npy") as file:
        file.write(0, rows[:4])
        file.write(4, rows[4:])
        file.write(2, rows[:1])
        assert len(file) == 10
    rows[2] = rows[0]
    assert np.array_equal(np.load(tmp_path / "a.npy"), rows)
    order = np.random.default_rng(1).permutation(10)
    reorder_rows(tmp_path / "a.npy", order)
    assert np.array_equal(np.load(tmp_path / "a.npy"), rows[order])


def test_rows_of_another_shape_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"different shapes, \(2,\) and \(3,\)"),
        ArrayFile(tmp_path / "a.npy") as file,
    ):
        file.write(0, np.zeros((1, 2), np.float32))
        file.write(1, np.zeros((1, 3), np.float32))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def imagenet_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred folders of few images: every pixel is the class's number."""
    root = tmp_path_factory.mktemp("imagenet")
    for split, count in (("train", 5), ("val", 3)):
        for label in range(100):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40 + number, 40), (label, label, label)).save(folder / f"{number}.png")
    return root


@pytest.mark.parametrize("streamed", [False, True])
def test_a_folder_of_a_hundred_classes_is_seen_whole(
    imagenet_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    pytest.importorskip("torchvision")
    from safetensors.torch import save_file

    from autocompress.tasks import image_task
    from autocompress.tasks.vision import build_model

    if streamed:
        monkeypatch.setattr(image_task, "_IN_MEMORY_BYTES", 0)
    weights = tmp_path / "w.safetensors"
    save_file(build_model("shufflenet_v2_x0_5", 100).state_dict(), weights)
    config = TaskConfig(
        name="torchvision:shufflenet_v2_x0_5", weights=str(weights), data=str(imagenet_like), calibration_size=100,
        validation_fraction=0.2,
    )  # fmt: skip
    task = load_task(config)
    data = write_validation(task, tmp_path / "v.npy", 100, 400)
    assert data.total == 100
    assert set(data.targets.tolist()) == set(range(100))
    assert len(set(data.targets[:32].tolist())) == 32
    means = torch.cat([batch[:, 0].mean((1, 2)) for batch in task.calibration(32)])
    levels = {round(float(level)) for level in (means * 0.229 + 0.485) * 255}
    assert levels == set(range(100))
