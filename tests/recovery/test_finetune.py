"""Training a student back on a task that takes seconds."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.quantization import activation_ranges, calibrate, quantization_mode, quantized_layers
from autocompress.config import RecoveryConfig
from autocompress.errors import CompressionError, ConfigError
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.recovery import finetune as module
from autocompress.recovery import recalibrate
from autocompress.recovery.budget import Budget, learning_rate_factor
from autocompress.recovery.checkpoint import save_checkpoint
from autocompress.recovery.distillation import Teacher
from autocompress.recovery.finetune import AUGMENTED_EPOCHS, finetune
from autocompress.recovery.recalibration import batch_norms
from autocompress.tasks import Batch, ClassificationTask
from tests.recovery.conftest import untrained

CONFIG = RecoveryConfig(batch_size=64, learning_rate=0.1)
LONG = 1000.0
INT8 = CompressionPolicy(layers={n: LayerPolicy("int8") for n in ("conv1", "conv2", "fc")})


class Watched(ClassificationTask):
    """Writes down every epoch and batch that is asked of it; `log` is shared by nobody else."""

    log: list[int]
    batches = 0

    def train_batches(self, batch_size: int, epoch: int) -> Iterator[Batch]:
        self.log.append(epoch)
        for batch in super().train_batches(batch_size, epoch):
            self.batches += 1
            yield batch


@pytest.fixture
def watched(task: ClassificationTask) -> Watched:
    made = copy.copy(task)
    made.__class__ = Watched
    assert isinstance(made, Watched)
    made.log = []
    return made


@pytest.fixture
def teacher(task: ClassificationTask) -> Teacher:
    return Teacher(task.model(), torch.float32)


class Clock:
    """Time that passes in forward passes only: a second in each."""

    now = 0.0

    def run_in(self, model: nn.Module) -> nn.Module:
        model.register_forward_hook(lambda *_: self._tick())
        return model

    def _tick(self) -> None:
        self.now += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module.time, "monotonic", lambda: made.now)
    return made


def unmeasured(task: ClassificationTask) -> ClassificationTask:
    """The task without validation data: the last state of a training is its result."""
    made = copy.copy(task)
    made._validation_indices = made._validation_indices[:0]
    return made


def accuracy(model: nn.Module, task: ClassificationTask) -> float:
    model.eval()
    outputs, targets = zip(*((model(x), y) for x, y in task.validation(256)), strict=True)
    return task.metric(torch.cat(outputs), torch.cat(targets))


def student(task: ClassificationTask, policy: CompressionPolicy = INT8) -> nn.Module:
    model = apply_policy(untrained(5), policy, CompressionContext(task.example_inputs(2)))
    with quantization_mode(model, "off"):
        recalibrate(model, task.calibration(64))
    calibrate(model, task.calibration(64))
    return model


def test_it_teaches_a_student(task: ClassificationTask, teacher: Teacher) -> None:
    model = untrained(5)
    before = accuracy(model, task)
    said: list[float] = []
    report = finetune(
        model, teacher, task, CONFIG, Budget(5, LONG), progress=lambda fraction, text: said.append(fraction)
    )
    assert accuracy(task.model(), task) > 0.95
    assert before < 0.6
    assert accuracy(model, task) > 0.9
    assert not model.training
    assert report.epochs == 5
    assert 0 < report.loss < 1
    assert said == sorted(said)
    assert said[-1] == 1


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_chooses_between_labels_and_teacher(task: ClassificationTask, alpha: float) -> None:
    constant = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with torch.no_grad():
        constant[1].weight.zero_()
        constant[1].bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]))  # a teacher that always says 1
    model = untrained(5)
    config = CONFIG.model_copy(update={"alpha": alpha})
    finetune(model, Teacher(constant, torch.float32), unmeasured(task), config, Budget(3, LONG))
    ones = float((model(next(task.validation(128))[0]).argmax(1) == 1).double().mean())
    assert ones > 0.9 if alpha == 1 else ones < 0.6


@pytest.mark.parametrize("epochs", [0.3, 1, 2.5])
def test_epochs_are_respected(watched: Watched, teacher: Teacher, epochs: float) -> None:
    report = finetune(untrained(), teacher, watched, CONFIG, Budget(epochs, LONG))
    steps = math.ceil(10 * epochs)
    # The batch after the last one is where it sees, inside an epoch, that the budget is spent.
    assert watched.batches == steps + (steps % 10 > 0)
    assert report.epochs == pytest.approx(epochs)


@pytest.mark.parametrize("policy", [None, INT8], ids=["float", "int8"])
@pytest.mark.parametrize("seconds", [15, 40])
def test_seconds_are_respected_and_cover_everything(
    watched: Watched, teacher: Teacher, clock: Clock, seconds: int, policy: CompressionPolicy | None
) -> None:
    model = clock.run_in(untrained() if policy is None else student(watched))
    clock.now = 0
    report = finetune(model, teacher, watched, CONFIG, Budget(100, seconds))
    # To within a step, comparisons with validation data and calibration included; and it is used.
    assert 0.6 * seconds < clock.now <= seconds + 1
    assert report.seconds == clock.now
    assert watched.batches > 0.4 * seconds


def test_the_rate_warms_up_and_ends_at_zero() -> None:
    assert learning_rate_factor(0) == pytest.approx(0.02)
    assert learning_rate_factor(0.05) == pytest.approx(0.5)
    assert learning_rate_factor(0.1) == pytest.approx(1)
    assert learning_rate_factor(0.55) == pytest.approx(0.5)
    assert learning_rate_factor(1) == learning_rate_factor(1.2) == pytest.approx(0)


def test_data_order_starts_where_it_is_told_and_repeats(watched: Watched, teacher: Teacher) -> None:
    finetune(untrained(), teacher, watched, CONFIG, Budget(AUGMENTED_EPOCHS, LONG), first_epoch=4)
    assert watched.log[:6] == [4, 5, 0, 1, 2, 3]


# -- int8 -------------------------------------------------------------------------------------------------------------


def test_int8_layers_train_in_float_and_quantize_at_the_end(
    watched: Watched, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = student(watched), []
    original = module._loss

    def loss(*arguments: Any, **options: Any) -> Tensor:
        modes = {(layer.simulate, layer.input_quantizer.mode) for _, layer in quantized_layers(model)}
        assert len(modes) == 1
        seen.append(modes.pop())
        return original(*arguments, **options)

    monkeypatch.setattr(module, "_loss", loss)
    before = activation_ranges(model)
    finetune(model, teacher, watched, CONFIG.model_copy(update={"qat_fraction": 0.25}), Budget(4, LONG))
    assert seen == [(False, "off")] * 30 + [(True, "quantize")] * 10
    assert {layer.simulate for _, layer in quantized_layers(model)} == {True}
    assert activation_ranges(model) != before
    assert accuracy(model, watched) > 0.85


def test_quantized_from_the_start(task: ClassificationTask, teacher: Teacher) -> None:
    model = student(task)
    finetune(model, teacher, task, CONFIG.model_copy(update={"qat_fraction": 1.0}), Budget(3, LONG))
    assert accuracy(model, task) > 0.8


def test_time_that_ran_out_before_int8_still_leaves_ranges_that_fit(
    task: ClassificationTask, teacher: Teacher, clock: Clock
) -> None:
    model = clock.run_in(student(task))
    config = CONFIG.model_copy(update={"qat_fraction": 0.01})
    finetune(model, teacher, unmeasured(task), config, Budget(100, clock.now + 30))
    found = activation_ranges(model)
    calibrate(model, task.calibration(64))
    after = activation_ranges(model)
    assert all(found[name].scale == pytest.approx(after[name].scale, rel=0.2) for name in found)
    assert {layer.simulate for _, layer in quantized_layers(model)} == {True}


# -- checkpoints ------------------------------------------------------------------------------------------------------


class Interrupted(Exception):  # noqa: N818
    pass


def interrupted(watched: Watched, teacher: Teacher, path: Path, after: float) -> nn.Module:
    model = untrained(5)

    def stop(fraction: float, text: str) -> None:
        if fraction >= after:
            raise Interrupted

    with pytest.raises(Interrupted):
        finetune(model, teacher, watched, CONFIG, Budget(4, LONG), checkpoint=path, progress=stop)
    return model


def test_it_goes_on_from_a_checkpoint(watched: Watched, teacher: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    interrupted(watched, teacher, path, 0.7)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["epoch"] == "2"
        stored = file.get_tensor("fc.weight")
    watched.log.clear()
    watched.batches = 0
    model = untrained(6)
    seen: list[Tensor] = []

    def first_step(network: nn.Module, _: Any) -> None:
        if torch.is_grad_enabled() and not seen:
            seen.append(network.get_parameter("fc.weight").detach().clone())

    model.register_forward_pre_hook(first_step)
    report = finetune(model, teacher, watched, CONFIG, Budget(4, LONG), checkpoint=path)
    assert torch.equal(seen[0], stored)
    assert watched.log[:2] == [2, 3]
    assert 20 <= watched.batches <= 22
    assert report.epochs == pytest.approx(4)
    assert accuracy(model, watched) > 0.9


def test_a_finished_one_is_not_trained_again(watched: Watched, teacher: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    model = untrained(5)
    first = finetune(model, teacher, watched, CONFIG, Budget(2, LONG), checkpoint=path)
    watched.log.clear()
    again = untrained(6)
    report = finetune(again, teacher, watched, CONFIG, Budget(2, LONG), checkpoint=path)
    assert not watched.log
    x = next(watched.validation(8))[0]
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))
    assert report.epochs == first.epochs


@pytest.mark.parametrize("damage", ["cut", "text", "other model"])
def test_a_damaged_checkpoint_is_started_over(watched: Watched, teacher: Teacher, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    interrupted(watched, teacher, path, 0.7)
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "text":
        path.write_text("not weights")
    else:
        save_checkpoint(nn.Linear(2, 2), path, 0.5, 1)
    watched.log.clear()
    model = untrained(5)
    report = finetune(model, teacher, watched, CONFIG, Budget(2, LONG), checkpoint=path)
    assert watched.log[:2] == [0, 1]
    assert report.epochs == pytest.approx(2)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())


# -- what cannot be trained -------------------------------------------------------------------------------------------


def test_a_diverging_rate_is_an_error_that_names_it(task: ClassificationTask, teacher: Teacher) -> None:
    config = CONFIG.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(CompressionError, match=r"learning_rate, now 1e\+30"):
        finetune(untrained(), teacher, task, config, Budget(5, LONG))


def test_too_few_samples_are_an_error_that_counts_them(watched: Watched, teacher: Teacher) -> None:
    class Empty(Watched):
        def train_batches(self, batch_size: int, epoch: int) -> Iterator[Batch]:
            return iter(())

    watched.__class__ = Empty
    with pytest.raises(ConfigError, match="640 training samples, fewer than one batch of 64"):
        finetune(untrained(), teacher, watched, CONFIG, Budget(1, LONG))


# -- improves, or leaves as it was ------------------------------------------------------------------------------------


def test_a_state_that_is_worse_by_the_task_s_metric_is_not_kept(task: ClassificationTask) -> None:
    wrong = task.model()
    with torch.no_grad():
        wrong.get_parameter("fc.weight").neg_()
    model = task.model()
    before = copy.deepcopy(model.state_dict())
    report = finetune(model, Teacher(wrong, torch.float32), task, CONFIG, Budget(3, LONG))
    assert report.before == report.metric == pytest.approx(accuracy(model, task), abs=0.02)
    assert not report.improved
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_report_names_what_was_gained_and_how(task: ClassificationTask, teacher: Teacher) -> None:
    report = finetune(untrained(5), teacher, task, RecoveryConfig(batch_size=64), Budget(5, LONG))
    assert report.improved and report.before is not None and report.metric is not None
    assert report.metric > report.before + 0.3
    assert report.optimizer == "sgd" and 0 < report.learning_rate <= 0.05
    unknown = finetune(untrained(5), teacher, unmeasured(task), RecoveryConfig(batch_size=64), Budget(1, LONG))
    assert unknown.metric is None and unknown.improved


@pytest.mark.parametrize("samples", [25, 9, 3])
def test_few_samples_train(samples: int, task: ClassificationTask, teacher: Teacher) -> None:
    few = copy.copy(task)
    few._train_indices = few._train_indices[:samples]
    model = untrained(5)
    before = copy.deepcopy(model.state_dict())
    report = finetune(model, teacher, unmeasured(few), RecoveryConfig(), Budget(4, LONG))
    assert math.isfinite(report.loss) and report.epochs >= 4
    state = model.state_dict()
    assert not torch.equal(state["fc.weight"], before["fc.weight"])
    # Statistics of so few are noise.
    assert torch.equal(state["bn1.running_mean"], before["bn1.running_mean"])


def test_frozen_parameters_and_gradients_switched_off_train(task: ClassificationTask, teacher: Teacher) -> None:
    model = untrained(5).requires_grad_(False)
    model.get_parameter("fc.bias").requires_grad_(True)
    with torch.no_grad():
        report = finetune(model, teacher, task, CONFIG, Budget(3, LONG))
    assert report.improved
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["fc.bias"]


def test_batches_become_smaller_where_few_steps_fit_into_the_time(
    task: ClassificationTask, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    batches = ClassificationTask.train_batches

    def watched_batches(self: ClassificationTask, size: int, epoch: int) -> Iterator[Batch]:
        sizes.append(size)
        return batches(self, size, epoch)

    monkeypatch.setattr(ClassificationTask, "train_batches", watched_batches)
    look = module.HeldOut.look

    def slow(self: module.HeldOut, model: nn.Module) -> bool:
        better = look(self, model)
        self.sample_seconds = 0.1
        return better

    monkeypatch.setattr(module.HeldOut, "look", slow)
    report = finetune(untrained(5), teacher, task, CONFIG, Budget(2, LONG))
    # 1,000 s are 25 samples a step; batch-norms want 32.
    assert set(sizes) == {32} and report.improved
    assert finetune(untrained(5), teacher, task, CONFIG, Budget(1, math.inf)).improved
    assert set(sizes) == {32, 64}


def test_batch_norms_follow_whatever_momentum_they_came_with(task: ClassificationTask, teacher: Teacher) -> None:
    models = [untrained(5), untrained(5)]
    for norm in batch_norms(models[1]):
        norm.momentum = 0.0
    for model in models:
        finetune(model, teacher, unmeasured(task), CONFIG, Budget(2, LONG))
    states = [model.state_dict() for model in models]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert {norm.momentum for norm in batch_norms(models[1])} == {0.0}


class Auxiliary(nn.Module):
    """Gives two outputs where it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net = untrained(5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        found: Tensor = self.net(x)
        return (found, -found) if self.training else found


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = untrained(5)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found


def test_what_a_network_gives_in_training_only_is_left_aside(task: ClassificationTask, teacher: Teacher) -> None:
    assert finetune(Auxiliary(), teacher, task, CONFIG, Budget(3, LONG)).improved


def test_a_network_without_gradients_is_an_error_that_says_so(task: ClassificationTask, teacher: Teacher) -> None:
    with pytest.raises(CompressionError, match="switches them off"):
        finetune(Detached(), teacher, task, CONFIG, Budget(1, LONG))


class InPlace(nn.Module):
    """Overwrites what its gradient needs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = untrained(5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x).exp()
        found += 1
        return found


def test_a_network_that_cannot_be_trained_is_an_error_of_ours(task: ClassificationTask, teacher: Teacher) -> None:
    with pytest.raises(CompressionError, match=r"cannot be trained: RuntimeError: .*inplace"):
        finetune(InPlace(), teacher, task, CONFIG, Budget(1, LONG))


def test_labels_whose_loss_fails_are_left_aside_and_it_is_said(task: ClassificationTask, teacher: Teacher) -> None:
    class Failing(ClassificationTask):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            raise ValueError("class 255")

    failing = copy.copy(task)
    failing.__class__ = Failing
    said: list[str] = []
    report = finetune(untrained(5), teacher, failing, CONFIG, Budget(3, LONG), on_message=said.append)
    assert report.improved
    assert said == ["Labels are not learned from: the task's loss raised ValueError: class 255"]
