"""Models as people bring them come in by one door, plain, and compute what they computed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from autocompress.errors import ConfigError
from autocompress.model.inventory import take_inventory
from autocompress.tasks import ClassificationTask
from autocompress.tasks.plain_model import plain_copy


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    )


def inputs(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def masked() -> nn.Module:
    model = network()
    prune.l1_unstructured(model[2], "weight", amount=0.5)
    model(inputs())  # what a forward leaves behind cannot be copied by torch
    return model


def normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = network()
    for place in (0, 2, 5):
        model[place] = norm(model[place])
    for _ in range(3):
        model(inputs())
    return model.eval()


def compiled_within() -> nn.Module:
    model = network()
    model[2] = torch.compile(model[2])  # type: ignore[assignment]
    return model


def frozen() -> nn.Module:
    return network().requires_grad_(False)


BROUGHT: dict[str, tuple[Callable[[], Any], str]] = {
    "compiled": (lambda: torch.compile(network()), "unwrapped from OptimizedModule"),
    "a compiled layer": (compiled_within, "2 was unwrapped from OptimizedModule"),
    "data parallel": (lambda: nn.DataParallel(network()), "unwrapped from DataParallel"),
    "pruning masks": (masked, "the pruning mask of 2 became plain weights"),
    "weight norm": (lambda: normed(parametrizations.weight_norm), "the parametrization WeightNorm of 0, 2, 5"),
    "spectral norm": (lambda: normed(parametrizations.spectral_norm), "the parametrization SpectralNorm of 0, 2, 5"),
    "old weight norm": (lambda: normed(torch.nn.utils.weight_norm), "the WeightNorm of 0, 2, 5"),
    "old spectral norm": (lambda: normed(torch.nn.utils.spectral_norm), "the SpectralNorm of 0, 2, 5"),
    "frozen": (frozen, "6 frozen parameters (0.weight, 0.bias, 2.weight and 3 more)"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("kind", BROUGHT)
def test_a_model_comes_in_plain_and_computes_the_same(kind: str) -> None:
    make, words = BROUGHT[kind]
    brought = make()
    inner = getattr(brought, "_orig_mod", None) or getattr(brought, "module", None) or brought
    with torch.no_grad():
        expected = inner.eval()(inputs())
    keys = set(inner.state_dict())
    found, said = plain_copy(brought, "Task 'mine'")
    assert words in " | ".join(said)
    with torch.no_grad():
        torch.testing.assert_close(found(inputs()), expected, rtol=1e-5, atol=1e-6)
    assert all(p.requires_grad for p in found.parameters())
    assert set(found.state_dict()) == set(network().state_dict())
    assert {name for name, _ in found.named_parameters()} == set(found.state_dict())
    # What the user holds stays as it was.
    assert set(inner.state_dict()) == keys
    # All of it can be compressed.
    inventory = take_inventory(found, inputs(2))
    assert list(inventory.layers) == ["0", "2", "5"] and list(inventory.groups) == ["0", "2"]
    assert plain_copy(found, "Task 'mine'")[1] == ()


def test_a_layer_left_in_training_comes_in_evaluated() -> None:
    model = network()
    model.insert(4, nn.Dropout(0.5))
    model.eval()[4].train()
    found, _ = plain_copy(model, "Task 'mine'")
    assert not any(module.training for module in found.modules())
    assert torch.equal(found(inputs()), found(inputs()))
    assert model[4].training


def test_what_modules_put_into_a_state_dict_stays_out_of_ours() -> None:
    class Counting(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.calls = state["calls"]

    found, _ = plain_copy(nn.Sequential(Counting(3, 3), nn.Linear(3, 2)), "Task 'mine'")
    state = found.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    found.load_state_dict(state)
    assert found[0].calls == 3  # type: ignore[index,union-attr]


def test_half_precision_becomes_float32() -> None:
    found, said = plain_copy(network().bfloat16(), "Task 'mine'")
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert said == ("weights in bfloat16 became float32; engines choose their own dtype",)


class Locked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.lock = threading.Lock()


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return network()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.jit.trace(network(), inputs()), "of torch.jit, whose layers cannot be changed.*traced"),
        (on_meta, r"0\.weight is on the meta device.*Load the weights"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), r"0\.weight has no shape yet.*Run the model once"),
        (lambda: network().state_dict(), "found OrderedDict. A state dict holds weights alone"),
        (lambda: nn.ReLU, "found type. ReLU is a class: call it"),
        (Locked, "cannot be copied: TypeError.*Keep what is no weight"),
        (lambda: torch.export.export(network(), (inputs(),)), "ExportedProgram.*Give the nn.Module"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_changed_is_refused_at_the_door(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"Task 'mine'.*{words}"):
        plain_copy(make(), "Task 'mine'")


def test_a_task_says_what_was_done_to_its_model() -> None:
    data = (inputs(40), torch.arange(40) % 4)
    task = ClassificationTask(masked(), data, data)
    assert task.model_notes == ("the pruning mask of 2 became plain weights",)
    assert float((task.model()[2].weight == 0).float().mean()) == 0.5  # type: ignore[index]
