"""A path from mild to harsh: ordered by what is lost for what is saved, and a limit found by measuring along it."""

from __future__ import annotations

import pytest

from autocompress.exploration.choice_path import ChoicePath
from autocompress.exploration.knapsack.problem import Costs
from autocompress.policy import CompressionPolicy
from autocompress.space.search_space import SearchSpace, SpaceFile
from tests.exploration.conftest import DEAR, SLOW, figures, make_inventory

RATIOS = (0.0, 0.25, 0.5, 0.75)


def make_space() -> SearchSpace:
    file = SpaceFile.model_validate({"pruning": {"ratios": list(RATIOS)}, "dtype": {"choices": ["dense", "int8"]}})
    return SearchSpace(file, make_inventory(), "fp32", int8=True)


def ratio(policy: CompressionPolicy) -> float:
    return figures(policy)[1] / sum(SLOW)


def make_path(**start: str) -> ChoicePath:
    space = make_space()
    ms = {f"prune/c{i}": {r: SLOW[i] * (1 - r) / sum(SLOW) for r in RATIOS} for i in range(5)}
    losses = {f"prune/c{i}": {r: DEAR[i] * r**2 for r in RATIOS} for i in range(5)}
    return ChoicePath(space, start, {"prune"}, costs=Costs(ms), losses=losses, cost=ratio)  # type: ignore[arg-type]


def test_steps_go_from_what_loses_least_for_what_it_saves_to_what_loses_most() -> None:
    path = make_path()
    assert len(path) == 15
    costs, losses = [path.predicted(n) for n in range(16)], [path.loss(n) for n in range(16)]
    assert costs == sorted(costs, reverse=True) and costs[0] == 1.0
    worth = [(losses[n + 1] - losses[n]) / (costs[n] - costs[n + 1]) for n in range(15)]
    assert worth == pytest.approx(sorted(worth))
    # Group 1 is cheap to lose and slow, group 3 dear and fast.
    assert path.at(1)["prune/c1"] == 0.25 and all(path.at(14)[f"prune/c{i}"] == 0.75 for i in (0, 1, 2, 4))


def test_what_the_path_begins_with_stays() -> None:
    path = make_path(**{"dtype/c0": "int8"})
    assert all(path.at(n)["dtype/c0"] == "int8" for n in range(len(path) + 1))


@pytest.mark.parametrize("power", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("limit", [0.4, 0.7, 0.9])
def test_a_limit_is_found_in_a_few_measurements_whatever_predictions_are_worth(power: float, limit: float) -> None:
    path = make_path()
    path.measured(0, 1.0)
    truth = [path.predicted(n) ** power for n in range(len(path) + 1)]
    wanted = next((n for n in range(len(path) + 1) if truth[n] <= limit), len(path))
    steps = -1
    for _ in range(4):
        found = path.steps_to(limit)
        if found == steps:
            break
        steps = found
        path.measured(steps, truth[steps])
    assert abs(steps - wanted) <= 1


def test_half_way_is_by_cost() -> None:
    path = make_path()
    path.measured(0, 1.0)
    middle = path.between(0, 15)
    assert path.expected(middle) <= (path.expected(0) + path.expected(15)) / 2 < path.expected(middle - 1)
    assert path.between(3, 4) in (3, 4)


def test_without_measurements_predictions_count_and_beyond_them_their_ratio() -> None:
    path = make_path()
    assert path.expected(5) == path.predicted(5)
    path.measured(5, 2 * path.predicted(5))
    assert path.expected(9) == pytest.approx(2 * path.predicted(9))
