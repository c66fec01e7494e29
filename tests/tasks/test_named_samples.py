"""Dict samples as Hugging Face datasets give them become what a hand-written `Adapter` and `pack` make of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from autocompress.errors import ConfigError
from autocompress.tasks import Adapter, ClassificationTask, InputSpec, UnlabelledTask, check_task, pack, samples
from autocompress.tasks.named_layout import find_layout
from tests.tasks.conftest import seeded_model
from tests.tasks.contract import joined

WORDS = 50


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class Encoder(nn.Module):
    """A small transformer: embedding, one layer of attention, mean over what the mask shows."""

    def __init__(self, form: str = "dataclass") -> None:
        super().__init__()
        self.words, self.places, self.form = nn.Embedding(WORDS, 16), nn.Embedding(64, 16), form
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        assert input_ids.dtype == torch.int64 and labels is None
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        hidden = self.layer(hidden, src_key_padding_mask=mask == 0)
        shown = mask[..., None].float()
        logits = self.head((hidden * shown).sum(1) / shown.sum(1))
        if self.form == "tensor":
            return logits
        return Output(logits, hidden) if self.form == "dataclass" else {"loss": None, "logits": logits, "h": hidden}


def texts(count: int, seed: int, longest: int = 21) -> list[dict[str, Any]]:
    """Samples of 4 to `longest` tokens, values as lists."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for at in range(count):
        size = int(torch.randint(4, longest + 1, (), generator=generator))
        ids = torch.randint(1, WORDS, (size,), generator=generator).tolist()
        rows.append({"labels": at % 2, "attention_mask": [1] * size, "input_ids": ids, "text": "a film", "idx": at})
    return rows


def by_hand(model: nn.Module, rows: list[dict[str, Any]], length: int) -> tuple[Adapter, Tensor, Tensor]:
    """Return what a user writes without any of this: adapter, packed inputs and labels."""
    specs = [InputSpec("input_ids", (length,), "int64"), InputSpec("attention_mask", (length,), "int64")]
    columns = {spec.name: torch.tensor([(row[spec.name] + [0] * length)[:length] for row in rows]) for spec in specs}
    return Adapter(model.eval(), specs, ("logits",)), pack(columns, specs), torch.tensor([r["labels"] for r in rows])


@pytest.mark.parametrize("form", ["dataclass", "dict"])
def test_hugging_face_rows_become_what_is_written_by_hand(form: str) -> None:
    model = seeded_model(lambda: Encoder(form))
    rows, held = texts(120, 0), texts(40, 1)
    task = ClassificationTask(model, rows, held)
    adapter, inputs, targets = by_hand(seeded_model(lambda: Encoder(form)), held, 21)
    found, labels = joined(task.test(7))
    assert torch.equal(found, inputs) and torch.equal(labels, targets)
    with torch.no_grad():
        assert torch.equal(task.model()(found), adapter(inputs))
    by = ClassificationTask(adapter, by_hand(model, rows, 21)[1:], (inputs, targets))
    assert task.fingerprint() == by.fingerprint()
    assert torch.equal(joined(task.validation(9))[0], joined(by.validation(9))[0])
    notes = check_task(task)
    assert notes[: len(task.data_notes)] == list(task.data_notes)
    said = " ".join(notes)
    assert "inputs input_ids, attention_mask of the samples are used; 'text', 'idx' left out" in said
    assert "4 to 21 long; all are made 21 long (their 95th percentile rounded up" in said
    assert "Encoder is wrapped in autocompress.tasks.Adapter: it is called with input_ids (N, 21) of int64" in said
    assert "its output logits is kept" in said


def test_the_users_model_is_left_as_it_was() -> None:
    model = Encoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ClassificationTask(model, texts(40, 0), texts(10, 1))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_that_cannot_be_copied_is_tried_and_left_in_its_mode() -> None:
    class Once(Encoder):
        def __deepcopy__(self, memo: dict[int, Any]) -> Once:
            raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol")

    model, rows = Once(), texts(40, 0)
    notes: list[str] = []
    layout, adapter = find_layout(model, rows, rows[0], length=None, labelled=True, notes=notes)
    assert isinstance(adapter, Adapter) and adapter.model is model and adapter.keep == ("logits",)
    assert len(layout.specs) == 2 and all(module.training for module in model.modules())


