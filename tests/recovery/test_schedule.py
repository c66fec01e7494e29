"""Pruning schedules, by their formulas."""

from __future__ import annotations

import pytest

from autocompress.errors import ConfigError
from autocompress.recovery.schedule import SCHEDULES, cumulative_ratios


def test_one_shot_has_one_step() -> None:
    assert cumulative_ratios("one_shot", 0.7, 5) == (0.7,)


def test_iterative_takes_the_same_share_of_what_is_left() -> None:
    found = cumulative_ratios("iterative", 0.875, 3)
    assert found == pytest.approx((0.5, 0.75, 0.875))


def test_gradual_is_the_cubic_of_zhu_and_gupta() -> None:
    # s_f (1 - (1 - t)^3) at t = 1/4, 1/2, 3/4, 1
    assert cumulative_ratios("gradual", 0.64, 4) == pytest.approx((0.37, 0.56, 0.63, 0.64))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_ends_where_it_should(schedule: str) -> None:
    for steps in (1, 2, 7):
        found = cumulative_ratios(schedule, 0.3, steps)
        assert found[-1] == 0.3
        assert list(found) == sorted(set(found))


@pytest.mark.parametrize(
    ("schedule", "ratio", "steps", "said"),
    [
        ("cubic", 0.5, 3, "Unknown pruning schedule 'cubic'.*gradual"),
        ("gradual", 0.0, 3, "to 0.0 is not possible"),
        ("gradual", 1.0, 3, "to 1.0 is not possible"),
        ("gradual", 0.5, 0, "of 0 steps"),
    ],
)
def test_bad_values(schedule: str, ratio: float, steps: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cumulative_ratios(schedule, ratio, steps)
