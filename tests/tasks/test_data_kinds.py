"""Data in the containers that people have them in: each gives what the same tensors give, or one clear sentence."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset
from torch.utils.data import WeightedRandomSampler as Weighted

from autocompress.errors import ConfigError
from autocompress.tasks import ClassificationTask, LabelFreeTask, UnlabelledTask, check_task, samples, sources
from tests.tasks.conftest import seeded_model
from tests.tasks.contract import joined, same

WIDTH, CLASSES = 8, 3
SIZES = {"train": 130, "test": 40}


def table(split: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(list(SIZES).index(split))
    targets = torch.randint(CLASSES, (SIZES[split],), generator=generator)
    return torch.randn(SIZES[split], WIDTH, generator=generator) + targets[:, None], targets


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, CLASSES))


class Rows(Dataset[tuple[Tensor, int]]):
    """A map-style dataset as people write it: lists no labels."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.rows = list(zip(inputs, targets.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.rows[index]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets, self.passes = inputs, targets, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        row = torch.empty(WIDTH)
        for values, target in zip(self.inputs, self.targets, strict=True):
            yield row.copy_(values), target  # as readers do that have one buffer


def stacked(rows: list[Any]) -> dict[str, Any]:
    return {"x": torch.stack([row[0] for row in rows]), "label": torch.tensor([int(row[1]) for row in rows])}


class Module:
    """As Lightning's, without Lightning."""

    def __init__(self, **loaders: Any) -> None:
        self.calls: list[str] = []
        for split, data in loaders.items():
            setattr(self, f"{split}_dataloader", lambda data=data: DataLoader(TensorDataset(*data), 16))

    def prepare_data(self) -> None:
        self.calls.append("prepare")

    def setup(self, stage: str) -> None:
        self.calls.append(stage)


FORMS: dict[str, Any] = {
    "numpy": lambda x, y: (x.numpy(), y.numpy()),
    "list of arrays": lambda x, y: [x, y],
    "TensorDataset": TensorDataset,
    "Dataset": Rows,
    "DataLoader": lambda x, y: DataLoader(TensorDataset(x, y), 32, shuffle=True),
    "DataLoader of a Dataset, collated": lambda x, y: DataLoader(Rows(x, y), 32, collate_fn=stacked),
    "DataLoader of a stream": lambda x, y: DataLoader(Stream(x, y), 32),
    "list of pairs": lambda x, y: list(zip(x, y, strict=True)),
    "list of numpy pairs": lambda x, y: list(zip(x.numpy(), y.numpy(), strict=True)),
    "dicts": lambda x, y: [{"x": row, "label": int(label)} for row, label in zip(x, y, strict=True)],
    "dicts of lists": lambda x, y: [{"labels": int(y[i]), "x": x[i].tolist()} for i in range(len(x))],
    "UserDicts": lambda x, y: [UserDict({"x": row, "target": label}) for row, label in zip(x, y, strict=True)],
    "dicts and classes": lambda x, y: [({"x": row}, int(label)) for row, label in zip(x, y, strict=True)],
    "dicts with more": lambda x, y: [
        {"idx": i, "features": x[i], "label": int(y[i]), "file": f"{i}.png"} for i in range(len(x))
    ],
    "columns": lambda x, y: {"x": x, "labels": y},
    "columns and labels": lambda x, y: (UserDict({"x": x.numpy()}), y.tolist()),
    "IterableDataset": Stream,
    "generator": lambda x, y: (pair for pair in zip(x, y, strict=True)),
    "data module": lambda x, y: Module(train=(x, y), test=(x, y)),
}


def task_of(form: Any, **options: Any) -> ClassificationTask:
    data = {split: form(*table(split)) for split in SIZES}
    return ClassificationTask(seeded_model(network), **data, **options)


def baseline(task: ClassificationTask) -> float:
    inputs, targets = joined(task.test(16))
    with torch.no_grad():
        return task.metric(task.model()(inputs), targets)


@pytest.mark.parametrize("form", FORMS)
def test_one_data_set_is_the_same_however_it_is_brought(form: str) -> None:
    plain, task = task_of(lambda x, y: (x, y)), task_of(FORMS[form])
    assert same(joined(task.validation(7)), joined(plain.validation(7)))
    assert same(joined(task.train_batches(16, 1)), joined(plain.train_batches(16, 1)))
    assert torch.equal(torch.cat(list(task.calibration(50))), torch.cat(list(plain.calibration(50))))
    assert baseline(task) == baseline(plain)
    assert task.fingerprint() == plain.fingerprint()
    assert [note for note in check_task(task) if note not in task.data_notes] == []


