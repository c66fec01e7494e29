"""What is wrong with data, model or metric is said before anything is compressed: by name, value and mend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from autocompress.errors import ConfigError
from autocompress.tasks import Batch, ClassificationTask, LabelFreeTask, Task, UnlabelledTask, samples
from autocompress.tasks.checks import check_task, check_validation
from autocompress.tasks.validation import write_validation
from tests.tasks.conftest import seeded_model
from tests.tasks.test_validation import CLASSES, SortedTask

WIDTH = 6


def blobs(count: int, seed: int = 0, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Points about `classes` axes, told apart by a network that passes them on."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % classes
    inputs = 0.1 * torch.randn(count, WIDTH, generator=generator)
    inputs[torch.arange(count), targets] += 1
    return inputs, targets


class Net(nn.Module):
    """The first outputs are the inputs; `middle` comes before."""

    def __init__(self, middle: nn.Module | None = None, classes: int = 3) -> None:
        super().__init__()
        self.middle = nn.Identity() if middle is None else middle
        self.fc = nn.Linear(WIDTH, classes, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.eye(classes, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.middle(x))
        return out


def task(model: nn.Module | None = None, **data: Any) -> ClassificationTask:
    given = {"train": blobs(120), "test": blobs(30, 1), "validation": blobs(60, 2), **data}
    return ClassificationTask(model or Net(), **given)


class OwnTask(SortedTask):
    """A user's task on the blobs, every part of which may be replaced."""

    name = "own"

    def __init__(self, model: nn.Module | None = None, **parts: Any) -> None:
        super().__init__()
        self.net, self.parts = model or Net(), parts
        self.data = blobs(64)

    def model(self) -> nn.Module:
        return self.net

    def example_inputs(self, batch_size: int = 1) -> Tensor:
        return self.data[0][:batch_size]

    def _batches(self, split: str, batch_size: int) -> Iterator[Any]:
        if split in self.parts:
            yield from self.parts[split]
            return
        for start in range(0, 64, batch_size):
            x, y = (part[start : start + batch_size] for part in self.data)
            yield x if split == "calibration" else (x, y)

    def calibration(self, batch_size: int) -> Iterator[Tensor]:
        return self._batches("calibration", batch_size)

    def train_batches(self, batch_size: int, epoch: int) -> Iterator[Batch]:
        return self._batches("train", batch_size)

    def validation(self, batch_size: int) -> Iterator[Batch]:
        return self._batches("validation", batch_size)

    def test(self, batch_size: int) -> Iterator[Batch]:
        return self._batches("test", batch_size)

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        metric: Callable[[Tensor, Tensor], Any] = self.parts.get("metric", super().metric)
        return metric(outputs, targets)  # type: ignore[no-any-return]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss: Callable[[Tensor, Tensor], Tensor] = self.parts.get("loss", super().loss)
        return loss(outputs, targets)


def test_a_sound_task_has_nothing_said_of_it() -> None:
    assert check_task(task()) == []
    assert check_task(OwnTask()) == []
    assert check_task(LabelFreeTask(OwnTask())) == []
    unlabelled = UnlabelledTask(Net(), blobs(80)[0], blobs(20, 1)[0], validation=blobs(20, 2)[0])
    assert check_task(LabelFreeTask(unlabelled, "cosine")) == []


def test_the_model_and_its_inputs_are_left_as_they_were() -> None:
    own = OwnTask(nn.Sequential(nn.ReLU(inplace=True), Net()))
    before = own.data[0].clone()
    check_task(own)
    assert torch.equal(own.data[0], before)
    assert not any(module._forward_hooks for module in own.net.modules())


# -- data ---------------------------------------------------------------------------------------------------------


def spoiled(value: float, every: int, count: int = 120) -> tuple[Tensor, Tensor]:
    inputs, targets = blobs(count)
    inputs[::every, 2] = value
    return inputs, targets


@pytest.mark.parametrize(("value", "what"), [(math.nan, "NaN"), (math.inf, "infinity")])
def test_calibration_with_nan_or_infinity_is_named(value: float, what: str) -> None:
    with pytest.raises(ConfigError, match=rf"hold NaN or infinity \({what} in calibration sample") as caught:
        check_task(task(train=spoiled(value, 10)))
    number = int(str(caught.value).split("(number ")[1].split()[0])
    assert number % 10 == 0  # which sample of the user's it is
    assert "torch.nan_to_num" in str(caught.value)


