"""Every method of a user's task raises, hangs, gives NaN, the wrong shape, or other data each time."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from autocompress.config import RecoveryConfig
from autocompress.errors import ConfigError, NotANumberError, TaskError
from autocompress.recovery.checkpoint import load_checkpoint, save_checkpoint
from autocompress.recovery.distillation import Distiller, Teacher
from autocompress.runs.observer import Observer
from autocompress.tasks import ClassificationTask, LabelFreeTask, Task
from autocompress.tasks.checks import check_task
from autocompress.tasks.guard import guarded
from autocompress.tasks.user_calls import UserCalls
from tests.tasks.test_checks import Net, OwnTask, blobs


class UserTask(OwnTask):
    """A task in order, of which a test replaces one method."""

    metric_name = "accuracy"

    def train_batches(self, batch_size: int, epoch: int) -> Iterator[Any]:
        return self._batches("train", batch_size)

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        return float((outputs.argmax(1) == targets).double().mean())


def raising(*_: Any, **__: Any) -> Any:
    raise OSError("the disk said no")


def late(self: Any, *_: Any) -> Any:
    yield from itertools.islice(self._batches("validation", 16), 2)
    raising()


def outputs() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3, requires_grad=True), torch.arange(8) % 3


def use(task: Task, method: str) -> Any:
    """Call a method as the package does, and read what it gives to its end."""
    given: dict[str, tuple[Any, ...]] = {
        "example_inputs": (2,), "calibration": (16,), "train_batches": (16, 0), "validation": (16,), "test": (16,),
        "metric": outputs(), "loss": outputs(), "divergence": (outputs()[0], outputs()[0]),
    }  # fmt: skip
    found = getattr(task, method)(*given.get(method, ()))
    return list(found) if isinstance(found, Iterator) else found


def guard(method: str, wrong: Any, said: list[str] | None = None, **settings: Any) -> Task:
    kind = type("Broken", (UserTask,), {method: wrong})
    told = [] if said is None else said
    return guarded(kind(), UserCalls(on_message=told.append, stage="Searching", **settings))


METHODS = (
    "model", "example_inputs", "calibration", "train_batches", "train_size", "test_size", "validation", "test",
    "metric", "loss", "divergence", "fingerprint",
)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_method_in_order_goes_through_the_guard_as_it_is(method: str) -> None:
    said: list[str] = []
    task, plain = guarded(UserTask(), UserCalls(on_message=said.append)), UserTask()
    torch.manual_seed(0)
    found = use(task, method)
    torch.manual_seed(0)
    expected = use(plain, method)
    if method == "model":
        assert type(found) is type(expected)
    else:
        assert str(found) == str(expected)
    assert not said


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_raises_names_it_its_line_and_the_stage(method: str) -> None:
    with pytest.raises(TaskError) as raised:
        use(guard(method, raising), method)
    text = str(raised.value)
    assert text.startswith("Task 'own': ")
    assert f"{method}()" in text
    assert "raised OSError: the disk said no (test_user_code_guard.py, line " in text
    assert "during 'Searching'" in text
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("method", ["calibration", "train_batches", "validation", "test"])
def test_an_iterator_that_raises_says_how_far_it_had_come(method: str) -> None:
    def half(self: Any, *_: Any) -> Iterator[Any]:
        for batch in late(self):
            yield batch[0] if method == "calibration" else batch

    with pytest.raises(TaskError, match=rf"{method}\(\) after 32 samples raised OSError.*Repair"):
        use(guard(method, half), method)


@pytest.mark.parametrize("error", [SystemExit("no licence"), MemoryError(), RecursionError("deep"), StopIteration()])
def test_whatever_else_is_raised_is_the_task_s(error: BaseException) -> None:
    def wrong(*_: Any) -> float:
        raise error

    with pytest.raises(TaskError, match=type(error).__name__):
        use(guard("metric", wrong), "metric")


def test_an_interrupt_stays_an_interrupt() -> None:
    def wrong(*_: Any) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use(guard("metric", wrong), "metric")


def test_the_exception_of_a_loader_s_worker_is_told_in_a_line() -> None:
    class Damaged(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            raise OSError("truncated")

    def wrong(self: Any, batch_size: int) -> Any:
        return iter(DataLoader(Damaged(), batch_size, num_workers=1))

    with pytest.raises(TaskError) as raised:
        use(guard("test", wrong), "test")
    assert "raised in a DataLoader's worker: OSError: truncated (test_user_code_guard.py, line " in str(raised.value)
    assert "Traceback" not in str(raised.value)


def nan(*_: Any) -> Any:
    return torch.tensor(float("nan"))


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("metric", nan, "metric.. of 8 samples is nan. Task.metric must return one finite number"),
    ("metric", lambda *_: 72.75, "gave 72.75, but 'accuracy' is a share, from 0 to 1.*Divide a percentage by 100"),
    ("metric", lambda *_: -0.77, "gave -0.77, but 'accuracy' is a share.*metric_is_share to False"),
    ("metric", lambda *_: torch.zeros(8), r"gave a tensor \(8,\)"),
    ("metric", lambda *_: "good", "gave 'good'"),
    ("loss", nan, "loss.. of 8 samples is NaN, though the outputs are finite"),
    ("loss", lambda self, o, t: o.sum(1), r"gave a tensor \(8,\).*Return one number"),
    ("loss", lambda self, o, t: 0.5, "gave float"),
    ("loss", lambda self, o, t: o.detach().sum(), "does not depend on the outputs"),
    ("divergence", lambda self, o, r: (o - r).detach().sum(), "does not depend on the outputs"),
    ("divergence", nan, "divergence.. of 8 samples is NaN"),
    ("divergence", lambda self, o, r: o, r"gave a tensor \(8, 3\)"),
    ("example_inputs", lambda self, size: [1, 2], "gave list of int, int for batch_size=2"),
    ("example_inputs", lambda self, size: torch.zeros(size + 1, 6), r"gave \(3, 6\) for batch_size=2"),
    ("train_size", lambda self: -5, "gave -5"),
    ("train_size", lambda self: None, "gave None"),
    ("fingerprint", lambda self: 3, "gave 3.*Return a mapping"),
    ("fingerprint", lambda self: {"weights": torch.zeros(2)}, "gave {'weights': tensor"),
    ("calibration", lambda self, size: iter([(1, 2)]), "calibration data: a batch must be one tensor"),
    ("validation", lambda self, size: iter([torch.zeros(2, 6)]), "validation data have no labels"),
    ("validation", lambda self, size: None, "validation.. raised TypeError: 'NoneType' object is not iterable"),
    (
        "test",
        lambda self, size: iter([(torch.zeros(4, 6), torch.zeros(3))]),
        "from 0 on have inputs .4, 6. but targets",
    ),
    ("train_batches", lambda self, size, epoch: iter([1]), "train data: a batch must be two tensors"),
    (
        "test",
        lambda self, size: iter([blobs(4), (torch.zeros(4, 5), torch.zeros(4))]),
        r"shape \(5,\) from sample 4 on",
    ),
]


@pytest.mark.parametrize(("method", "wrong", "message"), WRONG, ids=[f"{m}-{t[:24]}" for m, _, t in WRONG])
def test_what_a_method_must_not_give_is_refused(method: str, wrong: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        use(guard(method, wrong), method)


def test_a_score_that_is_no_share_may_have_any_value() -> None:
    class Scored(UserTask):
        metric_name = "negative error"

        def metric(self, outputs: Tensor, targets: Tensor) -> float:
            return -72.75

    assert use(guarded(Scored()), "metric") == -72.75


def test_nan_that_comes_from_the_outputs_is_not_the_loss_s() -> None:
    task = guard("loss", lambda self, o, t: o.sum())
    assert torch.isnan(task.loss(torch.full((2, 3), float("nan")), torch.zeros(2)))
    with pytest.raises(NotANumberError, match="The model's outputs are not finite either"):
        guard("metric", nan).metric(torch.full((2, 3), float("nan")), torch.zeros(2))


# -- data that change -------------------------------------------------------------------------------------------------


def noisy(self: Any, *_: Any) -> Iterator[Any]:
    for inputs, targets in self._batches("validation", 16):
        yield inputs + torch.randn(inputs.shape), targets


@pytest.mark.parametrize("method", ["validation", "test", "train_batches"])
def test_other_data_at_each_reading_are_said_once(method: str) -> None:
    said: list[str] = []
    task = guard(method, noisy, said)
    for _ in range(3):
        use(task, method)
    assert len(said) == 1
    assert f"{method}() gives other data" in said[0]
    assert "sample 0 differs" in said[0]
    assert "Seed what is random" in said[0]


def test_batches_of_another_size_are_the_same_data() -> None:
    said: list[str] = []
    task = guarded(UserTask(), UserCalls(on_message=said.append))
    for size in (3, 16, 64):
        list(task.validation(size))
        list(task.calibration(size))
        next(task.test(size))
    assert not said


def test_an_iterator_that_was_read_to_its_end_is_named() -> None:
    batches = iter([blobs(8)])
    task = guard("validation", lambda self, size: batches)
    use(task, "validation")
    with pytest.raises(TaskError, match=r"gave 8 samples when it was first read, and none now.*Make a new iterator"):
        use(task, "validation")


def test_a_model_with_other_weights_at_each_call_is_refused() -> None:
    task = guard("model", lambda self: nn.Linear(6, 3))
    task.model()
    with pytest.raises(TaskError, match=r"other weights at each call \(weight differs"):
        task.model()


def test_a_fingerprint_that_changes_is_said() -> None:
    said: list[str] = []
    task = guard("fingerprint", lambda self: {"at": time.perf_counter()}, said)
    for _ in range(3):
        task.fingerprint()
    assert len(said) == 1 and "another 'at' at each call, so this run cannot be resumed" in said[0]


def test_a_metric_that_changes_is_said() -> None:
    values = itertools.count()
    warnings = check_task(guard("metric", lambda *_: next(values) / 100))
    assert any("when it is asked again for the same" in text for text in warnings)


def test_kept_answers_of_the_teacher_are_those_to_the_same_samples() -> None:
    distiller = Distiller(Teacher(Net(), torch.float32), Net(), UserTask(), RecoveryConfig())
    for inputs in (torch.zeros(2, 6), torch.ones(2, 6)):  # an epoch that does not repeat
        (found,) = distiller.targets(inputs, 0, 0).values()
        assert torch.equal(found, Net()(inputs))


# -- NaN in inputs ----------------------------------------------------------------------------------------------------


def holed(self: Any, *_: Any) -> Iterator[Any]:
    for number, (inputs, targets) in enumerate(self._batches("train", 16)):
        spoiled = inputs.clone()
        if number == 1:
            spoiled[3, 2] = float("nan")
        yield spoiled, targets


@pytest.mark.parametrize(("method", "left"), [("train_batches", 63), ("calibration", 63), ("validation", 64)])
def test_nan_in_inputs_names_the_sample(method: str, left: int) -> None:
    def calibration(self: Any, *_: Any) -> Iterator[Tensor]:
        return (inputs for inputs, _ in holed(self))

    said: list[str] = []
    task = guard(method, calibration if method == "calibration" else holed, said, leaves_out=True)
    for _ in range(2):
        batches = use(task, method)
    assert sum(len(b if isinstance(b, Tensor) else b[0]) for b in batches) == left
    assert len(said) == 1
    assert f"{method}() gave NaN in the inputs of sample 19" in said[0]


def test_nan_in_example_inputs_is_not_the_graph_s_fault() -> None:
    def wrong(self: Any, size: int = 1) -> Tensor:
        return torch.full((size, 6), float("nan"))

    with pytest.raises(
        ConfigError, match=r"2 of 2 example samples hold NaN.*the model's outputs for these are no numbers"
    ):
        check_task(guard("example_inputs", wrong))


# -- calls that do not return -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "SIGUSR2"), reason="calls are ended by signals")
@pytest.mark.timeout(20)
def test_a_call_that_does_not_return_is_named_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.tasks.user_calls._LOOK_S", 0.05)
    # The usual one is the test runner's own here.
    monkeypatch.setattr("autocompress.tasks.user_calls._SIGNAL", signal.SIGUSR2)
    monkeypatch.setattr("autocompress.tasks.user_calls._Call.__init__.__defaults__", (0.1,))

    def hanging(*_: Any) -> float:
        while True:
            # As code does that tries again.
            with suppress(Exception):
                time.sleep(10)

    said: list[str] = []
    task = guard("metric", hanging, said)
    calls: UserCalls = task.calls  # type: ignore[attr-defined]
    calls.limit(time.monotonic(), 0.4)
    before = signal.getsignal(signal.SIGUSR2)
    with calls.watched(), pytest.raises(TaskError, match=r"metric.. of 8 samples had not returned after"):
        use(task, "metric")
    assert signal.getsignal(signal.SIGUSR2) is before
    assert "metric() has been running for 0 s (at test_user_code_guard.py, line" in said[0]


def test_without_a_limit_nothing_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.tasks.user_calls._LOOK_S", 0.02)

    def slow(*_: Any) -> float:
        time.sleep(0.2)
        return 0.5

    task = guard("metric", slow)
    with task.calls.watched():  # type: ignore[attr-defined]
        assert use(task, "metric") == 0.5


def test_reading_ends_where_the_run_is_far_beyond_its_time() -> None:
    task = guard("test", lambda self, size: (blobs(8) for _ in itertools.count()))
    task.calls.limit(time.monotonic() - 200, 100)  # type: ignore[attr-defined]
    with pytest.raises(TaskError, match=r"had given \d+ samples when the run had taken 50% more than its 100 s"):
        use(task, "test")


# -- the guard itself -------------------------------------------------------------------------------------------------


def test_a_guarded_task_is_guarded_once_and_has_what_the_task_has() -> None:
    plain = ClassificationTask(Net(), train=blobs(120), test=blobs(30, 1), validation=blobs(60, 2))
    task, calls = guarded(plain), UserCalls()
    assert guarded(task, calls) is task
    assert task.calls is calls and calls.where == f"Task {plain.name!r}"  # type: ignore[attr-defined]
    assert task.source is plain
    assert task.known_targets().keys() == plain.known_targets().keys()  # type: ignore[attr-defined]
    assert (task.metric_name, task.outputs, task.has_own_loss) == (plain.metric_name, plain.outputs, False)
    with pytest.raises(AttributeError):
        task.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_of_a_label_free_task_the_task_within_is_guarded() -> None:
    plain = LabelFreeTask(UserTask(), "agreement")
    task = guarded(plain)
    assert isinstance(task, LabelFreeTask)
    assert task.source is plain.source
    plain.source.validation = raising  # type: ignore[method-assign]
    with pytest.raises(TaskError, match=r"validation.. raised OSError"):
        list(task.validation(8))


def test_a_task_without_a_name_is_refused() -> None:
    class Nameless(UserTask):
        name = ""

    with pytest.raises(ConfigError, match="A Nameless has no name"):
        guarded(Nameless())


def test_stages_are_followed_and_everything_is_passed_on() -> None:
    class Heard(Observer):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def stage(self, text: str) -> None:
            self.heard.append(text)

        def warn(self, text: str) -> None:
            self.heard.append(f"! {text}")

    calls, heard = UserCalls(), Heard()
    observer = calls.followed(heard)
    observer.stage("Searching")
    observer.warn("slow")
    observer.progress(0.5)
    assert (calls.stage, heard.heard) == ("Searching", ["Searching", "! slow"])


def test_the_guard_costs_microseconds() -> None:
    plain, task = UserTask(), guarded(UserTask())
    given = outputs()

    def seconds(one: Task) -> float:
        began = time.perf_counter()
        for _ in range(200):
            one.loss(*given)
        return (time.perf_counter() - began) / 200

    # The quickest of five, as the machine may be busy.
    assert min(seconds(task) for _ in range(5)) - min(seconds(plain) for _ in range(5)) < 2e-4


def test_weights_that_two_layers_share_have_a_checkpoint(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    save_checkpoint(model, tmp_path / "kept.safetensors", 0.5, 2)
    assert load_checkpoint(model, tmp_path / "kept.safetensors") == (0.5, 2, False)
    assert model[1].weight is model[0].weight