def test_eight_bit_images_of_dicts_are_scaled_as_elsewhere() -> None:
    images = torch.arange(40 * 3 * 4 * 4, dtype=torch.int64).to(torch.uint8).view(40, 3, 4, 4)
    rows = [{"image": image, "label": i % 2} for i, image in enumerate(images)]
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.testing.assert_close(joined(ClassificationTask(net, rows, rows).test(9))[0], images / 255)


def test_a_dataset_that_is_much_to_read_is_not_read_for_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_READ_BYTES", SIZES["train"] * WIDTH * 4 - 1)
    reads: list[int] = []

    class Counting(Rows):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            reads.append(index)
            return super().__getitem__(index)

    task_of(Counting)
    assert len(reads) < SIZES["train"]


# -- iterables ----------------------------------------------------------------------------------------------------


def test_an_iterable_is_read_once_and_that_is_said() -> None:
    stream = Stream(*table("train"))
    task = ClassificationTask(network(), stream, stream)
    joined(task.test(8))
    assert stream.passes == 1
    assert len(joined(task.test(8))[1]) == SIZES["train"]
    assert "train data: Stream can only be iterated; its 130 samples were read once" in check_task(task)[0]
    assert check_task(LabelFreeTask(task))[0] == task.data_notes[0]


def test_an_iterable_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 2**16)

    def endless() -> Iterator[tuple[Tensor, int]]:
        while True:
            yield torch.zeros(64), 0

    with pytest.raises(
        ConfigError, match=r"train data: generator .* more than 6.1e-05 GiB: 98 samples were read.*islice"
    ):
        ClassificationTask(network(), endless(), table("test"))


def test_an_iterable_that_raises_says_how_far_it_came() -> None:
    def broken() -> Iterator[tuple[Tensor, int]]:
        yield torch.zeros(WIDTH), 0
        raise OSError("connection lost")

    with pytest.raises(
        ConfigError, match="test data: generator: reading on after 1 samples raised OSError: connection"
    ):
        ClassificationTask(network(), table("train"), broken())


# -- loaders ------------------------------------------------------------------------------------------------------


def test_a_loader_of_a_part_is_that_part() -> None:
    data = TensorDataset(*table("train"))
    train, held = list(range(0, 130, 2)), list(range(1, 130, 2))
    loaders = {
        "train": DataLoader(data, 8, sampler=SubsetRandomSampler(train)),
        "validation": DataLoader(data, 8, sampler=SubsetRandomSampler(held)),
    }
    task = ClassificationTask(network(), test=table("test"), **loaders)
    assert (task.train_size(), task.validation_size()) == (65, 65)
    assert {row.numpy().tobytes() for row in joined(task.validation(9))[0]} == {
        row.numpy().tobytes() for row in data.tensors[0][held]
    }
    assert "train data: the 65 of 130 samples that the loader's SubsetRandomSampler names." in task.data_notes


def test_a_sampler_that_weighs_is_left_out_and_that_is_said() -> None:
    data = TensorDataset(*table("train"))
    task = ClassificationTask(network(), DataLoader(data, 8, sampler=Weighted([1.0] * 130, 400)), table("test"))
    assert task.train_size() == 117
    assert task.data_notes[:-1] == (
        "train data: all 130 samples of the loader's dataset, each once; its WeightedRandomSampler is left out.",
    )


def test_a_collate_function_that_needs_a_batch_is_named() -> None:
    def doubled(rows: list[Any]) -> tuple[Tensor, Tensor]:
        return torch.stack([rows[0][0], rows[0][0]]), torch.tensor([rows[0][1]])

    def mixed(rows: list[Any]) -> Any:
        return rows[1]

    for collate, message in (
        (doubled, r"sample 0: collate_fn doubled makes \(2, 8\) of one sample"),
        (mixed, "sample 0: collate_fn mixed raised IndexError"),
    ):
        with pytest.raises(ConfigError, match=rf"train data: Dataset TensorDataset: {message}"):
            ClassificationTask(network(), DataLoader(TensorDataset(*table("train")), collate_fn=collate), table("test"))


# -- columns, modules, to_input -----------------------------------------------------------------------------------


def test_columns_that_are_data_sets_are_told_apart() -> None:
    splits: Any = {"train": TensorDataset(*table("train")), "test": TensorDataset(*table("test"))}
    with pytest.raises(ConfigError, match=r"'train' of 130, 'test' of 40.* train=data\['train'\]"):
        ClassificationTask(network(), splits, splits)


def test_a_module_gives_each_data_set_and_is_set_up_once() -> None:
    module = Module(train=table("train"), val=table("test"), test=table("train"))
    task = ClassificationTask(network(), train=module, test=module)
    assert module.calls == ["prepare", "fit", "test"]
    assert (task.train_size(), task.validation_size(), task.test_size()) == (130, 40, 130)
    assert task.data_notes == (
        "train data: Module.train_dataloader().",
        "validation data: Module.val_dataloader().",
        "test data: Module.test_dataloader().",
    )


