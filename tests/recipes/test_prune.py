"""Pruning without a search, on a task that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import autocompress
from autocompress.compress import IMPORTANCES, CompressionContext, apply_policy, rewrite
from autocompress.config import RunConfig
from autocompress.errors import ConfigError
from autocompress.model.inventory import take_inventory
from autocompress.policy import CompressionPolicy
from autocompress.recipes.prune import PruningOptions, prune, write_pruned
from autocompress.tasks import ClassificationTask, Task
from tests.exploration import tiny

RECOVERY = RunConfig.model_validate({"recovery": {"batch_size": 32}}).recovery


@pytest.fixture(scope="module")
def task() -> Task:
    return tiny.made("make")


def test_one_shot_removes_what_was_asked(task: Task) -> None:
    found = prune(task, PruningOptions(ratio=0.5))
    assert found.groups.keys() == {"0", "3"}
    assert sum(after for _, after in found.groups.values()) == 16
    (step,) = found.steps
    assert (step.channels, step.finetuned) == (0.5, None)
    assert found.baseline > 0.8 and 0 <= found.test <= 1
    whole = task.model()
    for name, (before, after) in found.groups.items():
        kept = found.model.get_submodule(name)
        assert isinstance(kept, nn.Conv2d) and kept.out_channels == after <= before
        assert round((1 - found.policy.pruning.get(name, 0)) * before) == after
        assert whole.get_submodule(name).out_channels == before


def test_macs_are_a_target_too(task: Task) -> None:
    found = prune(task, PruningOptions(macs=0.5, scope="layer", importance="random"))
    whole = take_inventory(rewrite(task.model()), task.example_inputs(2))
    left = take_inventory(found.model, task.example_inputs(2))
    assert 0.4 < left.macs / whole.macs <= 0.5
    assert found.steps[-1].macs == pytest.approx(left.macs / whole.macs)


@pytest.mark.parametrize("importance", list(IMPORTANCES))
def test_every_importance_works_on_a_task(task: Task, importance: str) -> None:
    found = prune(task, PruningOptions(importance, ratio=0.3))
    assert sum(before - after for before, after in found.groups.values()) == 10


@pytest.mark.parametrize("schedule", ["iterative", "gradual"])
def test_steps_narrow_the_model_and_train_between(task: Task, schedule: str) -> None:
    stages: list[str] = []
    options = PruningOptions("taylor", ratio=0.75, schedule=schedule, steps=3, epochs=6)
    found = prune(task, options, RECOVERY, stage=stages.append)
    assert len(found.steps) == len(stages) == 3
    left = [step.channels for step in found.steps]
    assert left == sorted(left, reverse=True) and left[-1] == pytest.approx(0.25, abs=0.04)
    assert all(step.finetuned is not None for step in found.steps)
    assert found.steps[-1].finetuned == pytest.approx(1, abs=0.3)
    assert not found.model.training


def test_what_is_written_can_be_read_again(task: Task, tmp_path: Path) -> None:
    found = prune(task, PruningOptions(ratio=0.3))
    write_pruned(found, task, tmp_path / "out")
    policy = CompressionPolicy.from_dict(json.loads((tmp_path / "out" / "policy.json").read_text()))
    assert policy == found.policy
    again = apply_policy(rewrite(task.model()), policy, CompressionContext(task.example_inputs(2)))
    again.load_state_dict(load_file(tmp_path / "out" / "weights.safetensors"))
    inputs = task.example_inputs(4)
    with torch.no_grad():
        torch.testing.assert_close(again(inputs), found.model(inputs))
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"))
    assert json.loads((tmp_path / "out" / "prune.json").read_text())["test"] == found.test


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "either a ratio"),
        ({"ratio": 0.5, "macs": 0.5}, "either a ratio"),
        ({"ratio": 1.5}, r"to 1\.5"),
        ({"macs": 0.0}, r"to 1\.0"),
        ({"ratio": 0.5, "importance": "apox"}, "Unknown importance 'apox'. Did you mean 'apoz'"),
        ({"ratio": 0.5, "schedule": "cubic"}, "schedule 'cubic'"),
        ({"ratio": 0.5, "epochs": -1.0}, "epochs is -1"),
        ({"ratio": 0.5, "rate": 1}, "rate"),
    ],
)
def test_bad_values(task: Task, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        autocompress.prune(task, **values)


def test_too_much_and_nothing_to_prune(task: Task, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than may go"):
        prune(task, PruningOptions(ratio=0.99))
    inputs, targets = torch.randn(64, 4), torch.arange(64) % 2
    linear = ClassificationTask(nn.Linear(4, 2).eval(), (inputs, targets), (inputs, targets), name="linear")
    with pytest.raises(ConfigError, match="No channels of this model can be pruned"):
        prune(linear, PruningOptions(ratio=0.5))
    (tmp_path / "mine").write_text("")
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        autocompress.prune(task, ratio=0.5, to=tmp_path)
