"""Missed limits in figures and in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autocompress.config import RunConfig
from autocompress.exploration.constraints import Constraints
from autocompress.exploration.missed_limits import figures_of, limits_of, missed_limits, say_alternatives, say_missed
from autocompress.runs.metric import Metric
from tests.exploration.conftest import BASELINE, make_measurement, record


def limits(**changes: str) -> dict[str, float | str | None]:
    return limits_of(Constraints.of(RunConfig.model_validate(changes), BASELINE), 10.0)


FIGURES = {"latency_ms": 4.0, "latency_ratio": 0.4, "accuracy_drop_pp": 0.5, "size_bytes": 90}


def test_limits_are_those_of_the_summary() -> None:
    assert limits(target_latency="0.5x", max_drop="1pp", max_size="100B") == {
        "latency_ms": 5.0, "latency_ratio": 0.5, "max_drop": 0.01, "size_bytes": 100.0,
        "latency_state": "worst",
    }  # fmt: skip
    assert limits(target_latency="7ms")["latency_ratio"] is None and limits(target_latency="7ms")["latency_ms"] == 7


@pytest.mark.parametrize(
    ("given", "figures", "said"),
    [
        ({"target_latency": "0.5x"}, {"latency_ratio": 0.52, "latency_ms": 1.0}, "latency 0.52x is 4.0% over the"),
        ({"target_latency": "5ms"}, {"latency_ms": 6.0, "latency_ratio": 0.1}, "latency 6 ms is 20.0% over the target"),
        ({"max_drop": "0.4pp"}, {}, "test accuracy is 0.50 pp below the baseline, 0.4 pp allowed"),
        ({"max_size": "80B"}, {}, "90 bytes are more than the 80 allowed"),
    ],
)
def test_every_missed_limit_is_told_with_value_and_limit(
    given: dict[str, str], figures: dict[str, float], said: str
) -> None:
    (entry,) = missed_limits({**FIGURES, **figures}, limits(**given))
    assert said in say_missed([entry], Metric()) and entry["over"] > 0
    assert missed_limits(FIGURES, limits(**{key: "50pp" if "drop" in key else "0.9x" for key in given})) == []


def test_a_drop_of_exactly_the_limit_is_met() -> None:
    assert missed_limits({**FIGURES, "accuracy_drop_pp": 100 * (0.95 - 0.94)}, limits(max_drop="1pp")) == []


def test_the_upper_end_of_the_interval_counts_too() -> None:
    chosen = record(1, 0.9, 5, measurement=replace(make_measurement(5.6), ratio_high=0.51, high_ms=5.9))
    (entry,) = missed_limits(FIGURES, limits(target_latency="0.5x"), chosen)
    said = say_missed([entry], Metric())
    assert said == "latency 0.4x may be 0.51x (95% interval), too close to the target of 0.5x to be sure of it"
    assert missed_limits(FIGURES, limits(target_latency="0.52x"), chosen) == []


def test_the_least_favourable_state_decides_unless_the_user_says_otherwise() -> None:
    states = {"quiet": (0.4, 0.39, 0.41), "busy": (0.5, 0.48, 0.52)}
    measured = replace(make_measurement(4.0), ratio=0.4, ratio_low=0.39, ratio_high=0.52, states=states)
    chosen = record(1, 0.9, 5, measurement=measured)
    (entry,) = missed_limits(FIGURES, limits(target_latency="0.5x"), chosen)
    assert "latency 0.4x may be 0.52x beside a busy processor (95% interval)" in say_missed([entry], Metric())
    assert missed_limits(FIGURES, limits(target_latency="0.5x", latency_state="quiet"), chosen) == []


def test_a_record_is_judged_on_validation_data() -> None:
    constraints = Constraints.of(RunConfig(max_drop="1pp"), BASELINE)
    found = missed_limits(figures_of(record(1, 0.93, 5), constraints), limits(max_drop="1pp"))
    assert say_missed(found, Metric("cosine"), "validation") == (
        "validation cosine is 0.0200 below the baseline, 0.01 allowed"
    )


def summary(**changes: Any) -> dict[str, Any]:
    one = {"trial": 4, "latency_ratio": 0.7, "accuracy": 0.945, "drop": 0.005, "slowest_layers": {"fc": 0.4}}
    other = {"trial": 9, "latency_ratio": 0.48, "accuracy": 0.9, "drop": 0.05, "slowest_layers": {"fc": 0.4}}
    found = {
        "best": {"feasible": False}, "constraints": limits(target_latency="0.5x", max_drop="1pp"),
        "fastest_within_drop": one, "most_accurate_within_latency": other, "lowest_ratio": 0.3,
    }  # fmt: skip
    return {**found, **changes}


def test_both_answers_and_what_stands_between_them() -> None:
    assert say_alternatives(summary()) == (
        "Fastest within 1 pp: trial 4, 0.7x, validation accuracy 94.50% (−0.50 pp). "
        "Most accurate within 0.5x: trial 9, 0.48x, validation accuracy 90.00% (−5.00 pp). "
        "In the way: fc takes 40% of its time."
    )
    said = say_alternatives(summary(fastest_within_drop=None, most_accurate_within_latency=None))
    assert said == "No trial lost 1 pp or less. No trial was surely within 0.5x; the fastest took 0.3x."
    assert say_alternatives(summary(best={"feasible": True})) == ""
    # Nothing was measured: nothing is claimed. Summaries of old releases say nothing of it.
    assert (
        say_alternatives(summary(fastest_within_drop=None, most_accurate_within_latency=None, lowest_ratio=None)) == ""
    )
    assert say_alternatives({"best": {"feasible": False}}) == ""
