"""Stratified orders and how many samples tell a difference."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from autocompress.tasks.samples import seeded
from autocompress.tasks.sampling import (
    changes_labels,
    class_numbers,
    covering_prefix,
    listed_labels,
    samples_for,
    standard_error,
    stratified_order,
)


def counts(labels: Tensor) -> Counter[int]:
    return Counter(labels.tolist())


@pytest.mark.parametrize("size", [40, 100, 333])
def test_every_first_part_holds_the_classes_in_proportion(size: int) -> None:
    labels = torch.cat([torch.zeros(500), torch.ones(300), torch.full((200,), 7.0)]).long()
    order = stratified_order(1000, labels, seeded(0))
    assert sorted(order.tolist()) == list(range(1000))
    found = counts(labels[order[:size]])
    for label, share in ((0, 0.5), (1, 0.3), (7, 0.2)):
        assert abs(found[label] - share * size) <= 1


def test_as_many_samples_as_balanced_classes_are_one_of_each() -> None:
    labels = torch.arange(100).repeat_interleave(20)
    order = stratified_order(2000, labels, seeded(3))
    for start in (0, 100, 700):
        assert counts(labels[order[start : start + 100]]) == Counter(range(100))


def test_the_order_is_random_and_depends_on_the_seed_alone() -> None:
    labels = torch.arange(50).repeat_interleave(10)
    first, again, other = (stratified_order(500, labels, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    plain = stratified_order(500, None, seeded(0))
    assert sorted(plain.tolist()) == list(range(500)) and plain.tolist() != list(range(500))
    # Neither the classes nor the samples of a class keep their order.
    assert labels[first[:50]].tolist() != list(range(50))
    assert (first[labels[first] == 4]).tolist() != list(range(40, 50))


def test_a_cover_has_rare_classes_too() -> None:
    labels = torch.tensor([0] * 990 + [1] * 6 + [2] * 4)
    order = stratified_order(1000, labels, seeded(0))
    chosen = covering_prefix(order, labels, 20)
    assert len(chosen) == len(set(chosen.tolist())) == 20
    assert set(labels[chosen].tolist()) == {0, 1, 2}
    # In the order they had.
    place = {int(index): number for number, index in enumerate(order)}
    assert [place[int(index)] for index in chosen] == sorted(place[int(index)] for index in chosen)
    assert torch.equal(covering_prefix(order, labels, 2), order[:2])
    assert torch.equal(covering_prefix(order, None, 5), order[:5])
    assert torch.equal(covering_prefix(order, labels, 5000), order)


class Listing(Dataset[Any]):
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("labels are listed, no sample is to be read")


class Unreadable(Listing):
    @property
    def targets(self) -> Any:
        raise RuntimeError("not loaded")


LISTED = [
    Listing(targets=[2, 0, 1]),
    Listing(targets=np.array([2, 0, 1], dtype=np.uint8)),
    Listing(labels=torch.tensor([2, 0, 1])),
    Listing(targets=[torch.tensor(2), torch.tensor(0), torch.tensor(1)]),
    Listing(samples=[("a.png", 2), ("b.png", 0), ("c.png", 1)]),
    Listing(imgs=[("a.png", 2), ("b.png", 0), ("c.png", 1)]),
    Subset(Listing(targets=np.array([0, 1, 2])), [2, 0, 1]),
    ConcatDataset([Subset(Listing(targets=[2, 0, 1]), [0]), Subset(Listing(targets=[2, 0, 1]), [1, 2])]),
    TensorDataset(torch.zeros(3, 2), torch.tensor([2, 0, 1])),
    [(torch.zeros(2), 2), (torch.zeros(2), 0), (torch.zeros(2), 1)],
]


@pytest.mark.parametrize("dataset", LISTED, ids=lambda dataset: type(dataset).__name__)
def test_labels_are_found_where_datasets_list_them(dataset: Any) -> None:
    found = listed_labels(dataset)
    assert found is not None and found.dtype == torch.int64
    assert found.tolist() == [2, 0, 1]


UNLISTED = [
    Listing(),
    Unreadable(),
    Listing(targets=["cat", "dog", "cat"]),
    Listing(targets=[0.1, 0.2, 0.3]),
    Listing(targets=[1, 2]),
    Listing(targets=[[1], [2, 3], [4]]),
    Listing(labels={"a": 1}),
    Listing(samples=["a", "b", "c"]),
    TensorDataset(torch.zeros(3, 2)),
    TensorDataset(torch.zeros(3, 2), torch.zeros(3)),
    ConcatDataset([Listing(targets=[1, 2, 3]), Listing()]),
]


@pytest.mark.parametrize("dataset", UNLISTED, ids=lambda dataset: type(dataset).__name__)
def test_what_is_no_list_of_classes_is_left(dataset: Any) -> None:
    assert listed_labels(dataset) is None


def test_a_transform_of_labels_is_seen_through_subsets() -> None:
    changed = Listing(targets=[0, 1, 2], target_transform=lambda label: label + 1)
    assert changes_labels(ConcatDataset([Subset(changed, [0])]))
    assert not changes_labels(Subset(Listing(targets=[0, 1, 2], target_transform=None), [0]))


def test_class_numbers_are_one_integer_per_sample() -> None:
    assert class_numbers(torch.tensor([1, 2], dtype=torch.uint8)) is not None
    assert class_numbers(torch.tensor([1.0, 2.0])) is None
    assert class_numbers(torch.zeros(4, 3, dtype=torch.int64)) is None


def test_the_number_of_samples_follows_the_loss_to_tell() -> None:
    assert samples_for(None) is None
    assert samples_for(0.01) == 4000
    assert samples_for(0.005) == 16000
    assert samples_for(0.2) == 1024  # candidates are to be ranked, too
    for drop in (0.002, 0.01, 0.02):
        count = samples_for(drop)
        assert count is not None
        assert standard_error(count, drop) <= drop / 2 + 1e-12


def test_the_standard_error_is_that_of_paired_networks() -> None:
    """Drawn: two networks that disagree on a tenth of the samples, scored on the same ones."""
    generator = np.random.default_rng(0)
    differences = generator.choice([-1, 0, 1], p=[0.05, 0.9, 0.05], size=(2000, 4000)).mean(1)
    assert standard_error(4000, 0.01) == pytest.approx(float(differences.std()), rel=0.1)
    assert standard_error(4000) == pytest.approx(math.sqrt(0.1 / 4000))
