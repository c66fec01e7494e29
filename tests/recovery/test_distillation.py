"""The distillation loss, and a teacher that does not say the same thing twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autocompress.recovery import distillation
from autocompress.recovery.distillation import Teacher
from autocompress.tasks.divergence import ClassScores
from tests import networks


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(4, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x)


def test_the_loss_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    p = torch.tensor([2.0, 0.0]).div(4).softmax(0)
    wanted = 16 * (p * (p / 0.5).log()).sum()
    torch.testing.assert_close(ClassScores()(student, teacher, 4.0), wanted)
    # The mean over the batch, not the sum.
    torch.testing.assert_close(ClassScores()(student.repeat(7, 1), teacher.repeat(7, 1), 4.0), wanted)


def test_the_loss_is_zero_for_equal_outputs_and_positive_for_others() -> None:
    outputs = torch.randn(5, 10)
    assert float(ClassScores()(outputs, outputs + 3, 2.0)) == pytest.approx(0, abs=1e-5)
    assert float(ClassScores()(outputs, outputs.flip(1), 2.0)) > 0.1


def test_outputs_are_kept_per_epoch_and_index() -> None:
    model = Counting()
    teacher = Teacher(model, torch.float32)
    first, second = torch.randn(2, 4), torch.randn(2, 4)
    kept = teacher.outputs(first, 0, 0)
    assert torch.equal(kept, model.fc(first))
    assert teacher.outputs(second, 0, 0) is kept
    assert model.calls == 1
    for key in ((0, 1), (1, 0)):
        assert torch.equal(teacher.outputs(second, *key), model.fc(second))
    assert model.calls == 3
    assert not kept.requires_grad


def test_beyond_its_memory_it_computes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_CACHE_BYTES", 2 * 3 * 4)
    model = Counting()
    teacher = Teacher(model, torch.float32)
    for _ in range(3):
        for index in range(2):
            teacher.outputs(torch.zeros(2, 4), 0, index)
    assert model.calls == 1 + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_answers_in_float_and_evaluates(dtype: torch.dtype) -> None:
    model = networks.randomize(networks.Plain()).train()
    with torch.no_grad():
        wanted = networks.randomize(networks.Plain())(networks.images())
    found = Teacher(model, dtype).outputs(networks.images(), 0, 0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
