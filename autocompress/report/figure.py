"""The Pareto figure: every measured candidate, the front, the baseline, the limits and the result (plotly)."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from autocompress import quantities
from autocompress._optional import optional
from autocompress.report.run_view import Point, RunView

PROXY, RECOVERED, BASELINE, BEST = "#8b95a7", "#3b5bdb", "#16181d", "#f08c00"
LIMIT, FEASIBLE = "#e03131", "rgba(47, 158, 68, 0.09)"
# Mid-greys that read on white and on near-black, so the page needs to recolour only the hover label and baseline.
TEXT, GRID = "#7b8494", "rgba(128, 136, 150, 0.18)"


def pareto_figure(view: RunView) -> Any:
    """Return a `plotly.graph_objects.Figure` of the validation metric (% for shares) against measured latency (ms).

    The axes start at the part that matters (front, baseline, limits); ``layout.meta.everything`` holds the ranges that
    show all points.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    go = optional("plotly.graph_objects", "report", "The report")
    figure = go.Figure()
    for stage, label, colour in (
        ("proxy", "proxy, not fine-tuned", PROXY),
        ("recovered", "recovered (fine-tuned)", RECOVERED),
    ):
        points = [p for p in view.points if (p.record.stage == "recovered") == (stage == "recovered")]
        symbol = "circle" if stage == "recovered" else "circle-open"
        marker = {"symbol": symbol, "size": 9, "color": colour, "opacity": 0.9 if stage == "recovered" else 0.6}
        if points:
            figure.add_trace(_scatter(go, points, view, name=label, mode="markers", marker=marker))
    if seen := _rejected(view):
        marker = {"symbol": "x-thin", "size": 7, "color": PROXY, "opacity": 0.6, "line": {"width": 1.2, "color": PROXY}}
        x, y, text = zip(*seen, strict=True)
        figure.add_trace(
            go.Scatter(
                x=x, y=y, text=text, name="not built: latency predicted", mode="markers", marker=marker,
                hovertemplate="%{text}<extra></extra>",
            )
        )  # fmt: skip
    if view.front:
        figure.add_trace(
            _scatter(
                go, view.front, view, name="Pareto front", mode="lines", hoverinfo="skip", hovertemplate=None,
                line={"shape": "hv", "color": RECOVERED, "width": 2},
            )
        )  # fmt: skip
    if view.baseline is not None:
        marker = {"symbol": "diamond", "size": 14, "color": BASELINE, "line": {"width": 1.5, "color": "white"}}
        label = f"baseline ({view.baseline.record.policy.dense_dtype}, uncompressed)"
        figure.add_trace(_scatter(go, [view.baseline], view, name=label, mode="markers", marker=marker))
    if view.best is not None:
        marker = {"symbol": "star", "size": 20, "color": BEST, "line": {"width": 1.5, "color": "white"}}
        figure.add_trace(_scatter(go, [view.best], view, name="result", mode="markers", marker=marker))
    focus, everything = _ranges(view)
    _limits(figure, view, focus)
    axis = {"gridcolor": GRID, "zeroline": False, "ticks": "outside", "tickcolor": GRID, "linecolor": GRID}
    figure.update_layout(
        template="none",
        height=480,
        margin={"l": 72, "r": 18, "t": 44, "b": 56},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": TEXT},
        xaxis={
            **axis,
            "title": {
                "text": f"latency (ms): {'predicted' if view.predicted else 'measured'} ratio x baseline",
                "font": {"size": 13},
            },
            "range": focus[0],
        },
        yaxis={
            **axis,
            "title": {"text": f"validation {view.metric.axis}", "font": {"size": 13}},
            "range": focus[1],
            "ticksuffix": " ",
        },
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "itemsizing": "constant"},
        hoverlabel={"align": "left", "font": {"size": 13}},
        hovermode="closest",
        meta={"focus": focus, "everything": everything},
    )
    return figure


def outside(view: RunView) -> int:
    """Return how many measured candidates lie outside the figure's first axis ranges."""
    (x0, x1), (y0, y1) = _ranges(view)[0]
    return sum(not (x0 <= view.latency_ms(p) <= x1 and y0 <= view.metric.scale * p.accuracy <= y1) for p in view.points)


def _scatter(go: Any, points: Sequence[Point], view: RunView, **style: Any) -> Any:
    style.setdefault("hovertemplate", "%{text}<extra></extra>")
    return go.Scatter(
        x=[view.latency_ms(p) for p in points],
        y=[view.metric.scale * p.accuracy for p in points],
        text=[_hover(p, view) for p in points],
        **style,
    )


