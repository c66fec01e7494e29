"""Distillation of a user's smaller model: from Python and from the command line, with a real engine, on digits."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import autocompress
from autocompress.cli import main
from autocompress.config import RunConfig, TaskConfig
from autocompress.deploy.artifacts import resolve
from autocompress.engines.base import EngineOptions
from autocompress.errors import CompressionError, ConfigError
from autocompress.measurement.protocol import Protocol
from autocompress.recipes import distill as distill_recipe
from autocompress.runs.observer import Observer
from autocompress.tasks import ClassificationTask, LabelFreeTask, Task, UnlabelledTask
from autocompress.tasks.students import load_student

pytest.importorskip("openvino")

# The user's module: digits, a teacher that has learned them, and a student of a quarter of its width.
MODULE = """
import torch
from torch import nn

from autocompress import ClassificationTask
from autocompress.tasks.digits import digits_data


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(64 * width, 10)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).flatten(1))


def task(config):
    train, validation, test = [(x.float() / 255 - 0.3, y) for x, y in digits_data()]
    torch.manual_seed(0)
    teacher = Net(16)
    optimizer = torch.optim.Adam(teacher.parameters(), 0.005)
    for _ in range(3):
        for x, y in zip(train[0].split(64), train[1].split(64)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(teacher(x), y).backward()
            optimizer.step()
    return ClassificationTask(teacher.eval(), train, test, validation, name="small-digits", calibration_size=256)


def small():
    return Net(4)


def nothing():
    return 5
"""
BRIEF = Protocol(warm_up_s=0.01, min_iterations=20, min_seconds=0.02, max_seconds=0.04, rounds=5)
FAST: dict[str, Any] = {"dense_dtype": "fp32", "recovery": {"batch_size": 64}}


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    found: dict[str, Any] = {}
    exec(MODULE, found)
    return found


@pytest.fixture(scope="module")
def task(names: dict[str, Any]) -> Task:
    made: Task = names["task"](TaskConfig())
    return made


@pytest.fixture
def student(names: dict[str, Any]) -> nn.Module:
    torch.manual_seed(1)
    made: nn.Module = names["small"]()
    return made


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Run `distill` in this process, in a folder that holds the user's module."""
    (tmp_path / "digits_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: object) -> Result:
        brief = ("--seconds", "0.02", "--set", "recovery.batch_size=64")
        given = ["distill", "--task", "digits_models:task", *brief, *map(str, words)]
        return CliRunner().invoke(main, given, prog_name="autocompress")

    yield run
    sys.modules.pop("digits_models", None)


def taught(task: Task, student: nn.Module | str, **options: Any) -> distill_recipe.DistillationResult:
    given: dict[str, Any] = {"config": RunConfig.model_validate(FAST), "protocol": BRIEF, **options}
    return autocompress.distill(task, student, **given)


# -- it teaches -------------------------------------------------------------------------------------------------------


def test_a_student_learns_is_measured_and_written(task: Task, student: nn.Module, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    found = taught(
        task, student, epochs=4, to=tmp_path / "out", sets=["recovery.distill=[logits, attention, features]"]
    )
    assert found.student.validation > 0.8 and found.student.test > 0.8
    assert found.teacher.test > 0.9 and found.epochs == 4
    assert found.distilled == "logits; attention at stem, body; features at stem, body"
    assert found.student.macs < found.teacher.macs / 4 and found.student.params < found.teacher.params / 3
    assert found.teacher.measurement.ratio == 1 and found.student.measurement.ratio > 0
    assert found.student.dtype == "fp32" and found.engine == "openvino"
    # The user's own model is as it was, and the projections are nowhere.
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    stored = load_file(tmp_path / "out" / "weights.safetensors")
    assert stored.keys() == before.keys()
    student.load_state_dict(stored)
    inputs = task.example_inputs(4)
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(inputs), found.model(inputs))
    assert json.loads((tmp_path / "out" / "distill.json").read_text()) == found.to_dict()
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"))
    for folder, figures in (("out", found.student), ("out/teacher", found.teacher)):
        file = resolve(tmp_path / folder, None, EngineOptions())
        assert file.size_bytes == figures.size_bytes
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        taught(task, student, epochs=1, to=tmp_path / "out")


def test_inputs_without_labels_are_enough(task: Task, student: nn.Module) -> None:
    inputs = torch.cat([x for x, _ in task.train_batches(256, 0)])
    unlabelled = UnlabelledTask(task.model(), inputs[:512], inputs[512:768], outputs="classes")
    found = taught(LabelFreeTask(unlabelled), student, epochs=5, sets=["recovery.alpha=1"])
    assert found.teacher.test == 1 and found.student.test > 0.6
    with pytest.raises(ConfigError, match="--metric agreement"):
        taught(unlabelled, student, epochs=100, sets=["recovery.alpha=1"])


def test_from_the_command_line(call: Callable[..., Result], tmp_path: Path) -> None:
    words = ("--student", "digits_models:small", "--epochs", "0.5", "--to", "out")
    save_file(load_student("digits_models:small", TaskConfig(), 10).state_dict(), tmp_path / "first.safetensors")
    answer = call(*words, "--student-weights", "first.safetensors")
    assert answer.exit_code == 0, answer.stderr
    assert max(map(len, answer.stdout.splitlines())) <= 80
    text = " ".join(answer.stdout.split())
    assert "teacher" in text and "student" in text and "Learned from the teacher's logits in 0.5 epochs" in text
    assert "Teaching the student: logits" in answer.stderr
    engine = {"engine.json", "model.bin", "model.onnx", "model.xml"}
    assert {path.name for path in (tmp_path / "out/teacher").iterdir()} == engine
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == engine | {"distill.json", "teacher", "weights.safetensors"}
    for more in ((), ("--resume",)):
        again = call(*words, *more)
        assert again.exit_code == 2 and "nothing is overwritten" in again.stderr
    stored = json.loads((tmp_path / "out/distill.json").read_text())
    # The engine's fastest dense dtype, for each.
    assert {stored[who]["dtype"] for who in ("teacher", "student")} <= {"fp32", "bf16", "fp16"}
    assert stored["teacher"]["measurement"]["ratio"] == 1


def test_the_training_ends_in_time(task: Task, student: nn.Module) -> None:
    begun = time.monotonic()
    found = taught(task, student, epochs=100_000, sets=["timeout=6s"])
    # Half of so short a time is kept back for what comes after training.
    assert 0 < found.epochs < 100_000 and time.monotonic() - begun < 30
    assert found.student.validation > 0.5


def test_an_interrupted_training_goes_on(task: Task, student: nn.Module, tmp_path: Path) -> None:
    to = tmp_path / "out"
    left: list[dict[str, Tensor]] = []

    class Stops(Observer):
        def stage(self, text: str) -> None:
            if text.startswith("Measuring"):
                left.append(load_file(to / "checkpoint.safetensors"))
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taught(task, student, epochs=1, to=to, observer=Stops())
    assert left[0].keys() == student.state_dict().keys()
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        taught(task, student, epochs=1, to=to)
    found = taught(task, student, epochs=1, to=to, resume=True)
    assert torch.equal(found.model.state_dict()["head.bias"], left[0]["head.bias"])
    assert not (to / "checkpoint.safetensors").exists()
    with pytest.raises(ConfigError, match="--resume needs --to"):
        taught(task, student, epochs=1, resume=True)


# -- what cannot be ---------------------------------------------------------------------------------------------------


class Frozen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10]


def broken(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(net.parameters()).fill_(float("nan"))
    return net


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda net: nn.Sequential(net, nn.Linear(10, 7)), r"the teacher \(2, 10\), the student \(2, 7\)"),
        (lambda net: nn.Linear(3, 10), r"student, Linear, does not take inputs \(2, 1, 32, 32\)"),
        (lambda net: Frozen(), "no trainable parameters"),
        (lambda net: net.requires_grad_(False), "no trainable parameters"),
        (broken, "The student gives NaN"),
    ],
)
def test_students_that_do_not_fit(
    task: Task, student: nn.Module, make: Callable[[nn.Module], nn.Module], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        taught(task, make(student), epochs=1)


def test_other_mistakes(task: Task, student: nn.Module) -> None:
    with pytest.raises(ConfigError, match="epochs is 0"):
        taught(task, student, epochs=0)
    with pytest.raises(ConfigError, match="Name the model to teach"):
        autocompress.distill(task)
    with pytest.raises(ConfigError, match="weights are for a student known by name"):
        taught(task, student, epochs=1, weights="x")
    other = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 10))
    with pytest.raises(ConfigError, match="'attention' needs a module of the same name"):
        taught(task, other, epochs=1, sets=["recovery.distill=attention"])
    with pytest.raises(CompressionError, match="diverged"):
        taught(task, student, epochs=3, sets=["recovery.learning_rate=1e30"])


