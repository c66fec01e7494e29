"""Networks with habits walk from the door to the engine: some are handled, some named, some refused, none ends raw.

All of them are in ``benchmarks/kinds``; here are those that a mechanism of their own is behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from autocompress.measurement.client import EngineWorker
from benchmarks.kinds.composed import RECIPES, Recipe, outcome
from benchmarks.kinds.networks import EXPECTED, KINDS
from benchmarks.kinds.run import walk

HANDLED = (
    "group norm",
    "instance norm",
    "weight standardized",
    "gate by halves",
    "late fusion",
    "extra state",
    "view of features",
    "called twice",
    "one number a sample",
    "two inputs and two outputs",
    "made in inference mode",
)
# What is left alone, by name, and how many axes of channels can be pruned all the same.
NAMED = {
    "gru": ("rnn", 0),
    "language model": ("q (channels)", 1),
    "transformer encoder": ("body.layers.0.self_attn.out_proj (channels)", 4),
    "backbone without gradients": ("no gradient goes through it", 1),
    "group norm over a concatenation": ("left (channels)", 2),
    "result that nobody reads": ("pooler: its result is not used", 2),
    "token numbers and a mask": ("model.table", 1),
    "deformable convolution": ("", 0),
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def worker() -> Iterator[EngineWorker]:
    pytest.importorskip("openvino")
    with EngineWorker() as running:
        yield running


@pytest.mark.parametrize("kind", HANDLED)
def test_handled(kind: str, worker: EngineWorker, tmp_path: Path) -> None:
    found = walk(kind, worker, tmp_path / "run", train=False)
    assert (found.status, found.said) == ("handled", "")
    assert found.layers >= 2 and found.policies >= 3


@pytest.mark.parametrize("kind", NAMED)
def test_named(kind: str, worker: EngineWorker, tmp_path: Path) -> None:
    words, groups = NAMED[kind]
    found = walk(kind, worker, tmp_path / "run", train=False)
    assert found.status in ("named", *(("refused",) if kind == "deformable convolution" else ()))
    assert words in found.said and found.groups >= groups


@pytest.mark.parametrize("kind", [kind for kind, words in EXPECTED.items() if words.startswith("refused")])
def test_refused(kind: str, worker: EngineWorker, tmp_path: Path) -> None:
    found = walk(kind, worker, tmp_path / "run", train=False)
    assert found.status == "refused"
    assert re.search(EXPECTED[kind].partition(": ")[2], found.said)


def test_every_expectation_is_of_a_kind() -> None:
    assert {*HANDLED, *NAMED, *EXPECTED} <= KINDS.keys()
    assert len(KINDS) >= 70


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RECIPES)
def test_composed_networks_agree_or_are_refused_by_name(worker: EngineWorker, recipe: Recipe) -> None:
    found = outcome(recipe, worker)
    assert found == "agrees" or not found.startswith("Verification")
