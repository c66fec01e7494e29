"""Early rejection: what cannot count any more is not built, and what might is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from autocompress.config import RunConfig
from autocompress.exploration.early_rejection import cannot_win
from autocompress.exploration.pareto import Constraints
from autocompress.exploration.study import load_study
from autocompress.prediction.predictor import Prediction
from autocompress.runs.records import TrialRecord
from autocompress.tasks.validation import ProxyEstimate
from tests.exploration import conftest, tiny
from tests.exploration.conftest import BASELINE, Bench
from tests.exploration.known import Known

FOREVER = math.inf
HALF = RunConfig(target_latency="0.5x", sampler="random")
FRONT = RunConfig(sampler="random")
AT_HALF = Prediction(0.5, 0.48, 0.52)


def limits(config: RunConfig) -> Constraints:
    return Constraints.of(config, BASELINE)


def known(accuracies: list[float], latency: float = 5.0) -> list[TrialRecord]:
    return [conftest.record(n, accuracy, latency) for n, accuracy in enumerate(accuracies)]


@pytest.mark.parametrize(("high", "rejected"), [(0.59, True), (0.61, False), (0.95, False)])
def test_with_a_limit_the_better_half_is_what_counts(high: float, rejected: bool) -> None:
    # Of eight inside the limit, the fourth best has 0.6.
    records = known([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    assert cannot_win(ProxyEstimate(0.5, high), AT_HALF, records, limits(HALF), 3) == rejected


def test_all_who_will_be_fine_tuned_must_be_better_first() -> None:
    assert not cannot_win(ProxyEstimate(0.1, 0.2), AT_HALF, known([0.9, 0.8, 0.7, 0.6, 0.5]), limits(HALF), 3)
    assert cannot_win(ProxyEstimate(0.1, 0.2), AT_HALF, known([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]), limits(HALF), 3)
    # Those over the limit hold no place.
    over = known([0.9, 0.8, 0.7]) + known([0.6, 0.5, 0.4], latency=11.0)
    assert not cannot_win(ProxyEstimate(0.1, 0.2), AT_HALF, over, limits(HALF), 3)


@pytest.mark.parametrize(
    ("latency", "accuracy", "rejected"), [(5.0, 0.8, True), (5.0, 0.6, False), (5.6, 0.8, False), (5.52, 0.8, True)]
)
def test_on_the_front_one_must_be_surely_faster_and_as_accurate(
    latency: float, accuracy: float, rejected: bool
) -> None:
    # 0.48 of the baseline's 11.5 ms are 5.52 ms.
    found = cannot_win(ProxyEstimate(0.6, 0.7), AT_HALF, known([accuracy], latency), limits(FRONT), 3)
    assert found == rejected


def test_nothing_is_rejected_where_the_first_look_says_nothing() -> None:
    assert not cannot_win(ProxyEstimate(0.1, math.inf), AT_HALF, known([0.9] * 8), limits(HALF), 3)


def test_nothing_is_rejected_where_only_a_build_tells_the_size(bench: Bench) -> None:
    config = RunConfig(target_latency="0.5x", max_size="1MB", sampler="random")
    loop = bench.loop(config, predictor=Known(), finalists=2)
    loop.run(40, FOREVER)
    assert all(record.state == "complete" for record in loop.records.values())


def test_a_rejected_network_is_looked_at_once(bench: Bench) -> None:
    # Sixteen networks: a sampler at random draws each of them often.
    space = bench.space(pruning={"ratios": [0, 0.5], "include": ["c0", "c1", "c2", "c3"]})
    loop = bench.loop(FRONT, space, predictor=Known(), finalists=2)
    loop.run(200, FOREVER)
    asked = bench.evaluator.asked
    assert len(asked) == len(set(asked)) == len(loop.records) <= 16
    rejected = [r for r in loop.records.values() if r.state == "rejected"]
    assert rejected
    # Drawn again, the study is told what is known.
    told = [t for t in load_study(bench.run).trials if t.user_attrs.get("rejected")]
    assert len(told) > len(rejected)
    resumed = bench.loop(FRONT, space, predictor=Known(), finalists=2)
    resumed.run(200, FOREVER)
    assert len(bench.evaluator.asked) == len(set(bench.evaluator.asked))


@pytest.mark.parametrize("config", [HALF, FRONT])
def test_a_search_rejects_and_goes_on(config: RunConfig, bench: Bench) -> None:
    loop = bench.loop(config, predictor=Known(), finalists=2)
    loop.run(40, FOREVER)
    rejected = [r for r in loop.records.values() if r.state == "rejected"]
    found = loop.prediction()
    assert rejected and found is not None and found["rejected"] == len(rejected) < 35
    assert len(loop.records) == 40 and len(bench.told) == 40
    trials = load_study(bench.run).trials
    for record in rejected:
        trial = trials[record.number]
        assert trial.user_attrs["rejected"] and trial.values[0] == record.accuracy
        assert record.measurement is None and record.predicted_ratio is not None
        # Nothing that was rejected would have been the best.
        best = max(r.accuracy or 0 for r in loop.records.values() if r.state == "complete")
        assert (record.accuracy or 0) < best
        if config is HALF:
            assert record.predicted_ratio is not None
            assert trial.constraints["latency"] == pytest.approx(record.predicted_ratio / 0.5 - 1)
    stored = [json.loads(line)["state"] for line in (bench.run.path / "trials.jsonl").read_text().splitlines()]
    assert stored.count("rejected") == len(rejected)
    resumed = bench.loop(config, predictor=Known(), finalists=2)
    assert resumed.prediction()["rejected"] == len(rejected)  # type: ignore[index]


def test_a_predictor_that_is_not_believed_rejects_nothing(bench: Bench) -> None:
    known = Known()
    known.error = 0.5
    loop = bench.loop(FRONT, predictor=known, finalists=2)
    loop.run(20, FOREVER)
    assert all(record.state == "complete" for record in loop.records.values())


@pytest.fixture(scope="module")
def first_look() -> Callable[[Any, Any], ProxyEstimate]:
    """`estimate_accuracy` on the tiny task's validation data, without an engine."""
    from autocompress.tasks.validation import ValidationData, estimate_accuracy

    task = tiny.made("wide")

    def look(model: torch.nn.Module, folder: Any) -> ProxyEstimate:
        import numpy as np

        inputs, targets = next(iter(task.validation(64)))
        np.save(folder / "validation.npy", inputs.numpy())
        data = ValidationData(folder / "validation.npy", targets, inputs[:2])
        return estimate_accuracy(model, data, task.metric, torch.float32)

    return look


def test_a_first_look_tells_a_good_network_from_a_ruined_one(first_look: Any, tmp_path: Any) -> None:
    task = tiny.made("wide")
    good = first_look(task.model(), tmp_path)
    inputs, targets = next(iter(task.validation(64)))
    whole = task.metric(task.model()(inputs), targets)
    assert good.accuracy == pytest.approx(whole, abs=0.02) and good.high > good.accuracy
    ruined = task.model()
    ruined[-1].weight.data.neg_()  # type: ignore[index,union-attr]
    ruined[-1].bias.data.neg_()  # type: ignore[index,union-attr]
    bad = first_look(ruined, tmp_path)
    assert bad.high < good.accuracy


def test_a_metric_that_is_not_a_number_rejects_nothing(first_look: Any, tmp_path: Any) -> None:
    task = tiny.made("wide")
    model = task.model()
    broken = replace(first_look(model, tmp_path), accuracy=math.nan, high=math.inf)
    assert not cannot_win(broken, AT_HALF, known([0.9] * 8), limits(HALF), 3)