class Untrainable(ClassificationTask):
    def train_size(self) -> int:
        return 0


def test_no_training_data(names: dict[str, Any], task: Task, student: nn.Module) -> None:
    x, y = next(task.validation(64))
    with pytest.raises(ConfigError, match="'empty' has no training data"):
        taught(Untrainable(task.model(), (x, y), (x, y), name="empty"), student, epochs=1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("digits_models:smal", "no attribute 'smal'"),
        ("digits_models:nothing", "returned a int, not a torch.nn.Module"),
        ("no_models:small", "'no_models' cannot be imported"),
        ("resnet21", "Did you mean 'resnet"),
        ("torchvision:resnet19", "Unknown torchvision classifier 'resnet19'. Did you mean 'resnet"),
        ("timm:resnet19x", "Unknown timm model"),
    ],
)
def test_students_by_name_that_are_not_there(call: Callable[..., Result], name: str, said: str) -> None:
    answer = call("--student", name, "--epochs", "1")
    assert answer.exit_code == 2 and said in answer.stderr
    assert "Traceback" not in answer.stderr and answer.stdout == ""


def test_students_by_name(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    for name, classes in (("resnet20", 10), ("torchvision:mobilenet_v3_small", 7)):
        one, two = (load_student(name, TaskConfig(), classes) for _ in range(2))
        assert not one.training and one(images).shape == (2, classes)
        # The same seed gives the same weights, for --resume and for comparing.
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    state = {name: tensor * 2 for name, tensor in load_student("resnet20", TaskConfig(), 10).state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    loaded = load_student("resnet20", TaskConfig(), 10, str(tmp_path / "weights.safetensors"))
    assert torch.equal(loaded.state_dict()["linear.weight"], state["linear.weight"])
