"""What is tried first: int8, without the layers it harms, then the mildest network inside the limit."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest

from autocompress.config import RunConfig
from autocompress.exploration.constraints import Constraints
from autocompress.exploration.first_candidates import FirstCandidates, Knowns
from autocompress.exploration.knapsack.problem import Costs
from autocompress.policy import CompressionPolicy
from autocompress.runs.records import TrialRecord
from autocompress.space.search_space import SearchSpace, SpaceFile
from tests.exploration.conftest import BASELINE, DEAR, SLOW, figures, make_inventory, record

RATIOS = (0.0, 0.25, 0.5, 0.75)
LAYERS = ("c0", "c1", "c2", "c3", "c4", "head")


class Network:
    """Made-up figures: int8 takes `speed` of the time and `harm` of each layer's accuracy; predictions are wrong."""

    def __init__(self, harm: dict[str, float] | None = None, *, speed: float = 0.6, scale: float = 1.0) -> None:
        self.harm, self.speed, self.scale = harm or {}, speed, scale
        self.tried: list[CompressionPolicy] = []
        self.said: list[str] = []
        self.refuses: Any = lambda policy: False
        file = {"pruning": {"ratios": list(RATIOS)}, "dtype": {"choices": ["dense", "int8"]}}
        self.space = SearchSpace(SpaceFile.model_validate(file), make_inventory(), "fp32", int8=True)

    def attempt(self, choices: Any) -> TrialRecord | None:
        policy = self.space.policy(choices)
        self.tried.append(policy)
        if self.refuses(policy):
            return None
        accuracy, latency = figures(policy)
        pruned = 0.95 - accuracy
        share = len(policy.int8_layers) / len(LAYERS)
        latency = sum(SLOW) * (latency / sum(SLOW)) ** self.scale * (1 - share * (1 - self.speed))
        accuracy = 0.95 - pruned - sum(self.harm.get(name, 0.0) for name in policy.int8_layers)
        return record(len(self.tried), accuracy, latency, policy=policy)

    def divergence(self, policy: CompressionPolicy) -> float | None:
        return None

    def int8(self) -> Any:
        return self, self.harm

    # As `Int8Sensitivity` tells it.
    def together(self) -> float:
        return self.without(())

    def without(self, layers: Collection[str]) -> float:
        return sum(value for name, value in self.harm.items() if name not in layers)

    def run(self, **limits: str) -> list[TrialRecord]:
        return self._with(lambda first: first.run(), limits)

    def reach(self, choices: Any, cost: float, **limits: str) -> list[TrialRecord]:
        return self._with(lambda first: first.reach(choices, cost), limits)

    def _with(self, act: Callable[[FirstCandidates], None], limits: dict[str, str]) -> list[TrialRecord]:
        ms = {f"prune/c{i}": {r: SLOW[i] * (1 - r) / sum(SLOW) for r in RATIOS} for i in range(5)}
        losses = {f"prune/c{i}": {r: DEAR[i] * r for r in RATIOS} for i in range(5)}
        ratio = lambda policy: figures(policy)[1] / sum(SLOW)  # noqa: E731
        knowns = Knowns(Costs(ms), ratio, losses, self.divergence, self.int8)  # type: ignore[arg-type]
        found: list[TrialRecord] = []

        def attempt(choices: Any) -> TrialRecord | None:
            made = self.attempt(choices)
            found.extend([made] if made is not None else [])
            return made

        constraints = Constraints.of(RunConfig.model_validate(limits), BASELINE)
        act(FirstCandidates(attempt, self.space, constraints, knowns, self.said.append))
        return found


def test_int8_that_loses_nothing_and_meets_the_limit_is_all_that_is_tried() -> None:
    (only,) = Network().run(target_latency="0.7x", max_drop="1pp")
    assert only.policy.int8_layers == tuple(sorted(LAYERS)) and not only.policy.pruning


def test_the_layers_that_int8_harms_are_left_out() -> None:
    harm = {"c0": 0.0005, "c1": 0.3, "c2": 0.0005, "c3": 0.02, "c4": 0.0005, "head": 0.0}
    network = Network(harm)
    found = network.run(target_latency="0.9x", max_drop="1pp")
    assert set(found[1].policy.int8_layers) == {"c0", "c2", "c4", "head"}
    assert 0.95 - (found[1].accuracy or 0) <= 0.01 and len(found) == 2


