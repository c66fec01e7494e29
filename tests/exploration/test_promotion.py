"""Promotion: fine-tuning goes where the front gains most for its seconds."""

from __future__ import annotations

import pytest

from autocompress.exploration.promotion import Promotion
from tests.exploration.conftest import BASELINE, record

# Accuracies over the baseline's 0.95; latencies over its 11.5 ms, multiply-accumulates over its 1000.
CHEAP = record(1, 0.50, 2.0)
MIDDLE = record(2, 0.80, 4.0)
DEAR = record(3, 0.94, 10.0)


def test_what_gains_most_goes_first() -> None:
    # Fine-tuned, CHEAP dominates most.
    promotion = Promotion(BASELINE, [CHEAP, MIDDLE, DEAR])
    assert promotion.next([DEAR, MIDDLE, CHEAP]) is CHEAP
    promotion.learn(CHEAP, record(1, 0.93, 2.0, stage="recovered"))
    # Now CHEAP is better than MIDDLE can be expected to become; the little that DEAR adds is more than nothing.
    assert promotion.next([MIDDLE, DEAR]) is DEAR


def test_seconds_count() -> None:
    # Alike but for what an epoch takes.
    slow, quick = record(1, 0.6, 4.0, macs=4000), record(2, 0.6, 4.0, macs=500)
    assert Promotion(BASELINE, [slow, quick]).next([slow, quick]) is quick


@pytest.mark.parametrize(("after", "closed"), [(0.95, 0.85), (0.75, 0.6), (0.40, 0.35), (0.99, 0.85)])
def test_the_share_of_the_gap_is_learned(after: float, closed: float) -> None:
    promotion = Promotion(BASELINE, [])
    assert promotion.closed == pytest.approx(0.7)
    promotion.learn(record(1, 0.55, 3.0), record(1, after, 3.0))
    assert promotion.closed == pytest.approx(closed)


def test_what_gets_no_better_leaves_the_front_where_it_is() -> None:
    promotion = Promotion(BASELINE, [CHEAP, MIDDLE])
    for _ in range(30):
        promotion.learn(MIDDLE, MIDDLE)
    # Nothing closes any gap: no candidate gains, and the first of equals is taken.
    assert promotion.closed < 0.03
    assert promotion.next([DEAR, CHEAP]) is DEAR
