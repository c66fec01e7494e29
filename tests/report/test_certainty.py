"""How sure a ratio is, in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autocompress.report.certainty import certainty, held, of_measurement, other_states
from autocompress.runs.records import Figures, Occasion
from tests.report.conftest import measurement

QUIET = (0.39, 0.38, 0.40)


@pytest.mark.parametrize(
    ("best", "said"),
    [
        ({}, ""),
        ({"latency_ratio_interval": [0.38, 0.4]}, "0.380 to 0.400x"),  # of an older release
        (
            {"latency_ratio_interval": [0.38, 0.4], "latency_occasions": 1, "latency_span_s": 0.0},
            "0.380 to 0.400x, over 1 occasion",
        ),
        (
            {
                "latency_ratio_interval": [0.38, 0.5], "latency_occasions": 9, "latency_span_s": 92.4,
                "latency_states": {"quiet": QUIET, "busy": (0.48, 0.46, 0.5)},
            },
            "0.380 to 0.500x, over 9 occasions in 1m 32s; 0.480x beside a busy processor",
        ),
    ],
)  # fmt: skip
def test_certainty(best: dict[str, object], said: str) -> None:
    assert certainty(best) == said


def test_a_measurement_says_the_same() -> None:
    moments = tuple(Occasion(at, {"quiet": Figures(0.4, 1.0, 0.4)}) for at in (0.0, 60.0))
    measured = replace(
        measurement(1.0, 0.4), expected_low=0.38, expected_high=0.5, occasions=moments, states={"quiet": QUIET}
    )
    assert of_measurement(measured) == "0.380 to 0.500x, over 2 occasions in 1m 00s"


def test_states_that_differ_little_are_not_told_of() -> None:
    assert other_states({}) == other_states({"quiet": QUIET}) == other_states({"quiet": QUIET, "busy": QUIET}) == ""
    both = other_states({"quiet": QUIET, "busy": (0.5, 0, 1), "shared": (0.6, 0, 1)})
    assert both == "0.500x beside a busy processor, 0.600x on a shared core"
    assert other_states({"shared": (0.6, 0, 1), "busy": (0.5, 0, 1)}) == "0.500x beside a busy processor"


def test_what_was_stated_holds_or_does_not() -> None:
    stated = replace(measurement(1.0, 0.4), expected_low=0.38, expected_high=0.5)
    assert held(stated, measurement(1.0, 0.49)) == "stated 0.400x (0.380 to 0.500): holds here"
    assert held(stated, measurement(1.0, 0.51)).endswith("does NOT hold here")
