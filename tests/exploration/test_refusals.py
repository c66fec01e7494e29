"""What refused candidates share is no longer proposed."""

from __future__ import annotations

from autocompress.exploration.refusals import Refusals

NEUTRAL = {"prune/a": 0.0, "dtype/a": "dense", "dtype/b": "dense"}
ERROR = "VerificationError: the engine differs from the torch model: relative error {}, allowed 0.1. Kept at /runs/{}/x"


def test_five_refusals_of_one_kind_that_share_a_choice_ban_it() -> None:
    found = Refusals(NEUTRAL)
    found.finished({"prune/a": 0.5, "dtype/a": "dense", "dtype/b": "int8"})
    told = [
        found.refused(
            {"prune/a": 0.5, "dtype/a": "int8", "dtype/b": "int8" if n % 2 else "dense"}, ERROR.format(n / 7, n)
        )
        for n in range(5)
    ]
    assert told[:4] == [None] * 4
    assert told[4] is not None and "dtype/a=int8 is not proposed any more" in told[4]
    # Pruning by half has been built, and dtype/b is not in all of them.
    assert found.banned == {"dtype/a": {"int8"}}
    assert found.allowed({"prune/a": 0.5, "dtype/a": "int8", "dtype/b": "int8"}) == {
        "prune/a": 0.5, "dtype/a": "dense", "dtype/b": "int8",
    }  # fmt: skip


def test_refusals_of_other_kinds_or_with_nothing_in_common_ban_nothing() -> None:
    found = Refusals(NEUTRAL)
    for n in range(4):
        assert found.refused({**NEUTRAL, "dtype/a": "int8"}, ERROR.format(n, n)) is None
    assert found.refused({**NEUTRAL, "dtype/a": "int8"}, "BuildError: no kernel") is None
    assert found.refused({**NEUTRAL, "dtype/b": "int8"}, ERROR.format(4, 4)) is None
    assert not found.banned


def test_what_has_been_built_is_not_at_fault() -> None:
    found = Refusals(NEUTRAL)
    found.finished({**NEUTRAL, "dtype/a": "int8"})
    assert [found.refused({**NEUTRAL, "dtype/a": "int8"}, "BuildError: no kernel") for _ in range(5)] == [None] * 5
    assert not found.banned
