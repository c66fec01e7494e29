"""Reasons for a policy, by hand."""

from __future__ import annotations

import pytest

from autocompress.exploration.explain import explain
from autocompress.policy import CompressionPolicy
from tests.exploration.test_additive_costs import additive
from tests.prediction.made_up import SPACE

CHOICES = {"prune/c0": 0.5, "dtype/c1": "int8", "block/b": "remove", "dtype/c3": "int8"}
LOSSES = {"prune/c0": {0.0: 0.0, 0.25: 0.1, 0.5: 0.4}, "dtype/c1": {"dense": 0.0, "int8": 0.01}}


def latency_ms(policy: CompressionPolicy) -> float:
    return 10 * additive(policy)


def test_every_choice_that_does_something_has_a_reason() -> None:
    found = explain(CHOICES, SPACE, latency_ms, LOSSES)  # type: ignore[arg-type]
    # Of the removed block's layer nothing is left to choose.
    assert [reason.parameter for reason in found] == ["block/b", "prune/c0", "dtype/c1"]
    block, prune, dtype = found
    assert block.saved_ms == pytest.approx(1.0 - 0.2) and block.next_choice == "keep" and block.loss is None
    assert (prune.choice, prune.saved_ms, prune.loss) == (0.5, pytest.approx(0.4), 0.4)
    assert (prune.next_choice, prune.next_ms, prune.next_loss) == (0.25, pytest.approx(0.2), 0.1)
    assert (dtype.saved_ms, dtype.next_choice, dtype.next_ms) == (pytest.approx(0.2), "dense", pytest.approx(0.2))


def test_what_is_not_known_is_none() -> None:
    (reason,) = explain({"prune/c0": 0.5}, SPACE, None, None)
    assert reason.to_dict() == {
        "parameter": "prune/c0", "choice": 0.5, "saved_ms": None, "loss": None, "next_choice": 0.25, "next_ms": None,
        "next_loss": None, "saved_macs": None, "saved_bytes": None,
    }  # fmt: skip
    assert explain({}, SPACE, latency_ms, None) == []