def _rejected(view: RunView) -> list[tuple[float, float, str]]:
    """Return predicted latency (ms), the metric at first sight, and a hover text of what was not built for these."""
    whole, found = view.baseline_ms, []
    for record in view.rejected if whole is not None else ():
        if record.accuracy is not None and record.predicted_ratio is not None and whole is not None:
            latency = record.predicted_ratio * whole
            text = [
                f"<b>trial {record.number}, not built</b>",
                f"{quantities.format_ms(latency)} PREDICTED, {record.predicted_ratio:.2f}x of the baseline",
                f"{escape(view.metric.name)} {view.metric.value(record.accuracy)} on the first validation samples",
                escape(record.policy.describe()),
            ]
            found.append((latency, view.metric.scale * record.accuracy, "<br>".join(text)))
    return found


def _hover(point: Point, view: RunView) -> str:
    record, measured = point.record, point.measurement
    name = "baseline" if point is view.baseline else f"trial {record.number}, {record.stage}"
    drop = view.drop(point)
    lost = "" if drop is None or point is view.baseline else f" ({view.metric.change(drop)})"
    lines = [
        f"<b>{escape(name)}</b>",
        f"{quantities.format_ms(view.latency_ms(point))}, {measured.ratio:.2f}x of the baseline",
        f"validation {escape(view.metric.name)} {view.metric.value(point.accuracy)}{lost}",
        escape(record.policy.describe()),
    ]
    if record.size_bytes is not None:
        macs = view.macs_ratio(point)
        lines.insert(
            3, quantities.format_bytes(record.size_bytes) + (f", {macs:.2f}x MACs" if macs is not None else "")
        )
    return "<br>".join(lines)


Ranges = tuple[list[float], list[float]]


def _ranges(view: RunView) -> tuple[Ranges, Ranges]:
    """Return the (latency, metric) ranges of the interesting part, and of everything."""
    shown = [p for p in (*view.front, view.baseline, view.best) if p is not None]
    shown += [p for p in view.points if p.record.stage == "recovered"]
    floor = _accuracy_floor(view)
    if floor is not None:
        # Unrecovered candidates far below the limit would flatten what is being decided into one line.
        kept = [p for p in shown if p.accuracy > floor - 0.1]
        shown = kept or shown
    focus = _range(shown, view, floor)
    everything = _range([*shown, *view.points], view, floor, _rejected(view))
    return focus, everything


def _range(
    points: Sequence[Point], view: RunView, floor: float | None, rejected: Sequence[tuple[float, float, str]] = ()
) -> Ranges:
    xs = [view.latency_ms(p) for p in points] + [v for v in (view.latency_limit_ms,) if v is not None]
    scale = view.metric.scale
    ys = [scale * p.accuracy for p in points] + [scale * v for v in (floor,) if v is not None]
    xs, ys = [*xs, *(x for x, _, _ in rejected)], [*ys, *(y for _, y, _ in rejected)]
    return _padded(xs or [0.0, 1.0], lowest=0.0), _padded(ys or [0.0, scale])


def _padded(values: Sequence[float], lowest: float | None = None) -> list[float]:
    low, high = min(values), max(values)
    margin = 0.09 * (high - low) or max(0.05 * abs(high), 1e-3)
    start = low - margin
    return [start if lowest is None else max(lowest, start), high + margin]


def _accuracy_floor(view: RunView) -> float | None:
    if view.drop_limit is None or view.baseline is None:
        return None
    return view.baseline.accuracy - view.drop_limit


def _limits(figure: Any, view: RunView, focus: Ranges) -> None:
    """Draw the latency limit, the accuracy limit and the region that meets both."""
    limit, floor, scale = view.latency_limit_ms, _accuracy_floor(view), view.metric.scale
    if limit is None and floor is None:
        return
    figure.add_shape(
        type="rect", layer="below", line_width=0, fillcolor=FEASIBLE,
        x0=0, x1=limit if limit is not None else 1e3 * focus[0][1],
        y0=scale * floor if floor is not None else -scale, y1=2 * scale,
    )  # fmt: skip
    note = {"showarrow": False, "font": {"color": LIMIT, "size": 12}}
    if limit is not None:
        figure.add_vline(x=limit, line={"dash": "dash", "color": LIMIT, "width": 1.5})
        figure.add_annotation(
            x=limit, y=0, yref="paper", xanchor="left", yanchor="bottom", xshift=5, **note,
            text=f"target {quantities.format_ms(limit)}",
        )  # fmt: skip
    if floor is not None:
        figure.add_hline(y=scale * floor, line={"dash": "dot", "color": LIMIT, "width": 1})
        figure.add_annotation(
            x=1, xref="paper", y=scale * floor, xanchor="right", yanchor="top", **note,
            text=f"allowed drop {view.metric.loss(view.drop_limit or 0)}",
        )  # fmt: skip
