"""What modules remember of a forward pass is taken away before the next one in training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autocompress.config import RecoveryConfig
from autocompress.model.eval_caches import Memory, remembered
from autocompress.recovery.distillation import Teacher
from autocompress.recovery.finetune import Budget, finetune
from autocompress.tasks import LabelFreeTask, UnlabelledTask
from tests import networks


class Caching(nn.Module):
    """Keeps what it computes of a weight, in a dict or an attribute, for as long as it is evaluated."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.conv, self.scale, self.fc = nn.Conv2d(3, 8, 3), nn.Parameter(torch.ones(8)), nn.Linear(8, 4)
        self.place, self.cache, self.kept = place, dict[str, Tensor](), None

    def train(self, mode: bool = True) -> Caching:
        super().train(mode)
        if mode:
            self.cache, self.kept = {}, None
            vars(self).pop("made", None)
        return self

    def _scaled(self) -> Tensor:
        if self.place == "dict":
            if "cpu" not in self.cache:
                self.cache["cpu"] = self.scale.exp()
            return self.cache["cpu"]
        if self.place == "none":
            if self.kept is None:
                self.kept = self.scale.exp()
            return self.kept
        if not hasattr(self, "made"):
            self.made = self.scale.exp()
        return self.made

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.conv(x) * self._scaled()[:, None, None]).relu().mean((2, 3)))


@pytest.mark.parametrize("place", ["dict", "none", "attribute"])
def test_a_cache_of_weights_is_trained_and_not_stale_afterwards(place: str) -> None:
    torch.manual_seed(0)
    inputs = networks.images(64, 12)
    task = LabelFreeTask(UnlabelledTask(Caching(place).eval(), inputs, inputs[:8], name="caching"))
    model = task.network()
    with torch.no_grad():
        model.fc.weight.normal_()
    before = model.scale.detach().clone()
    config = RecoveryConfig(batch_size=8, mixtures="never")
    finetune(model, Teacher(task.network(), torch.float32), task, config, Budget(6, float("inf")))
    assert not torch.equal(model.scale, before)
    fresh = Caching(place).eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), fresh(inputs))


def test_what_is_no_memory_stays() -> None:
    model = Caching("dict").eval()
    model.constant, model.names = torch.ones(3), ["a"]  # type: ignore[assignment]
    memory = Memory(model)
    assert not model.training
    model(networks.images(1, 12))
    assert len(list(remembered(vars(model)))) == 1
    memory.forget()
    assert model.cache == {} and model.names == ["a"] and model.constant.sum() == 3