def test_the_length_is_a_percentile_of_the_training_samples_or_given() -> None:
    rows = texts(190, 0, 12) + texts(10, 1, 40)  # 5 % may be longer than 12
    task = ClassificationTask(Encoder(), rows, texts(20, 2, 60))
    assert task.model().inputs[0].shape == (16,)  # type: ignore[union-attr, index]
    assert joined(task.test(8))[0].shape == (20, 32)
    given = ClassificationTask(Encoder(), rows, texts(20, 2), length=6)
    assert given.example_inputs().shape == (1, 12)
    assert any("all are made 6 long (as length= says)" in note for note in given.data_notes)
    longest = max(len(row["input_ids"]) for row in rows)
    cut = sum(len(row["input_ids"]) > 6 for row in rows) / 2
    assert any(f"4 to {longest} long" in note and f"cut ({cut:.3g} %)" in note for note in given.data_notes)


def test_equal_lengths_stay_and_another_one_is_named_with_its_mend() -> None:
    rows = [{"input_ids": torch.arange(9) + 1, "label": i % 2} for i in range(30)]
    task = ClassificationTask(Encoder("tensor"), rows, rows)
    assert task.example_inputs().shape == (1, 9)
    assert not any("padded" in note for note in task.data_notes)
    other = [*rows[:5], {"input_ids": torch.arange(8), "label": 0}]
    with pytest.raises(ConfigError, match=r"test data: .* sample 5: 'input_ids' is \(8,\), but \(9,\) .* length= pads"):
        joined(ClassificationTask(Encoder("tensor"), rows, other).test(2))
    padded = ClassificationTask(Encoder("tensor"), rows, other, length=9)
    assert joined(padded.test(2))[0].shape == (6, 9)


