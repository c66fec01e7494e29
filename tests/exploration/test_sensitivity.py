"""What single choices lose: measured on a tiny network, estimated where there was no time, kept on disk."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from autocompress.cli import main
from autocompress.compress import rewrite
from autocompress.errors import CompressionError
from autocompress.exploration.int8_sensitivity import Int8Sensitivity, harmful
from autocompress.exploration.loss_curve import completed
from autocompress.exploration.sensitivity import SAMPLES, Sensitivity, SensitivityPass
from autocompress.exploration.sensitivity_cache import SensitivityCache
from autocompress.model.inventory import take_inventory
from autocompress.policy import CompressionPolicy
from autocompress.recovery import TrainingFreeCompressor
from autocompress.recovery.recalibration import recalibrate
from autocompress.space.parameter import Parameter
from autocompress.space.search_space import SearchSpace, load_space
from autocompress.tasks import Task
from tests.exploration import tiny


@pytest.fixture(scope="module")
def task() -> Task:
    return tiny.made("wide")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def begun(task: Task, space: str = "default") -> SensitivityPass:
    base = rewrite(task.model())
    inventory = take_inventory(base, task.example_inputs(2))
    bound = SearchSpace(load_space(space), inventory, "fp32", int8=True)
    return SensitivityPass(base, inventory, {}, task, bound)


def run(made: SensitivityPass, **options: Any) -> Sensitivity:
    found = made.run(**options)
    assert found.note is None
    return found


def test_every_choice_is_measured_and_what_does_nothing_loses_nothing(task: Task) -> None:
    made = begun(task)
    found, offered = run(made), made._space.parameters
    assert found.losses.keys() == offered.keys()
    assert all(tuple(row) == offered[name] for name, row in found.losses.items())
    assert all(row[offered[name][0]] == 0 for name, row in found.losses.items())
    assert found.measured == found.choices == sum(len(choices) - 1 for choices in offered.values())
    # Channels are worth more than the last bits of weights.
    most = {kind: max(max(row.values()) for name, row in found.losses.items() if name.startswith(kind))
            for kind in ("prune", "dtype")}  # fmt: skip
    assert most["prune"] > 10 * most["dtype"] > 0


def test_what_every_change_does_alike_is_no_loss_of_a_choice(task: Task) -> None:
    # Of statistics that are not those of the calibration data, estimating them anew moves the outputs more than a
    # choice does: they move by what was changed alone.
    model = task.model()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_var is not None
            module.running_var.mul_(4.0)
    base = rewrite(model)
    inventory = take_inventory(base, task.example_inputs(2))
    space = SearchSpace(load_space("default"), inventory, "fp32", int8=True)
    found = run(SensitivityPass(base, inventory, {}, task, space))
    inputs = next(iter(task.calibration(SAMPLES)))
    anew = copy.deepcopy(base)
    recalibrate(anew, [inputs])
    with torch.no_grad():
        alike = float(task.divergence(anew(inputs), base(inputs)))
    mild = min(loss for name, row in found.losses.items() if name.startswith("prune") for loss in row.values() if loss)
    assert alike > 0.01
    assert mild < 0.2 * alike


def test_a_second_pass_measures_nothing_and_an_interrupted_one_goes_on(
    task: Task, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[CompressionPolicy] = []
    real = SensitivityPass._loss

    def counted(self: SensitivityPass, policy: CompressionPolicy, expected: torch.Tensor) -> float:
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(policy)
        return real(self, policy, expected)

    monkeypatch.setattr(SensitivityPass, "_loss", counted)
    with pytest.raises(KeyboardInterrupt):
        begun(task).run()
    (path,) = (cache / "sensitivity").glob("*.jsonl")
    with path.open("a") as file:
        file.write('{"parameter": "cut sh')  # by a crash
    monkeypatch.setattr(SensitivityPass, "_loss", real)
    whole = run(begun(task))
    assert len(path.read_text().splitlines()) == whole.choices + 1
    monkeypatch.setattr(SensitivityPass, "_loss", lambda *_: pytest.fail("it is known"))
    again = run(begun(task))
    assert again.losses == whole.losses and again.measured == whole.measured


class Clock:
    """A second for every network that is measured, and nothing for anything else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.asked: list[CompressionPolicy] = []
        monkeypatch.setattr("autocompress.exploration.sensitivity.time.monotonic", lambda: self.now)
        loss, alone = SensitivityPass._loss, Int8Sensitivity.alone

        def measured(sensing: SensitivityPass, policy: CompressionPolicy, expected: torch.Tensor) -> float:
            self.now += 1.0
            self.asked.append(policy)
            return loss(sensing, policy, expected)

        def single(int8: Int8Sensitivity, layer: str) -> float:
            self.now += 1.0
            return alone(int8, layer)

        monkeypatch.setattr(SensitivityPass, "_loss", measured)
        monkeypatch.setattr(Int8Sensitivity, "alone", single)


