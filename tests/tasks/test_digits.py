from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from autocompress.config import TaskConfig
from autocompress.environment import cache_directory
from autocompress.errors import ConfigError
from autocompress.tasks import Task, digits, load_task
from autocompress.tasks.digits import DigitsNet, digits_data, train_digits
from tests.tasks.contract import TaskContract, joined, same

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def trained() -> Path:
    """The trained network in the session's cache: training takes ten seconds, so it happens once for all tests."""
    load_task(TaskConfig())
    return next(cache_directory().glob("digits-*-seed0.safetensors"))


@pytest.fixture
def ready(trained: Path, cache: Path) -> Path:
    """This test's cache, with the trained network in it."""
    return Path(shutil.copy(trained, cache))


@pytest.mark.usefixtures("ready")
class TestDigits(TaskContract):
    @pytest.fixture
    def task(self, ready: Path) -> Task:
        return load_task(TaskConfig())

    @pytest.fixture
    def again(self, ready: Path) -> Task:
        return load_task(TaskConfig())

    def test_network_is_good(self, task: Task) -> None:
        model = task.model()
        with torch.inference_mode():
            for inputs, targets in (joined(task.validation(360)), joined(task.test(360))):
                assert len(targets) == 360
                assert task.metric(model(inputs), targets) >= 0.975

    def test_it_is_not_trained_again(self, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(digits, "train_digits", None)
        assert load_task(TaskConfig()).fingerprint() == task.fingerprint()

    def test_calibration_size_is_obeyed(self) -> None:
        task = load_task(TaskConfig(calibration_size=100))
        assert sum(len(inputs) for inputs in task.calibration(32)) == 100
        assert task.train_size() == 1077


@pytest.mark.parametrize("damage", ["truncate", "other", "remove"])
def test_a_damaged_cache_is_trained_again(ready: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    whole = ready.read_bytes()
    match damage:
        case "truncate":
            ready.write_bytes(whole[: len(whole) // 2])
        case "other":
            ready.write_bytes(b"not weights")
        case "remove":
            ready.unlink()
    calls = []

    def quick(train: object, seed: int) -> DigitsNet:
        calls.append(seed)
        return DigitsNet().eval()

    monkeypatch.setattr(digits, "train_digits", quick)
    first = load_task(TaskConfig())
    assert load_task(TaskConfig()).fingerprint() == first.fingerprint()
    assert calls == [0]


def test_training_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "_EPOCHS", 1)
    (images, targets), _, _ = digits_data()
    few = images[:64], targets[:64]
    torch.manual_seed(5)
    state = torch.default_generator.get_state()
    first, second, other = (train_digits(few, seed).classifier.weight for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.default_generator.get_state(), state)


def test_the_split_is_fixed_and_stratified() -> None:
    splits = digits_data()
    assert [len(targets) for _, targets in splits] == [1077, 360, 360]
    for _, targets in splits[1:]:
        assert torch.bincount(targets).tolist() == pytest.approx([36] * 10, abs=2)
    assert all(same(first, second) for first, second in zip(splits, digits_data(), strict=True))


@pytest.mark.parametrize("key", ["model", "weights", "data"])
def test_options_of_other_tasks_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"Task digits has its own model, weights and data, but task\.{key} given"):
        load_task(TaskConfig(**{key: "x"}))