def test_a_tokenizers_batch_axis_is_taken_off() -> None:
    rows = [
        {**row, **{name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")}} for row in texts(40, 0)
    ]
    plain, task = (ClassificationTask(Encoder(), data, data) for data in (texts(40, 0), rows))
    assert torch.equal(joined(task.test(9))[0], joined(plain.test(9))[0])
    assert any("input_ids, attention_mask of each sample have a first axis of 1" in note for note in task.data_notes)


def test_padding_without_a_mask_is_said() -> None:
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in texts(60, 0)]
    task = ClassificationTask(Encoder(), rows, rows)
    assert any("no mask is among the inputs: the model sees the zeros" in note for note in task.data_notes)


@pytest.mark.parametrize("by", ["configuration", "table", "nothing"])
def test_token_numbers_are_padded_with_what_the_network_takes_for_none(by: str) -> None:
    model, filler = Encoder(), 0 if by == "nothing" else 1
    if by == "table":
        model.words = nn.Embedding(WORDS, 16, padding_idx=1)
    if by == "configuration":
        model.config = SimpleNamespace(pad_token_id=1)  # type: ignore[assignment]
    rows = texts(60, 0)
    task = ClassificationTask(model, rows, rows)
    ids, mask = joined(task.test(8))[0].chunk(2, 1)
    assert bool((mask == 0).any()) and set(ids[mask == 0].tolist()) == {filler}
    wanted = "shorter ones padded with 0" if filler == 0 else "padded at the end (input_ids with 1, others with 0)"
    assert any(wanted in note for note in task.data_notes)


def test_a_users_own_adapter_says_what_it_takes() -> None:
    rows = texts(60, 0)
    adapter = by_hand(Encoder(), rows, 10)[0]
    task = ClassificationTask(adapter, rows, rows)
    assert torch.equal(joined(task.test(9))[0], by_hand(Encoder(), rows, 10)[1])


def test_a_loader_with_a_tokenizers_collator_is_the_same() -> None:
    def padding(rows: list[dict[str, Any]]) -> Mapping[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        names = ("input_ids", "attention_mask")
        columns = {name: torch.tensor([row[name] + [0] * (longest - len(row[name])) for row in rows]) for name in names}
        return {**columns, "labels": torch.tensor([row["labels"] for row in rows])}

    rows = texts(60, 0)
    plain = ClassificationTask(seeded_model(Encoder), rows, rows)
    task = ClassificationTask(
        seeded_model(Encoder),
        DataLoader(rows, 8, collate_fn=padding),  # type: ignore[arg-type]
        DataLoader(rows, 8, collate_fn=padding),  # type: ignore[arg-type]
    )
    assert torch.equal(joined(task.validation(9))[0], joined(plain.validation(9))[0])
    assert task.fingerprint() == plain.fingerprint()


class Column(list[int]):
    """As `datasets` gives a column."""


class Table:
    """As a Hugging Face dataset: rows and columns, much to read."""

    column_names = ["input_ids", "attention_mask", "label"]  # noqa: RUF012

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return Column(row["labels"] for row in self.rows)
        row = self.rows[key]
        return {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], "label": row["labels"]}


class Trained(Dataset[Any]):
    """As the tutorials of transformers write it."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.labels = rows, [row["labels"] for row in rows]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        return {name: torch.tensor(row[name]) for name in ("input_ids", "attention_mask", "labels")}


@pytest.mark.parametrize("make", [Table, Trained, lambda rows: Subset(Table([*rows, *rows]), range(len(rows)))])
def test_listed_labels_are_found_without_reading(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_READ_BYTES", 0)
    rows = texts(60, 0)
    plain = ClassificationTask(seeded_model(Encoder), rows, rows)
    task = ClassificationTask(seeded_model(Encoder), make(rows), make(rows))
    assert torch.equal(joined(task.validation(9))[0], joined(plain.validation(9))[0])
    assert task.fingerprint() == plain.fingerprint()


class Mixed(nn.Module):
    """A picture, flags, a table's numbers and an id."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.item, self.fc = nn.Conv2d(1, 2, 3), nn.Embedding(9, 2), nn.Linear(2 + 2 + 3 + 4, 2)

    def forward(self, image: Tensor, numbers: Tensor, item: Tensor, *, flags: Tensor) -> Tensor:
        assert (image.dtype, numbers.dtype) == (torch.float32, torch.float32)
        assert (item.dtype, flags.dtype) == (torch.int64, torch.bool)
        parts = [self.conv(image).mean((2, 3)), numbers, self.item(item), flags.float()]
        out: Tensor = self.fc(torch.cat(parts, 1))
        return out


def test_inputs_keep_shape_and_dtype_in_the_order_of_forward() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 1, 5, 5), generator=generator).to(torch.uint8)
    flags = torch.rand(30, 4, generator=generator) > 0.5
    rows = [
        {"flags": flags[i].numpy(), "label": i % 2, "item": i % 9, "numbers": [1, i / 3, 2.5], "image": images[i]}
        for i in range(30)
    ]
    task = ClassificationTask(seeded_model(Mixed), rows, rows)
    adapter = task.model()
    assert isinstance(adapter, Adapter) and adapter.inputs == (
        InputSpec("image", (1, 5, 5)),
        InputSpec("numbers", (3,)),
        InputSpec("item", (), "int64"),
        InputSpec("flags", (4,), "bool"),
    )
    numbers = torch.tensor([[1, i / 3, 2.5] for i in range(30)])
    with torch.no_grad():
        wanted = seeded_model(Mixed)(images / 255, numbers, torch.arange(30) % 9, flags=flags)
        torch.testing.assert_close(adapter(joined(task.test(30))[0]), wanted)


def test_an_only_input_of_integers_goes_as_the_model_takes_it() -> None:
    rows = [{"x": [i % 5, i % 3], "label": i % 2} for i in range(30)]
    linear = ClassificationTask(nn.Linear(2, 2), rows, rows)
    assert isinstance(linear.model(), nn.Linear)
    net = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 2))
    embedded = ClassificationTask(net, rows, rows)
    assert isinstance(embedded.model(), Adapter)
    assert torch.equal(joined(linear.test(9))[0], joined(embedded.test(9))[0])


