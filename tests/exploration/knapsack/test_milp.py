"""The knapsack against trying everything, and what it says where there is no answer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autocompress.errors import ConfigError
from autocompress.exploration.knapsack import milp
from autocompress.exploration.knapsack.choice_graph import Graph
from autocompress.exploration.knapsack.milp import Solver, solve, spread
from autocompress.exploration.knapsack.problem import Choice, Costs, Pair, Problem, Switch


def made_up(
    seed: int, *, count: int = 5, choices: int = 3, chain: bool = True, extra: int = 0, block: bool = False
) -> Problem:
    rng = np.random.default_rng(seed)
    ms: dict[str, dict[Choice, float]] = {}
    losses: dict[str, dict[Choice, float]] = {}
    for i in range(count):
        ms[f"p{i}"] = dict(enumerate(np.sort(rng.uniform(0.1, 1, choices))[::-1].tolist()))
        losses[f"p{i}"] = dict(enumerate(np.sort(np.r_[0, rng.uniform(0, 0.1, choices - 1)]).tolist()))
    joined = [(i, i + 1) for i in range(count - 1)] if chain else []
    joined += [tuple(rng.choice(count, 2, replace=False)) for _ in range(extra)]
    pairs = [Pair(f"p{i}", f"p{j}", rng.uniform(0, 0.2, (choices, choices))) for i, j in joined]
    free = []
    if block:
        ms["block"], losses["block"] = {"keep": 0.0, "remove": 0.0}, {"keep": 0.0, "remove": 0.1}
        free = [Switch("block", "remove", ("p1", "p2"))]
    return Problem(
        Costs(ms, pairs, free=free, fixed_ms=0.5), losses, {("p0", "p2"): rng.uniform(0, 0.02, (choices, choices))}
    )


def best_by_trying(problem: Problem, budget: float) -> float:
    graph = Graph(problem.costs)
    weights = graph.weigh(graph.flatten(problem.losses), pair_losses=problem.pair_losses)
    every = (weights.totals(np.array(c)) for c in itertools.product(*[range(s) for s in graph.sizes]))
    return min((loss for loss, cost in every if cost <= budget + 1e-9), default=np.inf)


def range_of(problem: Problem) -> tuple[float, float]:
    graph = Graph(problem.costs)
    solver = Solver(graph.weigh(graph.flatten(problem.losses), pair_losses=problem.pair_losses))
    return solver.cheapest_cost, solver.weights.totals(solver.relaxation.minimise(0.0)[0])[1]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("part", [0.0, 0.3, 0.7, 1.0])
def test_no_allocation_within_the_budget_loses_less(seed: int, part: float) -> None:
    problem = made_up(seed, chain=seed % 2 == 0, extra=seed % 4, block=seed % 3 == 0)
    low, high = range_of(problem)
    budget = low + part * (high - low)
    found = solve(problem, budget, gap=1e-9)
    assert found.cost_ms <= budget + 1e-6
    assert found.loss == pytest.approx(best_by_trying(problem, budget), abs=1e-8)
    assert found.status == "optimal" and found.warning is None


def test_a_removed_block_switches_its_layers_off_with_their_pairs() -> None:
    ms = {"block": {"keep": 0.0, "remove": 0.0}, "a": {0: 3.0, 1: 2.0}, "b": {0: 1.0, 1: 0.5}}
    costs = Costs(ms, [Pair("a", "b", [[1.0, 1.0], [1.0, 1.0]])], free=[Switch("block", "remove", ("a",))])
    found = solve(Problem(costs, {"block": {"remove": 0.5}, "b": {1: 0.1}, "a": {1: 0.2}}), 1.0)
    assert found.choices == {"block": "remove", "a": 0, "b": 0}
    assert (found.loss, found.cost_ms) == (0.5, 1.0)


def test_equal_parameters_take_the_same_choice_of_those_all_offer() -> None:
    costs = Costs(
        {"a": {0: 3.0, 1: 2.0, 2: 1.0}, "b": {0: 3.0, 2: 1.0}}, [Pair("a", "b", np.ones((3, 2)))], equal=[("a", "b")]
    )
    found = solve(Problem(costs, {"a": {1: 0.1, 2: 0.3}, "b": {2: 0.1}}), 6.0)
    assert found.choices == {"a": 2, "b": 2}
    assert (found.loss, found.cost_ms) == (0.4, 3.0)


def test_excluded_choices_and_pairs_are_never_taken() -> None:
    costs = Costs(
        {"a": {0: 2.0, 1: 1.0, 2: np.inf}, "b": {0: 2.0, 1: 1.0}}, [Pair("a", "b", [[0, 0], [0, np.inf], [0, 0]])]
    )
    found = spread(Problem(costs, {"a": {1: 1.0}, "b": {1: 2.0}}), [3.0, 4.0])
    assert [f.choices for f in found] == [{"a": 1, "b": 0}, {"a": 0, "b": 0}]


def test_single_changes_are_what_changing_at_will_gives() -> None:
    ms: dict[str, dict[Choice, float]] = {name: {0: 3.0, 1: 2.0, 2: 1.0} for name in "abcdef"}
    ms["f"][2] = np.inf
    ms["block"] = {"keep": 0.0, "remove": 0.0}
    pairs = [Pair("a", "b", [[0, 0, 0], [0, np.inf, 0], [0, 0, 0]])]
    graph = Graph(Costs(ms, pairs, equal=[("c", "d")], free=[Switch("block", "remove", ("e",))]))
    for kept in ("keep", "remove"):
        row = graph.apply_switches(np.array([0, 1, 0, 0, 1, 0, ("keep", "remove").index(kept)]))
        assert row is not None
        chosen = graph.read(np.maximum(row, 0))
        assert chosen is not None
        changes = [(node, state) for node, offered in enumerate(graph.local) for state in range(len(offered))]
        slow = [graph.canonicalise(np.r_[chosen[:node], state, chosen[node + 1 :]]) for node, state in changes]
        expected = [graph.named(found) for found in slow if found is not None]
        assert [graph.named(found) for found in graph.changed(chosen, changes)] == expected
        # Without the excluded choice of `f` and that of `a` which excludes what `b` has.
        assert len(expected) == len(changes) - 2
        assert all(found["c"] == found["d"] for found in expected)


def test_a_single_choice_is_taken_and_paid_for() -> None:
    found = solve(Problem(Costs({"a": {"only": 1.0}, "b": {0: 2.0, 1: 1.0}}), {"b": {1: 0.1}}), 2.0)
    assert found.choices == {"a": "only", "b": 1} and found.cost_ms == 2.0


def test_more_budget_never_loses_more() -> None:
    problem = made_up(3, count=12, choices=5)
    low, high = range_of(problem)
    losses = [a.loss for a in spread(problem, list(np.linspace(low, high, 9)), gap=1e-6)]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_a_budget_below_the_cheapest_says_what_the_cheapest_costs() -> None:
    with pytest.raises(ConfigError, match=r"budget of 1\.5: the cheapest one costs 2"):
        solve(Problem(Costs({"a": {0: 3.0, 1: 2.0}})), 1.5)
    with pytest.raises(ConfigError, match="budget of nan"):
        solve(Problem(Costs({"a": {0: 3.0, 1: 2.0}})), float("nan"))


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        (Costs({}), "nothing to allocate"),
        (Costs({"a": {}}), "'a' has no choices"),
        (Costs({"a": {0: float("nan")}}), "'a' is"),
        (Costs({"a": {0: np.inf}}), "No choice of .*'a'"),
        (Costs({"a": {0: 1.0}, "b": {1: 1.0}}, equal=[("a", "b")]), "no choice in common: a: .0.; b: .1."),
        (Costs({"a": {0: 1.0}, "b": {1: 1.0}}, [Pair("a", "b", [[np.inf]])]), "contradict each other"),
        (Costs({"a": {0: 1.0}}, [Pair("a", "c", [[1.0]])]), "Unknown parameter 'c'"),
        (Costs({"a": {0: 1.0}, "b": {1: 1.0}}, [Pair("a", "b", [[1.0, 2.0]])]), r"shape \(1, 2\); it needs \(1, 1\)"),
        (Costs({"a": {0: 1.0}, "b": {1: 1.0}}, free=[Switch("a", "gone", ("b",))]), "no choice 'gone'"),
        (Costs({"a": {0: 1.0, 1: 1.0}}, free=[Switch("a", 1, ("a",))]), "switches it itself"),
    ],
)
def test_a_contradiction_is_named(costs: Costs, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        solve(Problem(costs), 10.0)


def test_a_solver_without_time_leaves_the_relaxed_answer_and_says_so() -> None:
    problem = made_up(1, count=30, choices=8, extra=6)
    low, high = range_of(problem)
    found = solve(problem, low + 0.4 * (high - low), gap=1e-9, time_limit_s=1e-4)
    assert found.status in ("time_limit", "relaxed")
    assert found.cost_ms <= low + 0.4 * (high - low) + 1e-6
    assert found.warning is not None and "best one found" in found.warning
    better = solve(problem, low + 0.4 * (high - low), gap=1e-4, time_limit_s=30)
    assert found.bound - 1e-9 <= better.loss <= found.loss < 1.3 * better.loss


def test_a_problem_too_large_for_the_solver_is_relaxed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milp, "_MOST_COLUMNS", 10)
    problem = made_up(1, count=12, choices=4)
    low, high = range_of(problem)
    found = solve(problem, (low + high) / 2, gap=1e-12)
    assert found.status == "relaxed" and found.bound <= found.loss
    assert "too large" in (found.warning or "")


def test_a_wide_graph_is_solved_by_descent_and_the_exact_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.exploration.knapsack.relaxation._WIDEST", 4)
    problem = made_up(2, extra=3)
    low, high = range_of(problem)
    assert low == pytest.approx(min(range_of(made_up(2, extra=3))))
    found = solve(problem, (low + high) / 2, gap=1e-9)
    assert found.loss == pytest.approx(best_by_trying(problem, (low + high) / 2), abs=1e-8)