def test_a_modules_validation_data_do_not_serve_twice() -> None:
    module = Module(train=table("train"), val=table("test"))
    task = ClassificationTask(network(), train=module, test=module)
    assert (task.train_size(), task.validation_size(), task.test_size()) == (117, 13, 40)
    assert "Module has no test_dataloader: val_dataloader is the test data, and validation" in task.data_notes[1]
    given = ClassificationTask(network(), train=module, validation=module, test=table("test"))
    assert given.validation_size() == 40


def test_a_module_without_such_data_says_so() -> None:
    class Broken(Module):
        def setup(self, stage: str) -> None:
            raise FileNotFoundError("no data/")

    with pytest.raises(
        ConfigError, match="test data: data module Module has neither test_dataloader nor val_dataloader"
    ):
        ClassificationTask(network(), table("train"), Module(train=table("train")))
    with pytest.raises(ConfigError, match=r"data module Broken: setup\('fit'\) raised FileNotFoundError: no data/"):
        ClassificationTask(network(), Broken(train=table("train")), table("test"))


def test_to_input_makes_samples_of_anything() -> None:
    rows = [f"{','.join(map(str, x.tolist()))};{y}" for x, y in zip(*table("train"), strict=True)]

    def parse(line: str) -> tuple[Tensor, int]:
        values, label = line.split(";")
        return torch.tensor([float(value) for value in values.split(",")]), int(label)

    task = ClassificationTask(seeded_model(network), rows, iter(rows), to_input=parse)
    plain = ClassificationTask(seeded_model(network), table("train"), table("train"))
    assert same(joined(task.validation(9)), joined(plain.validation(9)))
    assert task.fingerprint() == plain.fingerprint()
    named = ClassificationTask(
        seeded_model(network), TensorDataset(*table("train")), table("test"), to_input=lambda s: ({"x": s[0]}, s[1])
    )
    assert same(joined(named.validation(9)), joined(plain.validation(9)))
    with pytest.raises(ConfigError, match=r"sample 0: to_input raised IndexError: .* It gets one str"):
        ClassificationTask(network(), rows, rows, to_input=lambda line: line.split("!")[1])


def test_inputs_without_labels_come_in_any_of_these() -> None:
    inputs, _ = table("train")
    plain = UnlabelledTask(seeded_model(network), inputs, inputs)
    for data in (
        inputs.numpy(),
        list(inputs),
        (row for row in inputs),
        DataLoader(inputs, 9),  # type: ignore[arg-type]
        [{"x": row} for row in inputs],
        {"x": inputs},
    ):
        task = UnlabelledTask(seeded_model(network), data, inputs)  # type: ignore[arg-type]
        assert same(joined(task.validation(9)), joined(plain.validation(9)))
    assert np.isfinite(LabelFreeTask(task).metric(*(joined(LabelFreeTask(task).test(8))[1],) * 2))


def test_methods_of_lightnings_base_class_are_no_loaders() -> None:
    class Base:
        def test_dataloader(self) -> Any:
            raise RuntimeError("`test_dataloader` must be implemented to be used with the Lightning Trainer")

        def setup(self, stage: str) -> None:
            raise RuntimeError("not to be called")

    for method in (Base.test_dataloader, Base.setup):
        method.__module__ = "lightning.pytorch.core.hooks"

    class Own(Base):
        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(*table("train")), 8)

        def val_dataloader(self) -> list[Any]:
            return [DataLoader(TensorDataset(*table("test")), 8)]

    module: Any = Own()
    task = ClassificationTask(network(), train=module, test=module)
    assert (task.train_size(), task.test_size()) == (117, 40)
    module.test_dataloader = lambda: DataLoader(
        TensorDataset(*table("train")), 8
    )  # as LightningDataModule.from_datasets
    module.test_dataloader.__module__ = "lightning.pytorch.core.datamodule"
    assert ClassificationTask(network(), train=module, test=module).test_size() == 130
    del module.test_dataloader
    module.val_dataloader = lambda: [1, 2]
    with pytest.raises(ConfigError, match=r"Own.val_dataloader\(\) gives 2 loaders.*val_dataloader\(\)\[0\]"):
        ClassificationTask(network(), train=table("train"), test=module)


def test_a_loader_that_makes_no_batches_gives_its_function_one_sample() -> None:
    loader = DataLoader(TensorDataset(*table("train")), batch_size=None, collate_fn=lambda pair: (2 * pair[0], pair[1]))
    task = ClassificationTask(network(), table("train"), loader)
    assert torch.equal(joined(task.test(9))[0], 2 * table("train")[0])
