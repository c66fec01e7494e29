"""A search without engines: a hand-made inventory and a pipeline whose figures are made up and add over the groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autocompress.config import RunConfig
from autocompress.errors import BuildError
from autocompress.exploration.additive_costs import fitted_costs
from autocompress.exploration.samplers import SamplerPrior
from autocompress.exploration.study import open_study
from autocompress.exploration.trial_loop import TrialLoop
from autocompress.model.inventory import Block, ChannelGroup, Inventory, Layer
from autocompress.policy import CompressionPolicy
from autocompress.runs.directory import RunDirectory
from autocompress.runs.records import Measurement, TrialRecord
from autocompress.space.search_space import SearchSpace, SpaceFile
from autocompress.tasks.validation import ProxyEstimate

# What a whole group costs: its share of the latency (ms) and of the accuracy.
SLOW = (1.0, 2.0, 4.0, 1.5, 3.0)
DEAR = (0.02, 0.01, 0.08, 0.12, 0.03)
IDENTITY = {"task.name": "fake", "engine": "none 1", "seed": 0}


def layer(name: str, channels: int = 32, kernel: tuple[int, ...] = (3, 3), **changes: Any) -> Layer:
    values: dict[str, Any] = {
        "name": name,
        "kind": "conv",
        "in_channels": channels,
        "out_channels": channels,
        "kernel": kernel,
        "macs": 1000,
        "params": 100,
        "factorizable": True,
        "quantizable": True,
    }
    return Layer(**{**values, **changes})


def make_inventory() -> Inventory:
    layers = {f"c{i}": layer(f"c{i}") for i in range(5)}
    layers["head"] = layer("head", kernel=(), kind="linear", out_channels=2, factorizable=False)
    groups = {f"c{i}": ChannelGroup(f"c{i}", 32, (f"c{i}",), ()) for i in range(5)}
    blocks = {"b0": Block("b0", ("c1", "c2")), "b1": Block("b1", ("c3",))}
    return Inventory(layers, groups, blocks, {}, 5000, 500)


def make_measurement(latency: float, base: float = sum(SLOW)) -> Measurement:
    ratio = latency / base
    return Measurement(
        latency, latency, latency, latency, 0.0, 100, latency, latency, ratio, ratio, ratio, base, False, 1, 1
    )


def record(number: int, accuracy: float, latency: float, **changes: Any) -> TrialRecord:
    values: dict[str, Any] = {
        "policy": CompressionPolicy(pruning={"c0": (number % 97 + 1) / 100}),
        "state": "complete",
        "accuracy": accuracy,
        "measurement": make_measurement(latency),
        "size_bytes": 1000,
        "macs": 1000,
        "artifact": f"artifacts/trial-{number:05d}",
    }
    return TrialRecord(number, **{**values, **changes})


BASELINE = record(0, 0.95, sum(SLOW), policy=CompressionPolicy(), stage="baseline", artifact="baseline")


def figures(policy: CompressionPolicy) -> tuple[float, float]:
    """Return the made-up accuracy and latency of a policy."""
    ratios = [policy.pruning.get(f"c{i}", 0.0) for i in range(5)]
    accuracy = 0.95 - sum(d * r for d, r in zip(DEAR, ratios, strict=True))
    return accuracy, sum(s * (1 - r) for s, r in zip(SLOW, ratios, strict=True))


def knowledge(space: SearchSpace, budget: float) -> SamplerPrior:
    """What the knapsack sampler may be told of the made-up problem: costs that are right, and nothing of accuracy."""
    ratio = lambda policy: figures(policy)[1] / figures(CompressionPolicy())[1]  # noqa: E731
    return SamplerPrior(fitted_costs(space, ratio), budget=budget)


class FakeEvaluator:
    """Stands in for `CandidateEvaluator` in `TrialLoop`: counts what it is asked, fails where it is told to."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.baseline = BASELINE
        self.asked: list[CompressionPolicy] = []
        self.prepared: list[CompressionPolicy] = []
        self.fails: Callable[[int, CompressionPolicy], Exception | None] = lambda number, policy: None

    def prepare(self, policy: CompressionPolicy, *, look: bool) -> None:
        self.prepared.append(policy)

    def evaluate(
        self, policy: CompressionPolicy, number: int, *, hopeless: Callable[[ProxyEstimate], bool] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> TrialRecord:  # fmt: skip
        self.asked.append(policy)
        error = self.fails(number, policy)
        if error is not None:
            raise error
        accuracy, latency = figures(policy)
        if hopeless is not None and hopeless(ProxyEstimate(accuracy, accuracy + 0.005)):
            return TrialRecord(number, policy, "rejected", accuracy=accuracy)
        if meanwhile is not None:
            meanwhile()
        return record(number, accuracy, latency, policy=policy)


class Bench:
    """One run directory and everything to open trial loops on it."""

    def __init__(self, path: Path) -> None:
        self.run = RunDirectory(path)
        path.mkdir()
        self.evaluator = FakeEvaluator(self.run)
        self.told: list[TrialRecord] = []

    def space(self, **parts: Any) -> SearchSpace:
        parts = parts or {"pruning": {"ratios": [0, 0.25, 0.5, 0.75]}}
        return SearchSpace(SpaceFile.model_validate(parts), make_inventory(), "fp32", int8=True)

    def loop(
        self, config: RunConfig, space: SearchSpace | None = None, predictor: Any = None, *, finalists: int = 0,
        **identity: Any,
    ) -> TrialLoop:  # fmt: skip
        from autocompress.exploration.pareto import Constraints

        study = open_study(self.run, config, {**IDENTITY, **identity})
        constraints = Constraints.of(config, BASELINE)
        evaluator: Any = self.evaluator
        return TrialLoop(
            evaluator, space or self.space(), study, constraints, self.told.append,
            predictor=predictor, finalists=finalists,
        )  # fmt: skip


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "run")


def refuse(number: int, policy: CompressionPolicy) -> Exception:
    return BuildError("the runtime refused it")
