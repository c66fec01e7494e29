"""Which limits a result misses, and by how much, in figures and in words.

A limit that is a ratio is judged by the ratio that was measured interleaved with the baseline. Milliseconds of the same
file differ from one minute to the next, and so does what half of the baseline's are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autocompress import quantities
from autocompress.exploration.constraints import ROUNDING, Constraints
from autocompress.runs.metric import Metric
from autocompress.runs.records import BUSY, QUIET, SHARED, TrialRecord

LATENCY, DROP, SIZE = "latency", "drop", "size"
# Where a latency that is over its limit was measured.
_STATES = {BUSY: " beside a busy processor", SHARED: " on a shared core"}


def limits_of(constraints: Constraints, baseline_ms: float) -> dict[str, float | str | None]:
    """Return the ``constraints`` section of ``summary.json``.

    Args:
        constraints: The run's limits.
        baseline_ms: The baseline's latency in the measurement that the result is judged by.
    """
    latency = constraints.latency
    return {
        # For reading: where the limit is a ratio, that decides.
        "latency_ms": None if latency is None else latency.resolve(baseline_ms),
        "latency_ratio": latency.value if latency is not None and latency.relative else None,
        "max_drop": constraints.max_drop,
        "size_bytes": constraints.size_bytes,
        "latency_state": "quiet" if constraints.quiet else "worst",
    }


def figures_of(record: TrialRecord, constraints: Constraints) -> dict[str, float]:
    """Return what `missed_limits` asks of a record, on validation data."""
    assert record.measurement is not None and record.size_bytes is not None
    return {
        "latency_ms": record.measurement.latency_ms,
        "latency_ratio": record.measurement.ratio,
        "accuracy_drop_pp": 100 * constraints.drop(record),
        "size_bytes": record.size_bytes,
    }


def missed_limits(
    figures: Mapping[str, Any], limits: Mapping[str, Any], judged: TrialRecord | None = None
) -> list[dict[str, Any]]:
    """Return one entry a missed limit: ``limit, reached, allowed, unit`` and ``over``, the excess over the limit.

    Args:
        figures: ``latency_ms, latency_ratio, accuracy_drop_pp, size_bytes`` of the result.
        limits: As `limits_of` gives them.
        judged: The record that was chosen; the upper end of its interval must be within the limit as well.
    """
    found = []
    ends: tuple[float, float] | None = None
    state = QUIET
    if judged is not None and (measured := judged.measurement) is not None:
        ends = measured.ratio_high, measured.high_ms
        if limits.get("latency_state") == QUIET:
            ends = measured.quiet[2], measured.high_ms * measured.quiet[2] / measured.ratio_high
        elif measured.states:
            state = max(measured.states, key=lambda name: measured.states[name][2])
    if limits.get("latency_ratio") is not None:
        upper = None if ends is None else ends[0]
        found.append(_latency(figures["latency_ratio"], limits["latency_ratio"], "x", upper, state))
    elif limits.get("latency_ms") is not None:
        upper = None if ends is None else ends[1]
        found.append(_latency(figures["latency_ms"], limits["latency_ms"], "ms", upper, state))
    most, drop = limits.get("max_drop"), figures["accuracy_drop_pp"] / 100
    if most is not None and drop > most + ROUNDING:
        found.append({"limit": DROP, "reached": drop, "allowed": most, "unit": "fraction", "over": drop - most})
    room = limits.get("size_bytes")
    if room is not None and figures["size_bytes"] > room:
        size = figures["size_bytes"]
        found.append({"limit": SIZE, "reached": size, "allowed": room, "unit": "bytes", "over": size / room - 1})
    return [entry for entry in found if entry]


def _latency(reached: float, allowed: float, unit: str, upper: float | None, state: str) -> dict[str, Any]:
    """Return the entry of a latency; empty when it is within the limit, and the end of its interval, if known, too."""
    entry = {"limit": LATENCY, "reached": reached, "allowed": allowed, "unit": unit, "over": reached / allowed - 1}
    if reached > allowed:
        return entry
    if upper is None or upper <= allowed:
        return {}
    return {**entry, "upper": upper, "over": upper / allowed - 1, "state": state}


def say_missed(missed: Sequence[Mapping[str, Any]], metric: Metric, data: str = "test") -> str:
    """Say every missed limit with the value and the limit; `data` is what the metric was taken on."""
    return "; ".join(_sentence(entry, metric, data) for entry in missed)


def _sentence(entry: Mapping[str, Any], metric: Metric, data: str) -> str:
    reached, allowed = entry["reached"], entry["allowed"]
    if entry["limit"] == DROP:
        return (
            f"{data} {metric.name} is {metric.change(reached)[1:]} below the baseline, {metric.loss(allowed)} allowed"
        )
    if entry["limit"] == SIZE:
        return f"{reached:.0f} bytes are more than the {allowed:.0f} allowed"
    form = _ratio if entry["unit"] == "x" else quantities.format_ms
    if "upper" in entry:
        where = _STATES.get(entry.get("state", QUIET), "")
        return (
            f"latency {form(reached)} may be {form(entry['upper'])}{where} (95% interval), too close to the target of "
            f"{form(allowed)} to be sure of it"
        )
    return f"latency {form(reached)} is {entry['over']:.1%} over the target of {form(allowed)}"


def _ratio(value: float) -> str:
    return f"{value:.3g}x"


def say_alternatives(summary: Mapping[str, Any]) -> str:
    """Say what a run has within the drop alone and within the latency alone, and what stands between them.

    Empty where every limit is met, or where nothing is known of either.

    Args:
        summary: The document of ``summary.json``.
    """
    if (summary.get("best") or {}).get("feasible"):
        return ""
    metric, limits = Metric(summary.get("metric") or "accuracy"), summary.get("constraints") or {}
    near, inside, lowest = (
        summary.get(key) for key in ("fastest_within_drop", "most_accurate_within_latency", "lowest_ratio")
    )
    said = []
    if near is not None:
        said.append(f"Fastest within {metric.loss(limits['max_drop'])}: {_alternative(near, metric)}.")
    elif limits.get("max_drop") is not None and lowest is not None:
        said.append(f"No trial lost {metric.loss(limits['max_drop'])} or less.")
    bound = _bound(limits)
    if inside is not None and bound:
        said.append(f"Most accurate within {bound}: {_alternative(inside, metric)}.")
    elif bound and lowest is not None:
        said.append(f"No trial was surely within {bound}; the fastest took {lowest:.3g}x.")
    if near is not None and near.get("slowest_layers") and _misses_latency(near, limits):
        layers, share = list(near["slowest_layers"]), sum(near["slowest_layers"].values())
        said.append(f"In the way: {', '.join(layers)} take{'s' if len(layers) == 1 else ''} {share:.0%} of its time.")
    return " ".join(said)


def _alternative(found: Mapping[str, Any], metric: Metric) -> str:
    return (
        f"trial {found['trial']}, {found['latency_ratio']:.3g}x, validation {metric.name} "
        f"{metric.value(found['accuracy'])} ({metric.change(found['drop'])})"
    )


def _bound(limits: Mapping[str, Any]) -> str:
    """Return the bounds of latency and size in words; empty for none."""
    parts = []
    if limits.get("latency_ratio") is not None:
        parts.append(_ratio(limits["latency_ratio"]))
    elif limits.get("latency_ms") is not None:
        parts.append(quantities.format_ms(limits["latency_ms"]))
    if limits.get("size_bytes") is not None:
        parts.append(quantities.format_bytes(limits["size_bytes"]))
    return " and ".join(parts)


def _misses_latency(found: Mapping[str, Any], limits: Mapping[str, Any]) -> bool:
    """Whether an alternative is over a ratio limit; one in ms is not judged by another minute's ratio."""
    limit = limits.get("latency_ratio")
    return limit is not None and found["latency_ratio"] > limit
