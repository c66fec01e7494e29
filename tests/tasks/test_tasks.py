from __future__ import annotations

import sys
from pathlib import Path

import pytest

from autocompress import config, tasks
from autocompress.config import TaskConfig
from autocompress.errors import ConfigError
from autocompress.tasks import Task, load_task
from tests.tasks.contract import TaskContract

EXAMPLES = Path(__file__).parents[2] / "examples"

MODULE = """
import torch
from torch import nn
from autocompress.errors import ConfigError
from autocompress.tasks import ClassificationTask

DATA = torch.arange(160.0).view(40, 4), torch.arange(40) % 2
number = 3

def plain():
    return ClassificationTask(nn.Linear(4, 2), DATA, DATA, name="plain")

def configured(config):
    return ClassificationTask(nn.Linear(4, 2), DATA, DATA, name=f"model {config.model}")

def defaulted(name="defaulted"):
    return ClassificationTask(nn.Linear(4, 2), DATA, DATA, name=name)

def failing():
    raise KeyError("no such column")

def refusing():
    raise ConfigError("the user's own words")

def wrong():
    return nn.Linear(4, 2)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, with a name no other test has imported."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_broken.py").write_text("import surely_not_installed\n")
    (tmp_path / f"{name}_raising.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return name


class TestExample(TaskContract):
    @pytest.fixture
    def task(self, monkeypatch: pytest.MonkeyPatch) -> Task:
        monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
        return load_task(TaskConfig(name="my_task:blobs"))

    @pytest.fixture
    def again(self, task: Task) -> Task:
        return load_task(TaskConfig(name="my_task:blobs"))


def test_all_is_sorted_and_there() -> None:
    assert tasks.__all__ == sorted(tasks.__all__)
    assert all(hasattr(tasks, name) for name in tasks.__all__)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.name)
def test_example_run_files_are_valid(file: Path) -> None:
    task = config.load_config(file).task
    assert task.name == "cifar10"
    assert task.data is not None
    assert not Path(task.data).is_absolute()


def test_a_factory_is_found_in_the_working_directory(module: str) -> None:
    assert load_task(TaskConfig(name=f"{module}:plain")).name == "plain"


def test_a_factory_with_a_parameter_gets_the_config(module: str) -> None:
    assert load_task(TaskConfig(name=f"{module}:configured", model="mine")).name == "model mine"
    assert load_task(TaskConfig(name=f"{module}:defaulted")).name == "defaulted"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", r"Unknown task 'digit'\. Did you mean 'digits'\?.*cifar10.*torchvision:<model>"),
        ("", r"Unknown task ''"),
        ("absent_module:make", r"module 'absent_module' cannot be imported.*looked in"),
        ("absent.module:make", r"module 'absent\.module' cannot be imported"),
        (":make", r"must be written module:factory"),
        ("module:", r"must be written module:factory"),
        ("MODULE_broken:make", r"module 'MODULE_broken' cannot be imported: No module named 'surely_not_installed'"),
        ("MODULE_raising:make", r"importing module 'MODULE_raising' raised ZeroDivisionError"),
        ("MODULE:absent", r"module 'MODULE' has no attribute 'absent'"),
        ("MODULE:number", r"'number' in module 'MODULE' is a int, not a callable"),
        ("MODULE:failing", r"calling 'failing' of module 'MODULE' raised KeyError: 'no such column'"),
        ("MODULE:refusing", r"^the user's own words$"),
        ("MODULE:wrong", r"'wrong' in module 'MODULE' returned a Linear, not a Task"),
    ],
)
def test_what_cannot_be_loaded_is_told(module: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("MODULE", module)):
        load_task(TaskConfig(name=name.replace("MODULE", module)))


def test_options_a_factory_cannot_take_are_refused(module: str) -> None:
    with pytest.raises(ConfigError, match=r"task\.model, task\.data given, but 'plain'.*takes no argument"):
        load_task(TaskConfig(name=f"{module}:plain", model="x", data="y"))
