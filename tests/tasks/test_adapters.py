from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from autocompress.errors import ConfigError
from autocompress.tasks.adapters import Adapter, DetectorNetwork, InputSpec, as_tensor, pack

IDS, MASK, SIZE = InputSpec("ids", (3,), "int64"), InputSpec("mask", (3,), "bool"), InputSpec("image", (2, 2))


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Several(nn.Module):
    """Takes two inputs by name and gives a dict."""

    def forward(self, *, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        assert ids.dtype == torch.int64
        assert mask.dtype == torch.bool
        return {"kept": torch.where(mask, ids, 0).float(), "length": mask.sum(1, keepdim=True).float(), "none": None}


def test_inputs_are_laid_one_behind_the_other_and_come_back_as_they_were() -> None:
    ids = torch.tensor([[1, 2**24, 3], [4, 5, 6]])
    packed = pack({"ids": ids, "mask": ids > 2, "image": torch.ones(2, 2, 2)}, (IDS, MASK, SIZE))
    assert packed.shape == (2, 10)
    assert packed.dtype == torch.float32
    assert packed[0].tolist() == [1, 2**24, 3, 0, 1, 1, 1, 1, 1, 1]
    given = Adapter(Several(), (IDS, MASK), ("kept",))(packed[:, :6])
    assert given.tolist() == [[0, 2**24, 3], [4, 5, 6]]


def test_several_outputs_become_one_tensor() -> None:
    packed = pack({"ids": torch.tensor([[1, 2, 3]]), "mask": torch.tensor([[True, False, True]])}, (IDS, MASK))
    assert Adapter(Several(), (IDS, MASK))(packed).tolist() == [[1, 0, 3, 2]]


def test_tuples_and_data_classes_are_flattened_in_order() -> None:
    first, second = torch.zeros(2, 3, 4), torch.ones(2, 5)
    assert as_tensor(Pair(first, second)).shape == (2, 17)
    assert as_tensor([first]) is first
    assert as_tensor({"numbers": torch.ones(2, dtype=torch.int64), "scores": second}) is second


@pytest.mark.parametrize(
    ("outputs", "keep", "words"),
    [({"a": torch.ones(1, 2)}, ("b",), "no output 'b'; it has a"), (None, (), "gives no tensor, but NoneType")],
)
def test_an_output_that_is_not_there_is_told(outputs: object, keep: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        as_tensor(outputs, keep)


def test_inputs_of_another_shape_are_told() -> None:
    with pytest.raises(ConfigError, match=r"'ids' must be \(N, 3\); it is \(2, 4\)"):
        pack({"ids": torch.ones(2, 4)}, (IDS,))
    with pytest.raises(ConfigError, match="it is missing"):
        pack({}, (IDS,))
    with pytest.raises(ConfigError, match="'int8'; it must be one of float32"):
        InputSpec("ids", (3,), "int8")


class Head(nn.Module):
    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        flat = torch.cat([f.flatten(2).transpose(1, 2) for f in features], 1)
        return {"boxes": flat[..., :4], "scores": flat[..., :3]}


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Levels(), Head()

    def forward(self, _: Tensor) -> None:
        raise AssertionError("boxes are chosen outside")


class Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        x = self.conv(x)
        return OrderedDict(fine=x, coarse=nn.functional.max_pool2d(x, 2))


def test_a_detector_gives_what_it_computes_before_boxes_are_chosen() -> None:
    assert DetectorNetwork(Detector())(torch.ones(2, 3, 4, 4)).shape == (2, 16 + 4, 4 + 3)
    with pytest.raises(ConfigError, match="two-stage"):
        DetectorNetwork(nn.Linear(2, 2))


def test_a_models_own_inputs_are_taken_as_well_as_packed_ones() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    adapted = Adapter(Several(), (IDS, MASK), ("kept",))
    packed = pack({"ids": ids, "mask": ids > 2}, (IDS, MASK))
    named = adapted.unpack(packed)
    assert {name: value.dtype for name, value in named.items()} == {"ids": torch.int64, "mask": torch.bool}
    assert torch.equal(adapted(*named.values()), adapted(packed))


class Looked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.table(ids).mean(1)
        return found


def test_one_input_of_integers_is_told_from_a_packed_one() -> None:
    ids, adapted = torch.tensor([[1, 2, 3]]), Adapter(Looked(), (IDS,))
    assert torch.equal(adapted(ids), adapted(ids.float()))
