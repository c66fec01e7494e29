"""Uniform rows: which there are, and that a sampler begins with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
import pytest

from autocompress.exploration.knapsack.choice_graph import Graph
from autocompress.exploration.knapsack.problem import Costs, Pair, Switch
from autocompress.exploration.knapsack.proposals import Planner
from autocompress.exploration.knapsack.sampler import COST_ATTRIBUTE, KnapsackSampler
from autocompress.exploration.knapsack.uniform_rows import uniform_rows

RATIOS = (0.0, 0.25, 0.5)
LAYERS = 6


def rows_of(costs: Costs) -> list[list[int]]:
    return sorted(row.tolist() for row in uniform_rows(Graph(costs), np.random.default_rng(0)))


def test_kinds_are_combined_and_shorter_lists_give_their_nearest() -> None:
    costs = Costs(
        {
            "prune/a": {0: 3.0, 1: 2.0, 2: 1.0}, "prune/b": {0: 3.0, 2: 1.0},
            "dtype/a": {"dense": 1.0, "int8": 0.5}, "dtype/b": {"dense": 1.0, "int8": 0.5},
        }
    )  # fmt: skip
    assert rows_of(costs) == [
        [0, 0, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0], [1, 0, 1, 1], [2, 1, 0, 0], [2, 1, 1, 1],
    ]  # fmt: skip


def test_without_names_of_kinds_what_is_offered_tells() -> None:
    costs = Costs({"a": {0: 2.0, 1: 1.0}, "b": {0: 2.0, 1: 1.0}, "c": {"x": 2.0, "y": 1.0}})
    assert rows_of(costs) == [[0, 0, 0], [0, 0, 1], [1, 1, 0], [1, 1, 1]]


def test_what_is_excluded_or_switched_off_makes_no_row_of_its_own() -> None:
    ms: dict[str, Any] = {name: {0: 1.0, 1: 0.5} for name in ("cut/a", "cut/b")}
    pair = Pair("cut/a", "cut/b", [[0, 0], [0, np.inf]])
    assert rows_of(Costs(ms, pairs=[pair])) == [[0, 0]]
    free = Costs({"block/a": {0: 1.0, 1: 0.0}, "cut/a": {0: 1.0, 1: 0.5}}, free=[Switch("block/a", 1, ("cut/a",))])
    assert rows_of(free) == [[0, 0], [0, 1], [1, -1]]


def test_of_too_many_combinations_some_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.exploration.knapsack.uniform_rows._MOST", 20)
    costs = Costs({f"{kind}/{i}": {c: 1.0 - 0.1 * c for c in range(5)} for kind in "abc" for i in range(2)})
    found = rows_of(costs)
    assert 10 < len(found) <= 20
    assert all(row[::2] == row[1::2] for row in found)
    assert found == rows_of(costs)


def figures(params: dict[str, Any]) -> tuple[float, float]:
    """Return quality and cost where the two kinds, of which each alone is cheap, ruin each other in a layer."""
    lost = sum(
        0.01 * params[f"prune/{i}"] + 0.01 * params[f"rank/{i}"] + 0.6 * params[f"prune/{i}"] * params[f"rank/{i}"]
        for i in range(LAYERS)
    )
    cost = sum((1 - params[f"prune/{i}"]) * (1 - params[f"rank/{i}"]) for i in range(LAYERS)) / LAYERS
    return max(0.9 - lost, 0.1), cost


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    names = [f"{kind}/{i}" for kind in ("prune", "rank") for i in range(LAYERS)]
    return {name: trial.suggest_categorical(name, RATIOS) for name in names}


def known() -> tuple[Costs, dict[str, Any]]:
    names = [f"{kind}/{i}" for kind in ("prune", "rank") for i in range(LAYERS)]
    costs = Costs({name: {r: 0.6 * (1 - r) / LAYERS for r in RATIOS} for name in names})
    return costs, {name: {r: 0.01 * r for r in RATIOS} for name in names}


def is_uniform(params: dict[str, Any]) -> bool:
    return all(len({c for n, c in params.items() if n.startswith(kind)}) == 1 for kind in ("prune", "rank"))


@pytest.mark.parametrize("seed", range(3))
def test_after_the_sums_solution_the_first_trials_are_uniform(seed: int) -> None:
    costs, losses = known()
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=KnapsackSampler(costs, losses, seed=seed, reference=0.9, floor=0.1)
    )
    study.optimize(lambda trial: figures(suggest(trial)), n_trials=12)
    kinds = [is_uniform(t.params) for t in study.trials]
    assert kinds[1:4] == [True] * 3 and not all(kinds[4:])
    # One that does one kind alone is among the few, and stands before what the sums thought best.
    first, *others = [t.values for t in study.trials[:4]]
    assert any(quality > first[0] for quality, _ in others)


def test_within_a_budget_only_uniform_rows_that_meet_it_are_tried() -> None:
    costs, losses = known()
    sampler = KnapsackSampler(costs, losses, seed=0, budget=0.8, reference=0.9, floor=0.1)
    study = optuna.create_study(direction="maximize", sampler=sampler)

    def objective(trial: optuna.Trial) -> float:
        params = suggest(trial)
        # As the sums have it, which the budget is then met by.
        cost = sum(costs.ms[name][choice] for name, choice in params.items())
        trial.set_constraint("latency", cost / 0.8 - 1)
        trial.set_user_attr(COST_ATTRIBUTE, cost)
        return figures(params)[0]

    study.optimize(objective, n_trials=4)
    spent = [t.user_attrs[COST_ATTRIBUTE] for t in study.trials]
    assert max(spent) <= 0.8 * 1.001


def test_where_no_uniform_row_meets_the_budget_none_is_tried() -> None:
    costs, losses = known()
    planner = Planner(Graph(costs), losses, floor=0.1, reference=0.9)
    effects = planner._losses.effects(None, 0.0)
    # The cheapest network of all takes 0.6.
    for budget, meets in ((0.5, False), (0.7, True)):
        row = planner._uniform(np.random.default_rng(0), planner._promise(effects, budget, []), set())
        assert (row is not None) == meets
        assert row is None or float(planner._costs.total(row[None])[0]) <= budget
