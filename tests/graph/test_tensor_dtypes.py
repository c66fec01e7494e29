"""Who reads whose result, read off exported graphs whose structure is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autocompress.graph.template import GraphTemplate
from autocompress.graph.tensor_dtypes import INPUT, OUTPUT, Context, TensorDtypes
from tests import networks


def wired(model: nn.Module, blocks: tuple[str, ...] = ()) -> TensorDtypes:
    return GraphTemplate(networks.randomize(model).eval(), networks.images(1), blocks).wiring


def junctions(found: TensorDtypes) -> list[str]:
    return [name for name in found.inputs if name not in found.layers and name != OUTPUT]


def test_a_chain() -> None:
    found = wired(networks.Plain())
    assert found.inputs == {"conv1": (INPUT,), "conv2": ("conv1",), "fc": ("conv2",), OUTPUT: ("fc",)}
    assert found.layers == {"conv1", "conv2", "fc"}


def test_sums_are_junctions_and_blocks_know_their_ends() -> None:
    found = wired(networks.Residual(), ("same",))
    first, second = junctions(found)
    assert first.startswith("Add:") and set(found.inputs[first]) == {"same.conv2", "stem"}
    assert set(found.inputs[second]) == {"wider.conv2", "wider.downsample.0"}
    assert found.inputs["wider.conv1"] == found.inputs["wider.downsample.0"] == (first,)
    assert found.blocks["same"] == (first, "stem", frozenset({"same.conv1", "same.conv2", first}))


def test_a_concatenation() -> None:
    found = wired(networks.Concat())
    (join,) = junctions(found)
    assert found.inputs["left"] == found.inputs["right"] == (INPUT,)
    assert found.inputs[join] == ("left", "right") and found.inputs["join"] == (join,)


@pytest.mark.parametrize("count", [2, 3])
def test_one_reader_in_floats_keeps_a_tensor_in_floats(count: int) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.heads = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(count))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return torch.cat([head(x) for head in self.heads], 1)

    found = wired(Branches())
    heads = [f"heads.{i}" for i in range(count)]
    assert found.contexts(heads)["stem"].outputs_int8 == 1.0
    some = found.contexts(heads[1:])
    assert some["stem"].outputs_int8 == some["heads.0"].siblings_int8 == round((count - 1) / count, 4)
    assert some["heads.1"].joins == 1 and some["heads.1"].beyond_int8 == 0.0


def test_a_removed_block_is_bypassed_also_behind_another() -> None:
    inputs = {
        "a": (INPUT,), "b": ("a",), "Add:1": ("b", "a"), "c": ("Add:1",), "Add:2": ("c", "Add:1"), "d": ("Add:2",),
        OUTPUT: ("d",),
    }  # fmt: skip
    blocks = {"one": ("Add:1", "a", frozenset({"b", "Add:1"})), "two": ("Add:2", "Add:1", frozenset({"c", "Add:2"}))}
    found = TensorDtypes(inputs, blocks, frozenset("abcd"))
    assert found.contexts("abcd")["a"] == Context(0.0, 1.0, 0.5, 1, 0.5)
    for removed in (("one", "two"), ("two", "one")):
        left = found.contexts("ad", removed)
        assert set(left) == {"a", "d"}
        assert left["a"] == Context(0.0, 1.0, 1.0, 0, 0.0) and left["d"].inputs_int8 == 1.0
    assert found.contexts("ad", ("two",))["d"].inputs_int8 == 0.5  # of a and b, whose results meet before it


def test_nothing_is_around_nothing() -> None:
    assert TensorDtypes().contexts(()) == {}
