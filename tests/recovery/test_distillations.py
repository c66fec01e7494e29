"""Each loss by hand, what they learn on the way, and students of every kind trained by them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.quantization import calibrate
from autocompress.config import RecoveryConfig
from autocompress.errors import CompressionError, ConfigError
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.recovery import distillation
from autocompress.recovery import finetune as module
from autocompress.recovery.budget import Budget
from autocompress.recovery.distillation import DISTILLATIONS, Distiller, Teacher
from autocompress.recovery.distillation_points import OUTPUT, Place, observed
from autocompress.recovery.distillations.attention import Attention, attention_map
from autocompress.recovery.distillations.features import Features
from autocompress.recovery.distillations.logits import Logits
from autocompress.recovery.finetune import finetune
from autocompress.recovery.optimizers import make_optimizer
from autocompress.tasks import ClassificationTask
from autocompress.tasks.divergence import ClassScores
from tests.recovery.conftest import untrained

LONG = 1000.0
CONFIG = RecoveryConfig(batch_size=64, learning_rate=0.1)
INNER = CONFIG.model_copy(update={"distill": {"logits": None, "attention": None, "features": None}})
INT8 = {name: LayerPolicy("int8") for name in ("conv1", "conv2", "fc")}


def place(teacher: int, student: int, positions: tuple[int, ...] = (1, 2), axis: int = 1) -> Place:
    return Place("t", "s", axis, teacher, student, positions)


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_logits_are_compared_at_the_configured_temperature() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    method = Logits(RecoveryConfig(temperature=2.0), [place(2, 2)])
    found = method.loss(method.places[0], student, method.target(method.places[0], teacher.bfloat16()))
    # p = softmax(1, 0) = 0.7311, 0.2689 against a half each: 4 * sum p log 2p.
    assert float(found) == pytest.approx(4 * (0.731059 * 0.379885 - 0.268941 * 0.620115), rel=1e-4)
    assert float(found) == pytest.approx(float(ClassScores()(student, teacher, 2.0)))


def test_an_attention_map_by_hand() -> None:
    here = place(1, 2)
    student = torch.tensor([[[[1.0, 0.0]], [[1.0, 2.0]]]])  # squares over channels: 2 and 4
    teacher = torch.tensor([[[[3.0, 0.0]]]])  # 9 and 0
    assert attention_map(here.rows(student)).tolist() == [pytest.approx([2 / 20**0.5, 4 / 20**0.5])]
    method = Attention(CONFIG, [here])
    target = method.target(here, teacher)
    assert target.dtype == torch.bfloat16 and target.tolist() == [[1.0, 0.0]]
    wanted = (2 / 20**0.5 - 1) ** 2 + (4 / 20**0.5) ** 2
    assert float(method.loss(here, student, target)) == pytest.approx(wanted, rel=1e-5)
    # A mean over samples, whatever the size of the features and their sign.
    both = torch.cat([-5 * student, student])
    assert float(method.loss(here, both, target.repeat(2, 1))) == pytest.approx(wanted, rel=1e-5)
    assert float(method.loss(here, 3 * teacher, target)) == pytest.approx(0, abs=1e-6)
    assert method.parameters() == []
    assert Attention.suits(here) and not Attention.suits(place(4, 4, (1, 1)))


def test_features_by_hand() -> None:
    here = place(2, 1, (3,))
    student = torch.tensor([[[1.0, 2.0, 3.0]]])
    teacher = torch.tensor([[[2.0, 4.0, 6.0], [0.0, 0.0, 0.0]]])
    method = Features(CONFIG, [here])
    weight, bias = method.parameters()
    assert weight.shape == (2, 1) and bias.shape == (2,)
    # The projection begins as [[1], [0]]: errors 1, 2, 3 and none; the teacher varies by 2, 0, 2 and not at all.
    loss = method.loss(here, student, method.target(here, teacher))
    assert loss.item() == pytest.approx((1 + 4 + 9) / (4 + 0 + 4), rel=1e-5)
    loss.backward()
    assert weight.grad is not None and bias.grad is not None
    # d/dw of sum (w x - 2 x)^2 / 8 at w = 1 is -2 sum x^2 / 8.
    assert weight.grad.tolist() == [[pytest.approx(-2 * 14 / 8, rel=1e-5)], [0.0]]
    assert bias.grad.tolist() == pytest.approx([-2 * 6 / 8, 0.0], rel=1e-5)
    method.start(here, student, teacher)
    assert method.loss(here, student, method.target(here, teacher)).item() < 1e-4
    # No better than the teacher's mean is a loss of 1.
    with torch.no_grad():
        weight.zero_()
        bias.copy_(torch.tensor([4.0, 0.0]))
    assert method.loss(here, student, method.target(here, teacher)).item() == pytest.approx(1, rel=1e-5)


def test_tokens_are_compared_over_their_channels() -> None:
    maps, wanted = torch.randn(2, 3, 2, 2), torch.randn(2, 5, 2, 2)
    tokens, expected = maps.flatten(2).movedim(1, 2), wanted.flatten(2).movedim(1, 2)
    for kind in (Attention, Features):
        here, there = place(5, 3, (2, 2)), place(5, 3, (4,), axis=2)
        method = kind(CONFIG, [here, there])
        of_maps = method.loss(here, maps, method.target(here, wanted))
        assert torch.allclose(of_maps, method.loss(there, tokens, method.target(there, expected)))
        channels_last = maps.contiguous(memory_format=torch.channels_last)
        assert torch.allclose(of_maps, method.loss(here, channels_last, method.target(here, wanted)))


def test_a_teacher_that_never_varies_and_a_student_that_is_zero_have_finite_losses() -> None:
    for kind in (Attention, Features):
        method = kind(CONFIG, [place(2, 2)])
        (here,) = method.places
        student = torch.zeros(4, 2, 1, 2, requires_grad=True)
        method.start(here, student.detach(), torch.ones(4, 2, 1, 2))
        method.loss(here, student, method.target(here, torch.ones(4, 2, 1, 2))).backward()
        assert student.grad is not None and bool(student.grad.isfinite().all())


# -- put together -----------------------------------------------------------------------------------------------------


def narrow(task: ClassificationTask, layers: dict[str, LayerPolicy] | None = None) -> nn.Module:
    """A student of half the width, untrained."""
    policy = CompressionPolicy(pruning={"conv1": 0.5, "conv2": 0.5}, layers=layers or {})
    model = apply_policy(untrained(5), policy, CompressionContext(task.example_inputs(2)))
    calibrate(model, task.calibration(64))
    return model


def unexplained(task: ClassificationTask, student: nn.Module) -> float:
    """The share of the teacher's features that no linear map of the student's gives, on data not trained on."""
    distiller = Distiller(
        Teacher(task.model(), torch.float32), student, task, CONFIG.model_copy(update={"distill": {"features": None}})
    )
    inputs = next(task.validation(128))[0]
    with torch.no_grad(), distiller.watching(student.eval()) as seen:
        outputs = student(inputs)
    return distiller.loss(outputs, seen, distiller.targets(inputs, 0, 0)).item()


def test_weights_and_means_over_places(task: ClassificationTask) -> None:
    teacher, model, inputs = Teacher(task.model(), torch.float32), narrow(task), task.example_inputs(16)
    config = RecoveryConfig(distill={"attention": 3.0, "logits": 0.5})
    distiller = Distiller(teacher, model, task, config)
    assert distiller.describe() == "attention at bn1, bn2; logits"
    with torch.no_grad(), distiller.watching(model) as seen:
        outputs = model(inputs)
    found = distiller.loss(outputs, seen, distiller.targets(inputs, 0, 0))
    parts = []
    for name in ("bn1", "bn2"):
        maps = []
        for network in (teacher.model, model):
            with torch.no_grad(), observed(network, [name]) as found_there:
                network(inputs)
            maps.append(nn.functional.normalize(found_there[name].square().sum(1).flatten(1)))
        parts.append((maps[0] - maps[1]).square().sum(1).mean())
    soft = ClassScores()(outputs, teacher.outputs(inputs, 0, 0), 4.0)
    torch.testing.assert_close(found, 3 * (parts[0] + parts[1]) / 2 + 0.5 * soft, rtol=1e-2, atol=1e-4)


def test_gradients_reach_the_student_and_the_projections(task: ClassificationTask) -> None:
    model = narrow(task)
    distiller = Distiller(Teacher(task.model(), torch.float32), model, task, INNER)
    before = [p.detach().clone() for p in distiller.parameters()]
    inputs = task.example_inputs(16)
    with distiller.watching(model.train()) as seen:
        outputs = model(inputs)
    distiller.loss(outputs, seen, distiller.targets(inputs, 0, 0)).backward()
    make_optimizer("sgd", model, distiller.parameters(), 0.1, CONFIG).step()
    assert len(before) == 4
    assert all(not torch.equal(old, new) for old, new in zip(before, distiller.parameters(), strict=True))
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in model.parameters())


def test_projections_begin_with_the_statistics_of_training_and_leave_the_student_alone(
    task: ClassificationTask,
) -> None:
    """An untrained student's running statistics are far from those of its batches."""
    model = narrow(task)
    with torch.no_grad():
        model.get_submodule("conv1").weight.mul_(100)
    before = copy.deepcopy(model.state_dict())
    config = CONFIG.model_copy(update={"distill": {"features": None}})
    distiller = Distiller(Teacher(task.model(), torch.float32), model, task, config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training and not any(m.training for m in model.modules())
    inputs = task.example_inputs(32)
    with torch.no_grad(), distiller.watching(model.train()) as seen:
        outputs = model(inputs)
    assert distiller.loss(outputs, seen, distiller.targets(inputs, 0, 0)).item() < 1


def test_features_of_a_student_get_closer_to_the_teachers(task: ClassificationTask) -> None:
    model = narrow(task)
    before = unexplained(task, model)
    config = CONFIG.model_copy(update={"distill": {"features": None}, "alpha": 1.0})
    said: list[str] = []
    keys = list(model.state_dict())
    # By the metric, a student whose last layer learns nothing gets no better: without it, the last state stays.
    unmeasured = copy.copy(task)
    unmeasured._validation_indices = unmeasured._validation_indices[:0]
    finetune(model, Teacher(task.model(), torch.float32), unmeasured, config, Budget(6, LONG), on_message=said.append)
    assert unexplained(task, model) < 0.7 * before
    assert said == ["Distilling features at bn1, bn2"]
    # Nothing of it is left on the student.
    assert list(model.state_dict()) == keys
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layers", [{}, INT8, {"conv2": LayerPolicy(rank_ratio=0.5)}], ids=["pruned", "int8", "lowrank"]
)
def test_compressed_students_of_every_kind(
    task: ClassificationTask, layers: dict[str, LayerPolicy], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "fast_dtype", lambda *_: dtype)
    model = narrow(task, layers)
    report = finetune(model, Teacher(task.model(), dtype), task, INNER, Budget(5, LONG))
    outputs, targets = zip(*((model(x), y) for x, y in task.validation(256)), strict=True)
    assert task.metric(torch.cat(outputs), torch.cat(targets)) > 0.85
    assert 0 < report.loss < 10


