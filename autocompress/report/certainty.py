"""How sure a ratio is, in words: its interval, what it is of, and what another state of the machine does to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autocompress import quantities
from autocompress.runs.records import BUSY, QUIET, SHARED, Measurement

# What a ratio is called in a state of the machine, after it.
WHERE = {QUIET: "on the quiet machine", BUSY: "beside a busy processor", SHARED: "on a shared core"}
# States whose ratios differ by less say nothing more.
_APART = 0.02


def certainty(best: Mapping[str, Any]) -> str:
    """Return what ``summary.json`` knows of its result's ratio, such as "0.366 to 0.400x, over 9 occasions in 1m 32s".

    Empty where there is no interval.

    Args:
        best: The summary's ``best``.
    """
    interval = best.get("latency_ratio_interval")
    if not interval:
        return ""
    said = f"{interval[0]:.3f} to {interval[1]:.3f}x"
    if best.get("latency_occasions"):
        said += f", over {occasions(best['latency_occasions'], best.get('latency_span_s', 0.0))}"
    others = other_states(best.get("latency_states") or {})
    return f"{said}; {others}" if others else said


def of_measurement(measured: Measurement) -> str:
    """Return the same of a measurement."""
    return certainty(
        {
            "latency_ratio_interval": [measured.expected_low, measured.expected_high],
            "latency_occasions": len(measured.occasions),
            "latency_span_s": measured.span_s,
            "latency_states": measured.states,
        }
    )


def occasions(count: int, span_s: float) -> str:
    """Return "9 occasions in 1m 32s"."""
    return f"{count} occasion{'' if count == 1 else 's'}" + (
        f" in {quantities.format_duration(span_s)}" if count > 1 else ""
    )


def other_states(states: Mapping[str, Sequence[float]]) -> str:
    """Return the ratios of states that differ from the quiet one, such as "0.592x beside a busy processor"."""
    first = states.get(QUIET) or states.get(SHARED)
    if first is None:
        return ""
    others = {state: found for state, found in states.items() if found is not first}
    return ", ".join(
        f"{found[0]:.3f}x {WHERE[state]}" for state, found in others.items() if abs(found[0] / first[0] - 1) > _APART
    )


def held(stated: Measurement, now: Measurement) -> str:
    """Say whether a ratio that is measured now lies in the interval that was stated."""
    ends = f"{stated.expected_low:.3f} to {stated.expected_high:.3f}"
    return f"stated {stated.ratio:.3f}x ({ends}): {'holds' if stated.expects(now) else 'does NOT hold'} here"
