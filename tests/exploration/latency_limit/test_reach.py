"""How far down a search can come: the most compressed network, predicted or measured, and what is said of a limit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from autocompress.config import RunConfig
from autocompress.errors import BuildError
from autocompress.evaluation.evaluator import CandidateEvaluator
from autocompress.exploration.additive_costs import macs_ratio
from autocompress.exploration.latency_limit.reach import Reach, measured_reach, most_compressed, predicted_reach
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.protocol import Protocol
from autocompress.policy import CompressionPolicy
from autocompress.runs.directory import RunDirectory
from autocompress.space.search_space import SearchSpace, SpaceFile, bind, configured_space
from autocompress.tasks import LabelFreeTask, UnlabelledTask
from tests.exploration.conftest import figures, make_inventory

CONFIG = RunConfig(task={"name": "tiny"}, table="none")  # type: ignore[arg-type]
BRIEF = Protocol(warm_up_s=0.01, min_iterations=20, min_seconds=0.05, max_seconds=0.1, rounds=5)


class Recurrent(nn.Module):
    """A convolution that is nothing beside the LSTM behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn = nn.Conv1d(4, 16, 3), nn.LSTM(16, 128, batch_first=True)
        self.fc = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(self.conv(x).relu().transpose(1, 2))[0][:, -1])


def plain() -> nn.Module:
    wide = nn.Conv2d(64, 64, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), wide, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 3),
    )  # fmt: skip


def test_the_most_compressed_network_has_the_harshest_of_every_kind() -> None:
    parts = {
        "pruning": {"ratios": [0, 0.75, 0.5]}, "dtype": {"choices": ["dense", "int8"]}, "blocks": {"remove": True},
        "rank": {"ratios": [1, 0.5]},
    }  # fmt: skip
    space = SearchSpace(SpaceFile.model_validate(parts), make_inventory(), "fp32", int8=True)
    policy, dense, *ranked = most_compressed(space, lambda policy: figures(policy)[1])
    assert set(policy.pruning.values()) == {0.75} and policy.int8_layers and policy.removed_blocks == ("b0", "b1")
    assert dense.pruning == policy.pruning and not dense.int8_layers
    assert [bool(p.int8_layers) for p in ranked] == [True, False]
    assert all(any(layer.rank_ratio < 1 for layer in p.layers.values()) for p in ranked)


def test_where_ranks_pay_by_arithmetic_they_come_first_but_not_alone() -> None:
    parts = {"pruning": {"ratios": [0, 0.5]}, "rank": {"ratios": [1, 0.5]}}
    space = SearchSpace(SpaceFile.model_validate(parts), make_inventory(), "fp32", int8=False)
    factorized = lambda policy: sum(layer.rank_ratio < 1 for layer in policy.layers.values())  # noqa: E731
    first, second = most_compressed(space, lambda policy: -factorized(policy))
    assert factorized(first) > 0 and factorized(second) == 0 and first.pruning == second.pruning


@pytest.mark.parametrize("measured", [False, True])
def test_a_limit_below_the_reach_is_called_so(*, measured: bool) -> None:
    reach = Reach(CompressionPolicy(), 0.314, measured=measured)
    said = reach.describe(0.2) or ""
    assert "0.31x to 1x" in said and "0.2x was asked" in said
    assert ("measured" in said, "predicted" in said) == (measured, not measured)
    assert reach.describe(0.5) is None and reach.describe(None) is None


def test_predictions_are_moved_between_two_measured_ends() -> None:
    small, middle = CompressionPolicy(pruning={"c0": 0.75}), CompressionPolicy(pruning={"c0": 0.5})
    predicted = {CompressionPolicy(): 1.0, small: 0.1, middle: 0.55}
    moved = Reach(small, 0.4, measured=True).calibrated(predicted.__getitem__)
    assert [moved(policy) for policy in predicted] == pytest.approx([1.0, 0.4, 0.7])
    # Nothing is moved by what was not measured, or by ends that lie on each other.
    assert Reach(small, 0.4).calibrated(predicted.__getitem__)(small) == 0.1
    same = dict.fromkeys(predicted, 0.99)
    assert Reach(small, 0.4, measured=True).calibrated(same.__getitem__)(small) == 0.99