def test_it_goes_on_from_a_checkpoint_without_projections(task: ClassificationTask, tmp_path: Path) -> None:
    path, teacher, model = tmp_path / "checkpoint.safetensors", Teacher(task.model(), torch.float32), narrow(task)

    class Interrupted(Exception):  # noqa: N818
        pass

    def stop(fraction: float, text: str) -> None:
        if fraction >= 0.7:
            raise Interrupted

    with pytest.raises(Interrupted):
        finetune(model, teacher, task, INNER, Budget(4, LONG), checkpoint=path, progress=stop)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        assert file.metadata()["epoch"] == "2"
    report = finetune(narrow(task), teacher, task, INNER, Budget(4, LONG), checkpoint=path)
    assert report.epochs == pytest.approx(4) and report.loss < 5


# -- the teacher's memory ---------------------------------------------------------------------------------------------


class Counted(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)  # type: ignore[no-any-return]


def asked(distiller: Distiller, teacher: nn.Module, inputs: Tensor, key: tuple[int, int]) -> tuple[int, dict[str, int]]:
    """Return how often the teacher ran for a question, and the bytes of the answers."""
    assert isinstance(teacher, Counted)
    before = teacher.calls
    found = distiller.targets(inputs, *key)
    return teacher.calls - before, {name: answer.nbytes for (name, _), answer in found.items()}


