"""What is left out of a space, on a machine whose stairs are known."""

from __future__ import annotations

from typing import Any

import pytest

from autocompress.prediction.predictor import LatencyPredictor, Prediction
from autocompress.prediction.staircase import LEAST_NETWORKS, drop_dominated_choices
from autocompress.space.search_space import SearchSpace, SpaceFile
from tests.prediction import made_up


def bound(**parts: Any) -> SearchSpace:
    return SearchSpace(SpaceFile.model_validate(parts), made_up.LAYOUT.inventory, "bf16", int8=True)


def learned(count: int, noise: float = 0.002) -> LatencyPredictor:
    return made_up.predictor(made_up.measure(count, seed=0, noise=noise))


@pytest.fixture(scope="module")
def table() -> LatencyPredictor:
    return learned(150)


class Told:
    """Stands in for a `LatencyPredictor`: every figure is worked out from the made-up machine, with a given error."""

    ready, size, layout = True, LEAST_NETWORKS, made_up.LAYOUT

    def __init__(self, deviation: float = 0.0, int8: float = 1.0, rank: float = 1.0, sparse: float = 1.0) -> None:
        self._deviation, self._int8, self._rank, self._sparse = deviation, int8, rank, sparse

    def _ratio(self, policy: Any) -> float:
        found = made_up.latency_ms(policy) / made_up.BASE_MS
        ranked = sum(layer.rank_ratio < 1 for layer in policy.layers.values())
        sparse = self._sparse ** len(policy.sparse_layers)
        return float(found * self._int8 ** len(policy.int8_layers) * self._rank**ranked * sparse)

    def predict(self, policy: Any) -> Any:
        found = self._ratio(policy)
        return Prediction(found, found, found)

    def difference(self, policy: Any, other: Any) -> tuple[float, float]:
        return self._ratio(policy) - self._ratio(other), self._deviation


WIDTHS = {"ratios": [n / 32 for n in range(0, 32, 4)], "round_to": 4}


def test_only_the_edges_of_steps_are_left() -> None:
    space = bound(pruning=WIDTHS)
    left = drop_dominated_choices(Told(), space)  # type: ignore[arg-type]
    # Sixteen channels are computed at once, so 28 and 20 cost what 32 do, but for what is written.
    kept = [round(32 * (1 - float(ratio))) for ratio in left["prune/c0"]]
    assert kept[0] == 32 and 16 in kept and 28 not in kept and 12 not in kept
    assert set(left["prune/c0"]) <= set(space.every["prune/c0"])


def test_what_is_not_certain_stays() -> None:
    space = bound(pruning=WIDTHS, rank={"ratios": [1, 0.5]}, dtype={"choices": ["dense", "int8"]})
    assert drop_dominated_choices(Told(deviation=1.0, int8=1.1, rank=1.1), space) == {}  # type: ignore[arg-type]


def test_2_4_sparsity_that_does_not_pay_is_left_out() -> None:
    file = SpaceFile.model_validate({"sparsity": {"choices": ["none", "2:4"]}, "pruning": {"ratios": [0, 0.5]}})
    space = SearchSpace(file, made_up.LAYOUT.inventory, "fp16", int8=True, sparse=True)
    allowed_choices = {name for name in space.every if name.startswith("sparsity/")}
    slower = drop_dominated_choices(Told(sparse=1.2), space)  # type: ignore[arg-type]
    assert allowed_choices and {name for name in slower if name.startswith("sparsity/")} == allowed_choices
    assert not {name for name in drop_dominated_choices(Told(sparse=0.8), space) if name.startswith("sparsity/")}  # type: ignore[arg-type]


def test_ranks_and_int8_that_are_slower_both_ways_are_left_out() -> None:
    space = bound(rank={"ratios": [1, 0.5]}, dtype={"choices": ["dense", "int8"]}, pruning={"ratios": [0, 0.5]})
    slower = drop_dominated_choices(Told(int8=1.5, rank=1.5), space)  # type: ignore[arg-type]
    assert {name for name in slower if name.startswith("rank/")} == {n for n in space.every if n.startswith("rank/")}
    assert {name for name in slower if name.startswith("dtype/")} == {n for n in space.every if n.startswith("dtype/")}
    assert set(slower.values()) == {(1.0,), ("dense",)}
    faster = drop_dominated_choices(Told(int8=0.5, rank=0.5), space)  # type: ignore[arg-type]
    assert not {name for name in faster if not name.startswith("prune/")}


def test_a_learned_table_narrows_and_keeps_what_pays(table: LatencyPredictor) -> None:
    space = bound(
        pruning={"ratios": [0, 0.125, 0.25, 0.5, 0.75], "round_to": 4},
        rank={"ratios": [1, 0.5, 0.25]},
        dtype={"choices": ["dense", "int8"]},
        blocks={"remove": True},
    )
    left = drop_dominated_choices(table, space)
    dropped = [(n, c) for n, kept in left.items() for c in space.every[n] if c not in kept]
    assert dropped and all(len(kept) >= 1 and kept[0] == space.every[n][0] for n, kept in left.items())
    everywhere = space.everywhere()
    for name, choice in dropped:
        # None of them saves anything worth having on the machine that the table was made on.
        true = made_up.latency_ms(space.policy({**everywhere, name: choice})) / made_up.BASE_MS
        wider = space.every[name][: space.every[name].index(choice)]
        best = min(made_up.latency_ms(space.policy({**everywhere, name: c})) / made_up.BASE_MS for c in wider)
        assert true >= best - 0.01, (name, choice)
    narrowed = space.narrowed(left)
    assert narrowed.hash != space.hash and "block/b" in narrowed.parameters


def test_a_small_table_leaves_everything() -> None:
    assert drop_dominated_choices(learned(LEAST_NETWORKS - 1), made_up.SPACE) == {}
    assert drop_dominated_choices(LatencyPredictor(made_up.LAYOUT), made_up.SPACE) == {}


def test_where_nothing_pays_everything_stays() -> None:
    space = bound(dtype={"choices": ["dense", "int8"]})
    assert drop_dominated_choices(Told(int8=2.0), space) == {}  # type: ignore[arg-type]


def test_a_space_of_one_kind_for_all_layers_is_narrowed_layer_by_layer() -> None:
    space = bound(uniform=True, pruning=WIDTHS, dtype={"choices": ["dense", "int8"]})
    left = drop_dominated_choices(Told(), space)  # type: ignore[arg-type]
    assert left and all(name in space.every for name in left)
    policy = space.narrowed(left).policy({"prune/*": 1 / 8})
    assert "c0" not in policy.pruning or policy.pruning["c0"] in left["prune/c0"]


def test_the_difference_of_two_networks_is_known_better_than_either(table: LatencyPredictor) -> None:
    one, other = (made_up.SPACE.policy({"prune/c1": ratio, "dtype/c2": "int8"}) for ratio in (0.5, 0.25))
    mean, deviation = table.difference(one, other)
    assert mean == pytest.approx(table.predict(one).ratio - table.predict(other).ratio, abs=1e-4)
    assert 0 < deviation < min(table.moments(one)[1], table.moments(other)[1])
    true = (made_up.latency_ms(one) - made_up.latency_ms(other)) / made_up.BASE_MS
    assert abs(mean - true) < max(4 * deviation, 0.01)
    assert table.difference(one, one) == (0.0, 0.0)
    assert table.difference(other, one)[0] == pytest.approx(-mean, abs=1e-4)
