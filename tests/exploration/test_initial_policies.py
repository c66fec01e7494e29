from __future__ import annotations

from autocompress.exploration.initial_policies import seed_choices
from autocompress.policy import CompressionPolicy
from tests.exploration.conftest import Bench


def test_seeds_are_valid_distinct_and_begin_with_doing_nothing(bench: Bench) -> None:
    space = bench.space(
        pruning={"ratios": [0, 0.25, 0.5, 0.75]}, dtype={"choices": ["dense", "int8"]}, blocks={"remove": True}
    )
    seeds = list(seed_choices(space, ["b1", "b0"]))
    for choices in seeds:
        assert all(choice in space.parameters[name] for name, choice in choices.items())
        assert choices.keys() == space.parameters.keys()
    policies = [space.policy(c) for c in seeds]
    assert len(set(policies)) == len(policies)
    assert policies[0] == CompressionPolicy() and len(policies[1].int8_layers) == 6
    assert {p for policy in policies for p in policy.pruning.values()} == {0.25, 0.5, 0.75}


def test_blocks_are_removed_in_the_order_given(bench: Bench) -> None:
    space = bench.space(blocks={"remove": True})
    removed = [space.policy(c).removed_blocks for c in seed_choices(space, ["b1", "b0"])]
    assert removed == [(), ("b1",), ("b0", "b1")]


def test_what_a_space_does_not_offer_is_not_tried(bench: Bench) -> None:
    space = bench.space(dtype={"choices": ["dense", "int8"]})
    assert len(list(seed_choices(space, []))) == 2