def test_inner_answers_are_kept_in_half_precision_within_the_limit(
    task: ClassificationTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, inputs = Counted(task.model()), task.example_inputs(8)
    teacher = Teacher(network, torch.float32)
    student = Counted(untrained(5))
    distiller = Distiller(teacher, student, task, INNER.model_copy(update={"distill_at": {"inner.bn2": "inner.bn2"}}))
    # Outputs of four floats; a map of 4 x 4 and its 16 channels in bfloat16; 8 samples of each.
    assert asked(distiller, network, inputs, (0, 0)) == (1, {"logits": 128, "attention": 256, "features": 4096})
    assert asked(distiller, network, inputs, (0, 0))[0] == 0
    first = distiller.targets(inputs, 0, 0)
    monkeypatch.setattr(distillation, "_CACHE_BYTES", 2 * (128 + 256) + 4096)
    assert [asked(distiller, network, inputs, (0, 1))[0] for _ in range(3)] == [1, 1, 1]
    again = distiller.targets(inputs, 0, 1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    # A student that asks for less makes room; the outputs serve every student.
    plain = Distiller(teacher, student, task, CONFIG)
    assert asked(plain, network, inputs, (0, 0)) == (0, {"logits": 128})
    assert asked(distiller, network, inputs, (0, 0))[0] == 1


# -- what cannot be ---------------------------------------------------------------------------------------------------


def test_unknown_methods_and_nothing_in_common(task: ClassificationTask) -> None:
    assert set(DISTILLATIONS) == {"logits", "features", "attention"}
    teacher = Teacher(task.model(), torch.float32)
    with pytest.raises(ConfigError, match=r"'attentoin'\. Did you mean 'attention'\?"):
        Distiller(teacher, untrained(), task, RecoveryConfig(distill={"attentoin": None}))
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(CompressionError, match="'attention' needs a module of the same name"):
        Distiller(teacher, other, task, INNER)
    assert Distiller(teacher, other, task, CONFIG).places == ()
    assert OUTPUT not in Distiller(teacher, untrained(), task, INNER).describe().split(", ")