@pytest.fixture(scope="module")
def worker() -> Iterator[EngineWorker]:
    pytest.importorskip("openvino")
    with EngineWorker() as running:
        yield running


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", resume=False)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Protocol, "again", lambda occasions=3: BRIEF)


def _evaluator(model: nn.Module, inputs: Tensor, run: RunDirectory, worker: EngineWorker) -> CandidateEvaluator:
    torch.manual_seed(0)
    task = LabelFreeTask(UnlabelledTask(model.eval(), inputs, inputs[:4], name="tiny"))
    found = CandidateEvaluator(task, CONFIG, run, worker)
    found.open_baseline()
    return found


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("shape", [(4, 40), (3, 32, 32)])
def test_what_cannot_be_compressed_shows_in_what_is_measured(
    shape: tuple[int, ...], worker: EngineWorker, run: RunDirectory
) -> None:
    recurrent = len(shape) == 2
    evaluator = _evaluator(Recurrent() if recurrent else plain(), torch.randn(24, *shape), run, worker)
    dtype = evaluator.baseline.policy.dense_dtype
    space = bind(configured_space(CONFIG), evaluator.base, evaluator.inventory, dtype, evaluator.capabilities)
    arithmetic = macs_ratio(evaluator.graphs.layout)
    reach = measured_reach(evaluator, CONFIG, space, arithmetic)
    assert reach.measured and arithmetic(reach.policy) < 0.5
    said = evaluator.left_alone() or ""
    if recurrent:
        # Arithmetic knows nothing of the LSTM.
        assert reach.ratio > 0.7 and "of the time (rnn: LSTM" in said
        assert predicted_reach(space, arithmetic).ratio < 0.5
    else:
        assert reach.ratio < 0.7 and said == ""
    assert not list(run.path.glob(".reach-*"))
    evaluator.close()


@pytest.mark.usefixtures("brief")
def test_what_the_engine_refuses_is_predicted(
    worker: EngineWorker, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = _evaluator(plain(), torch.randn(24, 3, 16, 16), run, worker)
    space = bind(configured_space(CONFIG), evaluator.base, evaluator.inventory, "fp32", evaluator.capabilities)

    def refuse(*_: object, **__: object) -> None:
        raise BuildError("no")

    monkeypatch.setattr(evaluator, "measure", refuse)
    arithmetic = macs_ratio(evaluator.graphs.layout)
    reach = measured_reach(evaluator, CONFIG, space, arithmetic)
    assert (reach.measured, reach.ratio) == (False, arithmetic(reach.policy))
    evaluator.close()


@pytest.mark.usefixtures("brief")
def test_int8_that_is_slower_is_no_reason_to_call_a_limit_out_of_reach(
    worker: EngineWorker, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = _evaluator(plain(), torch.randn(24, 3, 16, 16), run, worker)
    space = bind(configured_space(CONFIG), evaluator.base, evaluator.inventory, "fp32", evaluator.capabilities)
    took = iter([2.0, 0.9, 1.5, 0.3])
    asked: list[float] = []

    def measured(*_: object, **__: object) -> SimpleNamespace:
        asked.append(next(took))
        return SimpleNamespace(ratio=asked[-1])

    monkeypatch.setattr(evaluator, "measure", measured)
    arithmetic = macs_ratio(evaluator.graphs.layout)
    reach = measured_reach(evaluator, CONFIG, space, arithmetic, 0.5)
    assert (reach.ratio, reach.measured, asked) == (0.3, True, [2.0, 0.9, 1.5, 0.3]) and not reach.policy.int8_layers
    assert reach.describe(0.5) is None
    # One that is inside the limit is enough.
    took = iter([0.4])
    assert measured_reach(evaluator, CONFIG, space, arithmetic, 0.5).ratio == 0.4 and len(asked) == 5
    evaluator.close()
