"""What stands around each layer, read off exported graphs whose structure is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autocompress.engines.export import layer_nodes, to_onnx
from autocompress.engines.surroundings import Surroundings, surroundings
from tests import networks


def around(model: nn.Module) -> dict[str, Surroundings]:
    graph = to_onnx(networks.randomize(model), networks.images(1))
    names = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return surroundings(layer_nodes(graph, names))


def test_a_chain() -> None:
    found = around(networks.Plain())
    assert found == {
        "conv1": Surroundings((), ("conv2",), ("MaxPool", "Relu"), 1),
        "conv2": Surroundings(("conv1",), ("fc",), ("ReduceMean", "Relu"), 1),
        "fc": Surroundings(("conv2",), (), (), 1),
    }


def test_a_sum_is_fed_by_both_its_sides() -> None:
    found = around(networks.Residual())
    assert found["stem"].after == ("same.conv1", "wider.conv1", "wider.downsample.0")
    assert found["wider.conv1"].before == found["wider.downsample.0"].before == ("same.conv2", "stem")
    assert found["wider.conv1"].readers == found["wider.downsample.0"].readers == 2
    # The identity shortcut reads the stem's result as well.
    assert found["same.conv1"].readers == 2 and found["same.conv2"].readers == 1
    assert "Add" in found["same.conv2"].ops and found["fc"].before == ("wider.conv2", "wider.downsample.0")


def test_a_concatenation() -> None:
    found = around(networks.Concat())
    assert found["join"].before == ("left", "right")
    assert found["left"].after == found["right"].after == ("join",)
    assert found["left"].ops == ("Concat", "Relu")
    assert found["left"].readers == 2  # the picture is read by both


@pytest.mark.parametrize("count", [1, 3])
def test_how_many_read_a_layers_input(count: int) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.heads = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(count))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return torch.cat([head(x) for head in self.heads], 1)

    found = around(Branches())
    assert [found[f"heads.{i}"].readers for i in range(count)] == [count] * count
    assert found["stem"].after == tuple(f"heads.{i}" for i in range(count))


def test_nothing_is_around_nothing() -> None:
    assert surroundings({}) == {}