def test_int8_that_cannot_be_built_is_tried_without_the_worst_layers() -> None:
    harm = dict.fromkeys(LAYERS, 0.0001) | {"c1": 0.3}
    network = Network(harm)
    network.refuses = lambda policy: "c1" in policy.int8_layers
    (found,) = network.run(target_latency="0.9x", max_drop="1pp")
    assert "c1" not in found.policy.int8_layers and len(found.policy.int8_layers) == 5


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("limit", [0.3, 0.45])
def test_the_limit_is_approached_and_used(scale: float, limit: float) -> None:
    network = Network(scale=scale)
    found = network.run(target_latency=f"{limit}x", max_drop="20pp")
    # Every network has int8, and the last one is just inside the limit, wherever predictions had put it.
    inside = [r for r in found if r.measurement is not None and r.measurement.ratio <= limit]
    assert inside and len(found) <= 4
    nearest = max(r.measurement.ratio for r in inside if r.measurement)
    assert nearest >= 0.85 * limit
    assert all(r.policy.int8_layers for r in found)


def test_a_network_at_the_limit_that_is_not_accurate_sends_the_next_one_half_way_back() -> None:
    found = Network().run(target_latency="0.3x", max_drop="2pp")
    accuracies = [0.95 - (r.accuracy or 0.0) for r in found]
    ratios = [r.measurement.ratio for r in found if r.measurement]
    assert max(accuracies) > 0.02 and min(ratios) <= 0.3
    at = ratios.index(min(ratios))
    milder = found[at + 1 :]
    assert milder and all(ratios[at] < r.measurement.ratio < 0.6 for r in milder if r.measurement)
    # One that is accurate enough and faster than int8 alone was found on the way.
    assert any(drop <= 0.02 and ratio < 0.6 for drop, ratio in zip(accuracies, ratios, strict=True))


def test_without_a_latency_limit_harsher_networks_are_tried_while_they_are_accurate_enough() -> None:
    found = Network().run(max_drop="2pp")
    good = [r.measurement.ratio for r in found if r.measurement and 0.95 - (r.accuracy or 0) <= 0.02]
    assert len(found) >= 3 and min(good) < 0.6


def test_a_network_without_int8_goes_straight_to_the_limit() -> None:
    network = Network()
    file = SpaceFile.model_validate({"pruning": {"ratios": list(RATIOS)}})
    network.space = SearchSpace(file, make_inventory(), "fp32", int8=False)
    found = network.run(target_latency="0.7x", max_drop="20pp")
    assert found and not any(r.policy.int8_layers for r in found)
    assert 0.6 <= min(r.measurement.ratio for r in found if r.measurement) <= 0.7


def test_of_paths_the_one_that_is_measured_to_lose_least_at_the_limit_is_taken() -> None:
    network = Network()
    file = {"pruning": {"ratios": list(RATIOS)}, "rank": {"ratios": [1, 0.5, 0.25]}}
    network.space = SearchSpace(SpaceFile.model_validate(file), make_inventory(), "fp32", int8=False)
    seen: list[CompressionPolicy] = []

    def measured(policy: CompressionPolicy) -> float:
        seen.append(policy)
        # Sums say that single groups lose least; the network as a whole is better pruned evenly.
        ratios = list(policy.pruning.values())
        return 1.0 if not ratios else max(ratios) - min([*ratios, 0.0] if len(ratios) < 5 else ratios)

    network.divergence = measured  # type: ignore[method-assign]
    found = network.run(target_latency="0.7x", max_drop="20pp")
    assert len(seen) >= 2
    ratios = list(found[0].policy.pruning.values())
    assert len(ratios) >= 4 and max(ratios) - min(ratios) <= 0.25


def test_a_limit_that_no_network_reaches_is_told_with_the_range_that_is_within_reach() -> None:
    network = Network()
    found = network.run(target_latency="0.05x", max_drop="2pp")
    lowest = min(r.measurement.ratio for r in found if r.measurement)
    (text,) = network.said
    assert f"{lowest:.3g}x to 1x" in text and "0.05x was asked" in text and lowest == pytest.approx(0.15, abs=0.01)
    assert len(found) <= 3
    reachable = Network()
    reachable.run(target_latency="0.3x", max_drop="2pp")
    assert not reachable.said


def test_from_a_network_over_the_limit_it_goes_on_until_one_is_inside() -> None:
    network = Network(scale=0.5)
    choices = network.space.everywhere(dtype="int8")
    over = network.attempt(choices)
    assert over is not None and over.measurement is not None and over.measurement.ratio > 0.5
    found = network.reach(choices, over.measurement.ratio, target_latency="0.5x", max_drop="20pp")
    ratios = [r.measurement.ratio for r in found if r.measurement]
    assert 0.85 * 0.5 <= ratios[-1] <= 0.5 and all(r.policy.int8_layers for r in found)
    assert not network.reach(choices, 0.5, target_latency="0.5x")
    assert not network.reach(choices, 0.9, max_drop="1pp")