def test_inputs_without_labels_are_taken_where_none_are_needed() -> None:
    rows = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in texts(60, 0)]
    task = UnlabelledTask(Encoder(), rows, rows, outputs="classes")
    assert joined(task.test(9))[0].shape == (60, 42)
    assert check_task(task, scored=False)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"text": "a film", "label": 1}, r"train data: Dataset list: sample 0: 'text' is text: a network takes tokens"),
    ({"text": "a film", "idx": 3, "label": 1}, "'text' is text: .* transformers:FOLDER"),
    ({"attention_mask": [1, 1], "ids": [1, 2], "label": 1}, "has no 'input_ids', but Encoder.forward takes input_ids"),
    ({"input_ids": [1, 2], "attention_mask": [1, 1]}, "a dict with keys 'input_ids', 'attention_mask'. Name the class"),
    ({"input_ids": [1, 2], "label": "good"}, "the label must be a class number, found 'good'. Number"),
    ({"input_ids": [1, 99], "label": 1}, "model Encoder does not take input_ids .N, 2. of int64: IndexError"),
    ({"input_ids": {1, 2}, "label": 1}, r"has 'input_ids' \(set\), which is no tensor. Add a transform"),
]


@pytest.mark.parametrize(("row", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_used_is_named_with_its_mend(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassificationTask(Encoder(), [row] * 20, [row] * 20)


def test_a_later_sample_of_another_form_is_named() -> None:
    rows = texts(30, 0)
    for odd, message in (
        ({"input_ids": [1, 2], "labels": 0}, "test data: Dataset list: sample 3 has no 'attention_mask', as the first"),
        ([1, 2], "sample 3 must be a dict as the first one is, found list"),
        ({"input_ids": "a film", "attention_mask": [1], "labels": 0}, "sample 3: 'input_ids' is no numbers, but str"),
    ):
        task = ClassificationTask(Encoder(), rows, [*rows[:3], odd])
        with pytest.raises(ConfigError, match=message):
            joined(task.test(8))
    with pytest.raises(ConfigError, match="length 0 must be at least 1"):
        ClassificationTask(Encoder(), rows, rows, length=0)
    with pytest.raises(ConfigError, match="length=4 is for token numbers of dict samples"):
        ClassificationTask(nn.Linear(3, 2), (torch.rand(9, 3),) * 2, (torch.rand(9, 3),) * 2, length=4)


def test_numbers_that_become_fractions_are_floats_or_named() -> None:
    net = nn.Linear(3, 2)
    rows = [{"x": [1, 2, i if i % 2 else i / 2], "label": i % 2} for i in range(40)]
    assert joined(ClassificationTask(net, rows, rows).test(40))[0][2].tolist() == [1.0, 2.0, 1.0]
    whole = [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "label": i % 2} for i in range(40)]
    odd = [*whole[:3], {"input_ids": [1, 2.5, 3], "attention_mask": [1, 1, 1], "label": 0}]
    with pytest.raises(ConfigError, match="test data: Dataset list: sample 3: 'input_ids' holds fractions"):
        joined(ClassificationTask(Encoder(), whole, odd).test(8))


def test_a_bad_sample_among_those_looked_at_is_named() -> None:
    rows = texts(40, 0)
    rows[17] = {"input_ids": [1, 2], "labels": 1}
    with pytest.raises(ConfigError, match="train data: Dataset list: sample 17 has no 'attention_mask'"):
        ClassificationTask(Encoder(), rows, rows[:10])
    adapter = by_hand(Encoder(), rows[:10], 10)[0]
    with pytest.raises(ConfigError, match="length=8: the model is an Adapter, whose InputSpecs say the length"):
        ClassificationTask(adapter, rows[:10], rows[:10], length=8)


def test_labels_of_every_token_are_no_class() -> None:
    rows = [{**row, "labels": [0] * len(row["input_ids"])} for row in texts(10, 0)]
    with pytest.raises(ConfigError, match=r"sample 0: the label must be a class number, found \d+ values"):
        ClassificationTask(Encoder(), rows, rows)