def test_without_time_whole_networks_come_first_then_mild_choices_far_apart(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    made = begun(task)
    found = run(made, deadline=10.0)
    assert clock.now <= 10.0
    offered = made._space.parameters
    prunes = {Parameter.of(name).target: choices for name, choices in offered.items() if name.startswith("prune/")}
    # All groups together, each as mildly as it goes, right after the first single choice.
    assert dict(clock.asked[1].pruning) == {name: choices[1] for name, choices in prunes.items()}
    mild = [dict(policy.pruning) for policy in clock.asked[2:] if len(policy.pruning) == 1]
    assert mild and all(choice == prunes[group][1] for one in mild[: len(prunes)] for group, choice in one.items())
    assert 0 < found.measured < found.choices
    assert made.cache.path.read_text().count("\n") == found.measured
    # Unknown is not free: every choice that does something loses something.
    for name, row in found.losses.items():
        assert all(0 < loss < math.inf for choice, loss in row.items() if choice != offered[name][0])


def test_int8_of_every_layer_is_told_by_one_network(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = run(begun(task, "quantize-only"), deadline=0.5)
    assert found.measured <= 1 and not clock.asked
    whole = run(begun(task, "quantize-only"))
    for name, row in found.losses.items():
        assert row["int8"] > 0
        # Of a factor that orders layers.
        assert 0.02 < row["int8"] / max(whole.losses[name]["int8"], 1e-12) < 50


def test_a_layer_whose_int8_leaves_nothing_does_not_hide_the_others(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TrainingFreeCompressor.model

    def broken(self: TrainingFreeCompressor, policy: CompressionPolicy, *given: Any) -> torch.nn.Module:
        if "3" in policy.int8_layers:
            raise CompressionError("What is left of the network gives the same outputs for every sample.")
        return real(self, policy, *given)

    monkeypatch.setattr(TrainingFreeCompressor, "model", broken)
    made = begun(task, "quantize-only")
    found = made.int8()
    assert found is not None
    assert found[0].layers == ("0", "8") and found[1]["3"] == math.inf
    assert harmful(found[0], found[1], 0.25 * found[0].together())[0] == "3"
    losses = {name: row["int8"] for name, row in run(made).losses.items()}
    assert losses["dtype/3"] == max(losses.values()) < math.inf


@pytest.mark.parametrize(("bad", "most"), [({"37"}, 14), ({str(at) for at in range(64)}, 20)])
def test_layers_that_cannot_be_int8_are_found_in_few_networks(
    task: Task, monkeypatch: pytest.MonkeyPatch, bad: set[str], most: int
) -> None:
    tried: list[Sequence[str]] = []

    def refuse(_: SensitivityPass, layers: Sequence[str]) -> None:
        tried.append(layers)
        if bad.intersection(layers):
            raise CompressionError("nothing but zeros")

    monkeypatch.setattr(SensitivityPass, "_in_int8", refuse)
    assert set(begun(task)._refused_int8([str(at) for at in range(64)])) == bad
    assert len(tried) <= most


def test_what_there_was_no_time_for_is_no_verdict(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    found = begun(task, "prune-only").run(deadline=-1.0)
    assert found.note is not None and "no time" in found.note and not found.losses


def test_outputs_that_say_nothing_are_told(task: Task) -> None:
    made = begun(task)
    with torch.no_grad():
        for parameter in made._base.parameters():
            parameter.fill_(math.nan)
    note = made.run().note
    assert note is not None and "not finite" in note


def test_a_choice_that_ruins_the_outputs_loses_most(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    real, bad = SensitivityPass._loss, CompressionPolicy(pruning={"0": 0.5})

    def broken(self: SensitivityPass, policy: CompressionPolicy, expected: torch.Tensor) -> float:
        return math.nan if dict(policy.pruning) == dict(bad.pruning) else real(self, policy, expected)

    monkeypatch.setattr(SensitivityPass, "_loss", broken)
    made = begun(task, "prune-only")
    found = run(made)
    ruined = found.losses["prune/0"][0.5]
    assert ruined == max(loss for row in found.losses.values() for loss in row.values())


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        # Between two measured ones, and below the first: the power law through both, 0.8 x^3.
        ({0.5: 0.1, 1.0: 0.8}, {0.25: 0.0125, 0.75: 0.3375}),
        # One alone: a square.
        ({0.5: 0.4}, {0.25: 0.1, 0.75: 0.9, 1.0: 1.6}),
        # None: the typical loss of the strongest.
        ({}, {1.0: 2.0, 0.5: 0.5}),
    ],
)
def test_losses_between_measured_ones(known: dict[float, float], expected: dict[float, float]) -> None:
    offered = (0.0, 0.25, 0.5, 0.75, 1.0)
    found = completed("prune/a", offered, known, 2.0)
    assert list(found) == list(offered) and found[0.0] == 0
    assert {choice: found[choice] for choice in expected} == pytest.approx(expected)
    assert {choice: found[choice] for choice in known} == known


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(main, ["sensitivity", "--task", "tiny_task:make", "--space", "prune-only"])
    assert shown.exit_code == 0, shown.output
    assert "What single choices lose" in shown.stdout and "prune/0" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    words = ["sensitivity", "--task", "tiny_task:make", "--space", "prune-only", "--json"]
    data = json.loads(CliRunner().invoke(main, words).stdout)
    assert data["unit"] == "KL divergence of class scores" and data["measured"] == data["choices"]
    assert data["losses"]["prune/0"][0] == {"choice": 0.0, "loss": 0.0}


def test_damaged_lines_of_the_cache_are_left_out_and_the_others_serve(tmp_path: Path) -> None:
    cache = object.__new__(SensitivityCache)
    cache.path = tmp_path / "losses.jsonl"
    cache.path.write_bytes(b'\xff\xfe\n{"parameter": "a", "choice": 1, "loss": 2}\nnull\n[]\n{"parameter": "b", "ch')
    assert cache.read() == {"a": {1: 2.0}}
