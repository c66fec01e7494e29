"""What every task must do. Subclass `TaskContract` with a `task` and an `again` fixture (the same task made afresh)."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx

from autocompress.tasks import Batch, Task

BATCH = 8


def joined(batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(a.shape == b.shape and bool((a == b).all()) for a, b in zip(first, second, strict=True))


def rows(inputs: Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in inputs}


class TaskContract:
    """Inherited by one test class per task; every sample of the task's data must be unlike the others."""

    traceable = True

    @pytest.fixture
    def task(self) -> Task:
        raise NotImplementedError

    @pytest.fixture
    def again(self) -> Task:
        raise NotImplementedError

    @pytest.fixture
    def plain(self, task: Task) -> Task:
        """The task without augmentation, so that training samples can be told apart."""
        task._augmentation = None  # type: ignore[attr-defined]
        return task

    def test_has_a_short_name(self, task: Task) -> None:
        assert task.name
        assert "/" not in task.name

    def test_model_is_a_fresh_copy_in_eval_mode(self, task: Task) -> None:
        first, second = task.model(), task.model()
        assert not first.training
        with torch.no_grad():
            for parameter in first.parameters():
                parameter.zero_()
        kept = dict(task.model().named_parameters())
        assert all(bool((kept[name] == value).all()) for name, value in second.named_parameters())
        assert any(bool(value.any()) for value in kept.values())

    def test_model_takes_the_inputs_and_the_metric_its_outputs(self, task: Task) -> None:
        inputs, targets = next(task.validation(BATCH))
        with torch.inference_mode():
            outputs = task.model()(inputs)
        assert outputs.shape[0] == targets.shape[0] == len(inputs)
        assert 0 <= task.metric(outputs, targets) <= 1
        assert task.loss(outputs, targets).ndim == 0

    def test_model_can_be_traced(self, task: Task) -> None:
        if self.traceable:
            fx.symbolic_trace(task.model())

    @pytest.mark.parametrize("size", [1, 3, 40])
    def test_example_inputs_have_the_batch_asked_for_and_stay_the_same(
        self, task: Task, again: Task, size: int
    ) -> None:
        inputs = task.example_inputs(size)
        assert inputs.shape == (size, *task.example_inputs().shape[1:])
        assert inputs.dtype == torch.float32
        assert same((inputs,), (again.example_inputs(size),))

    def test_validation_and_test_repeat_in_order(self, task: Task, again: Task) -> None:
        for read in ("validation", "test"):
            first = joined(getattr(task, read)(BATCH))
            assert first[0].dtype == torch.float32
            assert first[1].dtype == torch.int64
            assert same(first, joined(getattr(task, read)(BATCH + 1)))  # whatever the batch size
            assert same(first, joined(getattr(again, read)(BATCH)))

    def test_splits_share_no_sample(self, plain: Task) -> None:
        train = rows(torch.cat([joined(plain.train_batches(2, 0))[0], joined(plain.train_batches(3, 0))[0]]))
        validation, test = rows(joined(plain.validation(BATCH))[0]), rows(joined(plain.test(BATCH))[0])
        assert not train & validation
        assert not train & test
        assert not validation & test

    def test_calibration_repeats(self, task: Task, again: Task) -> None:
        first = torch.cat(list(task.calibration(BATCH)))
        assert same((first,), (torch.cat(list(again.calibration(BATCH + 1))),))

    def test_calibration_is_a_part_of_train(self, plain: Task) -> None:
        inputs = torch.cat(list(plain.calibration(BATCH)))
        train = rows(torch.cat([joined(plain.train_batches(2, 0))[0], joined(plain.train_batches(3, 0))[0]]))
        assert rows(inputs) <= train

    def test_train_batches_depend_on_the_epoch_alone(self, task: Task, again: Task) -> None:
        first, second = joined(task.train_batches(BATCH, 0)), joined(task.train_batches(BATCH, 1))
        torch.manual_seed(1234)
        state = torch.default_generator.get_state()
        assert same(first, joined(again.train_batches(BATCH, 0)))
        assert bool((torch.default_generator.get_state() == state).all())
        assert not same(first, second)

    def test_train_batches_are_never_too_small_for_batch_norm(self, task: Task) -> None:
        sizes = [len(inputs) for inputs, _ in task.train_batches(BATCH, 0)]
        assert set(sizes[:-1]) <= {BATCH}
        assert sizes[-1] >= BATCH // 2
        assert task.train_size() - BATCH // 2 < sum(sizes) <= task.train_size()

    def test_fingerprint_is_plain_and_repeats(self, task: Task, again: Task) -> None:
        assert dict(task.fingerprint()) == dict(again.fingerprint())
        assert json.loads(json.dumps(dict(task.fingerprint()))) == dict(task.fingerprint())
