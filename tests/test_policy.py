"""`CompressionPolicy`: a value. Equal means the same hash, JSON and pickle; nonsense is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from autocompress.errors import ConfigError
from autocompress.policy import CompressionPolicy, LayerPolicy

# These key caches on users' disks: when one changes, raise POLICY_VERSION.
EMPTY_HASH = "a692473c73a40b88"
FULL_HASH = "8981e820b2ac94ef"


def test_the_hash_is_the_same_in_every_release(policy: CompressionPolicy) -> None:
    assert CompressionPolicy().hash == EMPTY_HASH
    assert policy.hash == FULL_HASH


def test_the_hash_is_the_same_in_every_process() -> None:
    code = "from autocompress.policy import CompressionPolicy; print(CompressionPolicy().hash)"
    for seed in ("1", "2"):
        answer = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert answer.stdout.strip() == EMPTY_HASH


def test_json_round_trip(policy: CompressionPolicy) -> None:
    text = json.dumps(policy.to_dict())
    again = CompressionPolicy.from_dict(json.loads(text))
    assert again == policy
    assert hash(again) == hash(policy)
    assert json.dumps(again.to_dict()) == text


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_are_equal(policy: CompressionPolicy, copied: Any) -> None:
    assert copied(policy) == policy


def test_order_and_entries_that_do_nothing_do_not_matter(policy: CompressionPolicy) -> None:
    same = CompressionPolicy(
        dense_dtype="bf16",
        pruning={"g0": 0.25, "g1": 0.5, "untouched": 0.0},
        layers={"fc": LayerPolicy(rank_ratio=0.5), "conv": LayerPolicy("int8"), "other": LayerPolicy()},
        removed_blocks=("b1", "b2", "b1"),
    )
    assert same == policy
    assert same.hash == policy.hash


@pytest.mark.parametrize("one", [1, 1.0, np.float32(1), np.int64(1)])
def test_equal_numbers_hash_equal_whatever_their_type(one: Any) -> None:
    made = CompressionPolicy(layers={"a": LayerPolicy("int8", rank_ratio=one)}, pruning={"g": one / 2})
    expected = CompressionPolicy(layers={"a": LayerPolicy("int8")}, pruning={"g": 0.5})
    assert made == expected
    assert made.hash == expected.hash


def test_every_choice_changes_the_hash(policy: CompressionPolicy) -> None:
    others = [
        CompressionPolicy(),
        policy,
        dataclasses.replace(policy, dense_dtype="fp16"),
        dataclasses.replace(policy, pruning={"g1": 0.5}),
        dataclasses.replace(policy, pruning={"g1": 0.5, "g0": 0.26}),
        dataclasses.replace(policy, layers={"conv": LayerPolicy("int8")}),
        dataclasses.replace(policy, layers={"conv": LayerPolicy("int8", 0.5)}),
        dataclasses.replace(policy, layers={"conv": LayerPolicy("int8", 0.5, factorization="cp")}),
        dataclasses.replace(policy, removed_blocks=("b1",)),
    ]
    assert len({p.hash for p in others}) == len(others)


def test_the_usual_factorization_says_nothing_nor_does_any_of_a_whole_layer() -> None:
    assert LayerPolicy(rank_ratio=0.5, factorization="tucker2").to_dict() == {"dtype": "dense", "rank_ratio": 0.5}
    assert LayerPolicy(factorization="cp").is_identity
    policy = CompressionPolicy(layers={"conv": LayerPolicy(rank_ratio=0.5, factorization="spatial_svd")})
    assert policy.to_dict()["layers"]["conv"]["factorization"] == "spatial_svd"
    assert CompressionPolicy.from_dict(policy.to_dict()) == policy


def test_a_policy_cannot_be_changed(policy: CompressionPolicy) -> None:
    with pytest.raises(TypeError):
        policy.pruning["g0"] = 0.9  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.dense_dtype = "fp32"  # type: ignore[misc]
    mine = {"g0": 0.5}
    made = CompressionPolicy(pruning=mine)
    mine["g0"] = 0.9
    assert made.pruning["g0"] == 0.5


def test_what_it_says_of_layers(policy: CompressionPolicy) -> None:
    assert policy.layer("conv") == LayerPolicy("int8")
    assert policy.layer("unknown").is_identity
    assert policy.int8_layers == ("conv",)
    assert not policy.is_structural_identity
    assert CompressionPolicy("fp16", layers={"conv": LayerPolicy("int8")}).is_structural_identity
    assert not CompressionPolicy(layers={"conv": LayerPolicy(rank_ratio=0.5)}).is_structural_identity
    assert not CompressionPolicy(removed_blocks=("b1",)).is_structural_identity


def test_describe(policy: CompressionPolicy) -> None:
    assert policy.describe() == "bf16, -2 blocks, prune 2g ~38%, rank 1l ~50%, int8 1l"
    assert CompressionPolicy().describe() == "fp32"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerPolicy("int4"), "Unknown layer dtype 'int4'. Did you mean 'int8'?"),
        (lambda: LayerPolicy(rank_ratio=0), "rank_ratio is 0"),
        (lambda: LayerPolicy(factorization="tucker"), "Unknown factorization 'tucker'. Did you mean 'tucker2'?"),
        (lambda: LayerPolicy(rank_ratio=1.5), "rank_ratio is 1.5"),
        (lambda: LayerPolicy(rank_ratio=float("nan")), "rank_ratio is nan"),
        (lambda: CompressionPolicy("bf61"), "Unknown dense_dtype 'bf61'. Did you mean 'bf16'?"),
        (lambda: CompressionPolicy(pruning={"g7": 1.0}), "pruning_ratio of group 'g7' is 1.0"),
        (lambda: CompressionPolicy(pruning={"g7": -0.1}), "REMOVED|removed"),
        (lambda: CompressionPolicy(pruning={"g7": float("nan")}), "is nan"),
    ],
)
def test_values_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "Policy version 2 cannot be read; this release reads 1"),
        ({"version": None}, "Policy version None"),
        ({"pruned": {}}, "Unknown key 'pruned' in a policy. Did you mean 'pruning'"),
        ({3: {}}, "Unknown key 3"),
        ({"pruning": {"g": "half"}}, "cannot be read"),
        ({"pruning": ["g"]}, "cannot be read"),
        ({"layers": {"a": {"bits": 4}}}, "bits"),
        ({"layers": {"a": "int8"}}, "cannot be read"),
        ({"layers": {"a": {"rank_ratio": "half"}}}, "cannot be read"),
        ({"layers": ["a"]}, "cannot be read"),
        ({"removed_blocks": "b1"}, "removed_blocks of a policy is 'b1'"),
        ({"removed_blocks": 3}, "cannot be read"),
        ({"dense_dtype": "fp8"}, "Unknown dense_dtype 'fp8'"),
    ],
)
def test_json_that_is_no_policy(policy: CompressionPolicy, change: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompressionPolicy.from_dict({**policy.to_dict(), **change})


@pytest.mark.parametrize("data", [None, [], "policy"])
def test_json_of_another_kind(data: Any) -> None:
    with pytest.raises(ConfigError, match="mapping"):
        CompressionPolicy.from_dict(data)