def test_nan_that_the_model_bears_is_said() -> None:
    class Cleaned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nan_to_num(x)

    warnings = check_task(task(Net(Cleaned()), train=spoiled(math.nan, 10)))
    assert len(warnings) >= 1 and "of 120 calibration samples hold NaN" in warnings[0]
    assert "the model bears them" in warnings[0]


def test_validation_with_nan_is_named() -> None:
    with pytest.raises(ConfigError, match=r"1 of 60 validation samples hold NaN .* of the validation data"):
        check_task(task(validation=spoiled(math.nan, 60, 60)))


ODD_CALIBRATION = [
    ([torch.zeros(16, WIDTH)], "the 16 calibration samples are all zeros"),
    ([torch.full((16, WIDTH), 0.5), torch.full((3, WIDTH), 0.5)], "19 calibration samples are all the same value, 0.5"),
    ([torch.full((4, WIDTH), math.nan)], "4 of 4 calibration samples hold NaN or infinity"),
    ([], "no calibration data"),
    ([torch.zeros(0, WIDTH)], "no calibration data"),
    ([(torch.zeros(2, WIDTH), torch.zeros(2))], r"must be one tensor \(N, ...\), found tuple of Tensor, Tensor"),
]


@pytest.mark.parametrize(("batches", "message"), ODD_CALIBRATION, ids=[message for _, message in ODD_CALIBRATION])
def test_calibration_that_nothing_can_be_learnt_from_is_refused(batches: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_task(OwnTask(calibration=batches))


def test_calibration_of_one_class_is_said() -> None:
    inputs, targets = blobs(96)
    warnings = check_task(OwnTask(calibration=[inputs[targets == 1]]))
    assert len(warnings) == 1 and "32 calibration samples for class 1" in warnings[0]
    assert check_task(OwnTask(calibration=[inputs])) == []
    mostly = torch.cat([torch.zeros(40, WIDTH), inputs[:20]])
    assert any(
        "40 of 60 calibration samples are of one value" in text for text in check_task(OwnTask(calibration=[mostly]))
    )


@pytest.mark.parametrize(
    ("split", "message"),
    [("validation", "no validation data"), ("test", "no test data"), ("train", "no training batches")],
)
def test_missing_data_are_named(split: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_task(OwnTask(**{split: []}))


def test_training_batches_are_asked_for_only_when_they_are_needed() -> None:
    assert check_task(OwnTask(train=[]), training=False) == []


def raising(after: Tensor) -> Iterator[Batch]:
    yield after, torch.zeros(len(after), dtype=torch.long)
    raise OSError("truncated file")


def test_a_batch_that_raises_is_named() -> None:
    with pytest.raises(ConfigError, match=r"validation data: reading on after 8 samples raised OSError: truncated"):
        check_task(OwnTask(validation=raising(blobs(8)[0])))


BAD_BATCHES = [
    ([blobs(8)[0]], "validation data have no labels: yield .*--metric agreement"),
    ([(blobs(8)[0], None)], "validation data have no labels"),
    ([(*blobs(8), "names")], r"must be two tensors, .* found tuple of Tensor, Tensor, str"),
    ([{"image": blobs(8)[0]}], "found dict with keys 'image'"),
    ([(blobs(8)[0], torch.zeros(5))], r"have inputs \(8, 6\) but targets \(5,\)"),
]


@pytest.mark.parametrize(("batches", "message"), BAD_BATCHES, ids=[message for _, message in BAD_BATCHES])
def test_batches_of_another_form_are_refused(batches: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_task(OwnTask(validation=batches))


# -- labels -------------------------------------------------------------------------------------------------------


class Streamed(Dataset[Any]):
    """Blobs that are read one by one and list no labels."""

    def __init__(self, count: int, seed: int, change: Callable[[Tensor, int, int], Any]) -> None:
        self.inputs, self.classes = blobs(count, seed)
        self.change = change

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        return self.change(self.inputs[index], int(self.classes[index]), index)


def streamed(change: Callable[[Tensor, int, int], Any]) -> ClassificationTask:
    data = {split: Streamed(count, seed, change) for split, count, seed in SIZES}
    return ClassificationTask(Net(), **data)  # type: ignore[arg-type]


SIZES = (("train", 120, 0), ("validation", 60, 2), ("test", 30, 1))


def moved(by: int) -> dict[str, Any]:
    return {split: (blobs(count, seed)[0], blobs(count, seed)[1] + by) for split, count, seed in SIZES}


@pytest.fixture
def much_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets whose labels are not read before the split."""
    monkeypatch.setattr(samples, "_READ_BYTES", 0)


def test_labels_from_one_on_are_told(much_to_read: None) -> None:
    with pytest.raises(ConfigError, match=r"labels run from 1 to 3, but .* from 0 to 2. Subtract 1"):
        task(**moved(1))
    with pytest.raises(
        ConfigError, match="training labels run from 1 to 3, but the model's 3 classes count from 0 to 2"
    ):
        check_task(streamed(lambda x, y, _: (x, y + 1)))


def test_labels_of_minus_one_are_told(much_to_read: None) -> None:
    inputs, targets = blobs(120)
    targets[::10] = -1
    with pytest.raises(
        ConfigError, match=r"12 of 120 train labels are no class .* such as -1; .*Leave samples without"
    ):
        check_task(task(train=(inputs, targets)))
    with pytest.raises(ConfigError, match="training labels are no class of the model, such as -1"):
        check_task(streamed(lambda x, y, index: (x, -1 if index % 3 == 0 else y)))


def test_labels_of_a_small_dataset_are_all_looked_at() -> None:
    with pytest.raises(ConfigError, match="labels run from 1 to 3, but the classes of model Net count from 0 to 2"):
        streamed(lambda x, y, _: (x, y + 1))
    with pytest.raises(ConfigError, match=r"1 of 120 train labels are no class .* such as -1"):
        check_task(streamed(lambda x, y, index: (x, -1 if index == 77 else y)))


def test_labels_moved_by_one_within_the_classes_are_told() -> None:
    data = {split: (x, (y + 1) % 4) for split, (x, y) in moved(0).items()}
    with pytest.raises(
        ConfigError, match="0 % of 60 validation samples right, but 100 % if 1 is subtracted from every"
    ):
        check_task(task(Net(classes=4), **data))


def test_a_classifier_no_better_than_guessing_is_said() -> None:
    net = Net()
    with torch.no_grad():
        net.fc.weight.copy_(torch.roll(net.fc.weight, 1, 0) + torch.roll(net.fc.weight, 2, 0))
    warnings = check_task(task(net))
    assert len(warnings) == 1 and "no more than by guessing among 3 classes" in warnings[0]


def test_a_users_task_may_give_such_labels_a_meaning() -> None:
    inputs, targets = blobs(64)
    targets[::4] = -1
    batches = [(inputs, targets)]

    def masked(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, ignore_index=-1, reduction="sum")

    assert check_task(OwnTask(validation=batches, train=batches, loss=masked)) == []
    with pytest.raises(ConfigError, match="8 of 32 training labels"):
        check_task(OwnTask(validation=batches, train=[(inputs[:32], targets[:32])]))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_one_class_alone_is_refused(split: str) -> None:
    inputs, targets = blobs(60)
    with pytest.raises(ConfigError, match=f"all 60 {split} samples are of class 2. Give data of all 3 classes"):
        check_task(task(**{split: (inputs, torch.full_like(targets, 2))}))


def test_a_users_validation_data_of_one_class_are_refused_once_they_were_read(tmp_path: Path) -> None:
    alone = SortedTask(50, classes=1)
    with pytest.raises(ConfigError, match="all 50 validation samples are of class 0, so accuracy"):
        check_validation(alone, write_validation(alone, tmp_path / "v.npy", 100, 8))
    check_validation(SortedTask(), write_validation(SortedTask(), tmp_path / "v.npy", 100, 8))


FORMS: list[tuple[Any, str]] = [
    (lambda x, y, _: {"image": x, "class_of": y}, r"a dict with keys 'image', 'class_of'. Name the class .* 'label'"),
    (
        lambda x, y, _: {"ids": x, "mask": x, "labels": y},
        r"'ids' \(Tensor\), .* Net.forward takes x. Rename .*to_input",
    ),
    (lambda x, y, _: (x, functional.one_hot(torch.tensor(y), 3)), r"found 3 values. If it is one-hot, .*argmax"),
    (lambda x, y, _: (x, y, "file.png"), "found tuple of 3: Tensor, int, str"),
    (lambda x, y, _: (x, y + 0.5), r"must be a class number, found \d.5. For values"),
    (lambda x, y, _: (x, "cat"), "found 'cat'. Number the classes"),
    (lambda x, y, _: ({1, 2}, y), "found tuple with a set for input"),
    (lambda x, y, _: ("a film", y), "found tuple with a str for input. It is text: a network takes tokens"),
    (lambda x, y, _: "a film", "found text, 'a film': a network takes tokens.* transformers:FOLDER"),
]


@pytest.mark.parametrize(("change", "message"), FORMS, ids=[message for _, message in FORMS])
def test_samples_of_another_form_say_what_to_do(change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        streamed(change)


def test_numbers_of_any_kind_are_labels_and_arrays_are_inputs() -> None:
    for change in (
        lambda x, y, _: (x, np.int64(y)),
        lambda x, y, _: (x, np.array([y])),
        lambda x, y, _: (x, torch.tensor(y)),
        lambda x, y, _: (x, float(y)),
        lambda x, y, _: (x.numpy(), y),
        lambda x, y, _: [nn.Parameter(x, requires_grad=False), y],
    ):
        assert check_task(streamed(change)) == []
    arrays = {split: tuple(part.numpy() for part in blobs(count, seed)) for split, count, seed in SIZES}
    assert check_task(task(**arrays)) == []


def test_a_sample_that_raises_is_named_with_its_data() -> None:
    def read(x: Tensor, y: int, index: int) -> Any:
        if index == 47:
            raise OSError("image file is truncated")
        return x, y

    with pytest.raises(
        ConfigError, match=r"^train data: Dataset Streamed: sample 47 cannot be read: OSError: image file"
    ):
        check_task(streamed(read))


def test_one_hot_targets_are_told() -> None:
    inputs, targets = blobs(60)
    with pytest.raises(ConfigError, match=r"targets \(60, 3\) of torch.float32. One-hot targets .*argmax\(1\)"):
        task(train=(inputs, functional.one_hot(targets, 3).float()))


# -- model --------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class AlwaysDropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(self.inner(x) + x)  # training=True unless told otherwise


RANDOM = [
    (lambda: Net(Noisy()).eval(), r"at or just before layer middle \(Noisy\)"),
    (lambda: Net(AlwaysDropping()).eval(), r"at or just before layer fc \(Linear\)"),
]


@pytest.mark.parametrize(("make", "where"), RANDOM, ids=[where for _, where in RANDOM])
def test_a_model_that_changes_its_mind_is_named(make: Callable[[], nn.Module], where: str) -> None:
    with pytest.raises(ConfigError, match=f"gives other outputs for the same input.*{where}.*let dropout hang"):
        check_task(OwnTask(make()))


class Batched(nn.Module):
    """A batch-norm over images of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x[:, None])[:, 0]
        return out


def without_statistics() -> nn.Module:
    return Net(Batched()).eval()


def in_training_mode() -> nn.Module:
    net = Net(nn.BatchNorm1d(WIDTH)).eval()
    net.middle.train()
    return net


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


MIXING = [
    (without_statistics, "other outputs for .* layers middle.norm normalise by the batch, .* track_running_stats=True"),
    (lambda: Net(Centred()).eval(), "other outputs for .*: something in forward goes over axis 0"),
]


@pytest.mark.parametrize(("make", "message"), MIXING, ids=[message for _, message in MIXING])
def test_outputs_that_depend_on_the_batch_are_named(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_task(OwnTask(make()))


def test_a_norm_left_in_training_mode_is_evaluated() -> None:
    assert check_task(OwnTask(in_training_mode())) == []


def test_norms_over_a_sample_alone_are_sound() -> None:
    for norm in (nn.BatchNorm1d(WIDTH), nn.LayerNorm(WIDTH), nn.GroupNorm(2, WIDTH)):
        assert check_task(OwnTask(Net(norm).eval())) == []


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, WIDTH)


def test_a_model_that_takes_one_sample_only_is_told() -> None:
    with pytest.raises(ConfigError, match=r"does not take inputs \(8, 6\).*It does take one sample alone"):
        check_task(OwnTask(Net(FixedBatch())))


class OneRow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(0, keepdim=True)


def test_a_row_of_outputs_for_every_sample_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"outputs \(1, 3\) for inputs \(8, 6\)"):
        check_task(OwnTask(Net(OneRow())))


class Rooted(nn.Module):
    """NaN for a negative value; the log of zero is infinite."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_outputs_of_nan_name_sample_and_layer() -> None:
    with pytest.raises(ConfigError, match=r"gives NaN for calibration sample \d+, first at layer middle \(Rooted\)"):
        check_task(OwnTask(Net(Rooted(torch.sqrt)).eval()))
    net = Net()
    with torch.no_grad():
        net.fc.weight[1, 1] = math.nan
    with pytest.raises(ConfigError, match=r"gives NaN .*first at layer fc \(Linear\).*Check the weights"):
        check_task(task(net))


def test_infinite_outputs_are_said() -> None:
    class Masking(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(x[:, :3] < 0, -math.inf)

    warnings = check_task(OwnTask(Masking()))
    assert any("gives infinite values for calibration sample" in text for text in warnings)


# -- metric -------------------------------------------------------------------------------------------------------


def failing(outputs: Tensor, targets: Tensor) -> float:
    raise ValueError("operands could not be broadcast")


METRICS: list[tuple[Any, str]] = [
    (lambda o, t: math.nan, "the metric of 64 validation samples is nan; Task.metric must return one finite number"),
    (lambda o, t: None, "is None; Task.metric must return"),
    (lambda o, t: "0.9", "is '0.9'; Task.metric must return"),
    (lambda o, t: math.inf, "is inf; Task.metric"),
    (lambda o, t: o, "is tensor"),
    (
        failing,
        r"raised ValueError: operands .* gets outputs \(64, 3\) of torch.float32 and targets \(64,\) of torch.int64",
    ),
]


@pytest.mark.parametrize(("metric", "message"), METRICS, ids=[message for _, message in METRICS])
def test_a_metric_that_gives_no_number_is_refused(metric: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_task(OwnTask(metric=metric))
    assert check_task(OwnTask(metric=metric), scored=False) == []


def test_a_metric_of_another_scale_is_said() -> None:
    warnings = check_task(OwnTask(metric=lambda o, t: torch.tensor(98.4)))
    assert len(warnings) == 1 and "is 98.4, outside 0 to 1" in warnings[0] and "divide it by 100" in warnings[0]
    negative = check_task(OwnTask(metric=lambda o, t: -0.25))
    assert "-0.25, outside 0 to 1" in negative[0] and "percentage" not in negative[0]


def test_a_metric_that_ranks_classes_is_not_refused_for_a_first_batch_of_one_class() -> None:
    class Ranked(SortedTask):
        def calibration(self, batch_size: int) -> Iterator[Tensor]:
            yield self.data[0][:: CLASSES + 3]

        def model(self) -> nn.Module:
            return seeded_model(lambda: nn.Linear(2, CLASSES))

        def metric(self, outputs: Tensor, targets: Tensor) -> float:
            if len(set(targets.tolist())) < 2:
                raise ValueError("Only one class present in y_true")
            return 0.5

    assert any("all of one class" in text for text in check_task(Ranked(200)))


def test_a_metric_without_labels_says_what_to_take() -> None:
    unlabelled = UnlabelledTask(Net(), blobs(80)[0], blobs(20, 1)[0], validation=blobs(20, 2)[0])
    with pytest.raises(ConfigError, match=r"no labels to measure by. Give --metric agreement"):
        check_task(unlabelled)
    assert check_task(unlabelled, scored=False) == []


def test_a_loss_that_does_not_fit_is_said() -> None:
    warnings = check_task(OwnTask(validation=VALUES, train=VALUES, metric=lambda o, t: 0.5))
    assert len(warnings) == 1 and "raised" in warnings[0] and "override Task.loss" in warnings[0]
    fitting = OwnTask(
        validation=VALUES, train=VALUES, metric=lambda o, t: 0.5, loss=lambda o, t: ((o[:, 0] - t) ** 2).mean()
    )
    assert check_task(fitting) == []


VALUES = [(blobs(64)[0], torch.rand(64, generator=torch.Generator().manual_seed(0)))]


def test_one_value_per_sample_is_an_output() -> None:
    class Value(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, 0]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets) ** 2).mean()

    assert check_task(OwnTask(Value(), validation=VALUES, train=VALUES, metric=lambda o, t: 0.5, loss=loss)) == []


def test_slow_data_are_read_for_the_time_given(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    read: list[int] = []

    class Watched(OwnTask):
        def calibration(self, batch_size: int) -> Iterator[Tensor]:
            for number in range(1000):
                read.append(number)
                yield blobs(32, number)[0]

    subject: Task = Watched()
    check_task(subject, seconds=20)
    assert len(read) < 30
