"""The figures of a latency table: latency against channels, and predicted against measured (plotly)."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import Any

from autocompress import quantities
from autocompress._optional import optional
from autocompress.prediction.table_rows import LayerRow, NetworkRow
from autocompress.report.figure import GRID, LIMIT, TEXT

BAND = 0.10
_DTYPES = {"fp32": "#8b95a7", "fp16": "#12a594", "bf16": "#4c6ef5", "int8": "#f08c00"}
_OTHER = "#c2255c"
_NETWORKS = ("#4c6ef5", "#f08c00", "#12a594", "#c2255c", "#7950f2", "#8b95a7")
_AXIS = {"gridcolor": GRID, "zeroline": False, "ticks": "outside", "tickcolor": GRID, "linecolor": GRID}
_ACROSS = 3
_ROW_PX, _MARGIN_PX = 250, 96


@dataclass(frozen=True)
class Predicted:
    """A held-out network beside what was predicted of it, in ms at the network's usual baseline.

    Attributes:
        row: As measured.
        measured_ms: Its ratio times the median baseline of its network, so that drift between runs is out of it.
        predicted_ms, low_ms, high_ms: The prediction and its interval, likewise.
    """

    row: NetworkRow
    measured_ms: float
    predicted_ms: float
    low_ms: float
    high_ms: float

    @property
    def error(self) -> float:
        """Relative error of the prediction; positive is too slow."""
        return self.predicted_ms / self.measured_ms - 1


@dataclass(frozen=True)
class Point:
    """All rows of one layer shape, dtype and rank, drawn as one."""

    in_channels: int
    out_channels: int
    ranks: tuple[int, ...]
    dtype: str
    time_ms: float
    rows: tuple[LayerRow, ...]


def predicted_figure(predicted: Sequence[Predicted]) -> Any:
    """Return a `plotly.graph_objects.Figure` of predicted against measured latency, both logarithmic, in ms.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    go = optional("plotly.graph_objects", "report", "The report")
    figure = go.Figure()
    values = [v for p in predicted for v in (p.measured_ms, p.predicted_ms)]
    low, high = min(values) / 1.2, max(values) * 1.2
    ends = [low, high]
    band = [v * (1 + BAND) for v in ends] + [v * (1 - BAND) for v in reversed(ends)]
    figure.add_trace(
        go.Scatter(
            x=[*ends, *reversed(ends)], y=band, fill="toself", mode="none", hoverinfo="skip",
            fillcolor="rgba(47, 158, 68, 0.12)", name=f"±{BAND:.0%}",
        )
    )  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=ends, y=ends, mode="lines", hoverinfo="skip", showlegend=False,
            line={"color": "#2f9e44", "width": 1, "dash": "dot"},
        )
    )  # fmt: skip
    networks = list(dict.fromkeys(p.row.network for p in predicted))
    for number, network in enumerate(networks):
        own = [p for p in predicted if p.row.network == network]
        colour = _NETWORKS[number % len(_NETWORKS)]
        far = [abs(p.error) > BAND for p in own]
        figure.add_trace(
            go.Scatter(
                x=[p.measured_ms for p in own], y=[p.predicted_ms for p in own], mode="markers",
                name=escape(own[0].row.name), text=[_predicted_hover(p) for p in own],
                hovertemplate="%{text}<extra></extra>",
                error_y={
                    "type": "data", "symmetric": False, "thickness": 1, "width": 0,
                    "array": [max(0.0, p.high_ms - p.predicted_ms) for p in own],
                    "arrayminus": [max(0.0, p.predicted_ms - p.low_ms) for p in own],
                },
                marker={
                    "size": 8, "color": colour, "opacity": 0.85,
                    "line": {"color": [LIMIT if f else "rgba(0,0,0,0)" for f in far], "width": 2},
                },
            )
        )  # fmt: skip
    # Plotly takes the ends of a logarithmic axis as powers of ten.
    axis = {**_AXIS, "type": "log", "range": [math.log10(low), math.log10(high)], "ticksuffix": " "}
    _lay_out(figure, 520, top=44)
    figure.update_xaxes(**axis, title={"text": "measured (ms)", "font": {"size": 13}})
    figure.update_yaxes(**axis, title={"text": "predicted (ms)", "font": {"size": 13}, "standoff": 10})
    return figure


def _predicted_hover(predicted: Predicted) -> str:
    row = predicted.row
    lines = [
        f"<b>{escape(row.name)}</b>{', noisy' if row.noisy else ''}",
        f"measured {quantities.format_ms(predicted.measured_ms)} ({row.ratio:.3f}x of the baseline)",
        f"predicted {quantities.format_ms(predicted.predicted_ms)}, {predicted.error:+.1%} "
        f"(95% {quantities.format_ms(predicted.low_ms)} to {quantities.format_ms(predicted.high_ms)})",
        escape(row.policy.describe()),
    ]
    return "<br>".join(lines)


# -- latency against channels -----------------------------------------------------------------------------------------

Panels = Mapping[tuple[str, int], Sequence[Point]]


def panels(layers: Iterable[LayerRow], baselines_ms: Mapping[str, float]) -> Panels:
    """Group layers of one op by kernel and output positions, rows of the same shape merged to their median.

    Args:
        layers: Of any number of networks.
        baselines_ms: Usual latency of each uncompressed network; times are put in relation to it, so that drift
            between runs is out of them. Those of other networks stay as they are.
    """

    def time_ms(row: LayerRow) -> float:
        return row.time_ms * baselines_ms.get(row.network, row.baseline_ms) / row.baseline_ms

    shapes: dict[tuple[str, int], dict[tuple[int, int, tuple[int, ...], str], list[LayerRow]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in layers:
        key = (row.in_channels, row.out_channels, row.ranks, row.dtype)
        shapes[row.kernel, row.positions][key].append(row)
    return {
        panel: [Point(*key, median(map(time_ms, rows)), tuple(rows)) for key, rows in sorted(found.items())]
        # Smaller kernels first, then the earlier, larger maps.
        for panel, found in sorted(shapes.items(), key=lambda item: (item[0][0], -item[0][1]))
    }


def staircase_figure(found: Panels) -> Any:
    """Return a `plotly.graph_objects.Figure` of latency (ms) against output channels, one panel a kernel and map size.

    ``customdata`` of every trace holds input channels, so that the page can divide by them.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    go = optional("plotly.graph_objects", "report", "The report")
    subplots = optional("plotly.subplots", "report", "The report")
    down = -(-len(found) // _ACROSS)
    height = staircase_height(found)
    # No axes where there is no panel: Plotly's update fails on them.
    cells: list[list[dict[str, Any] | None]] = [
        [{} if row * _ACROSS + column < len(found) else None for column in range(_ACROSS)] for row in range(down)
    ]
    figure = subplots.make_subplots(
        rows=down, cols=_ACROSS, subplot_titles=[_panel_title(*panel) for panel in found], horizontal_spacing=0.075,
        specs=cells,
        vertical_spacing=min(1.0, 74 / (height - _MARGIN_PX)) if down > 1 else 0.0,
    )  # fmt: skip
    shown: set[tuple[str, bool]] = set()
    for number, points in enumerate(found.values()):
        place = {"row": number // _ACROSS + 1, "col": number % _ACROSS + 1}
        for dtype in sorted({p.dtype for p in points}, key=lambda d: (*_DTYPES, d).index(d)):
            for factorized in (False, True):
                own = [p for p in points if p.dtype == dtype and bool(p.ranks) == factorized]
                if not own:
                    continue
                name = f"{dtype}, low rank" if factorized else dtype
                key = (dtype, factorized)
                for style in _styles(own, _DTYPES.get(dtype, _OTHER), factorized=factorized):
                    legend = style["mode"] == "markers" and key not in shown
                    figure.add_trace(go.Scatter(**style, name=name, legendgroup=name, showlegend=legend), **place)
                shown.add(key)
    _lay_out(figure, height, top=72)
    figure.update_annotations(font={"size": 12.5, "color": TEXT})
    figure.update_xaxes(**_AXIS, rangemode="tozero", nticks=6)
    figure.update_yaxes(**_AXIS, rangemode="tozero", nticks=5, ticksuffix=" ")
    for number in range(len(found)):
        if number + _ACROSS >= len(found):
            place = {"row": number // _ACROSS + 1, "col": number % _ACROSS + 1}
            figure.update_xaxes(title={"text": "output channels", "font": {"size": 12}}, **place)
    figure.update_yaxes(title={"text": "ms", "font": {"size": 12}, "standoff": 8}, col=1)
    return figure


def staircase_height(found: Panels) -> int:
    """Return the figure's height in pixels."""
    return -(-len(found) // _ACROSS) * _ROW_PX + _MARGIN_PX


def _styles(points: Sequence[Point], colour: str, *, factorized: bool) -> Iterable[dict[str, Any]]:
    usual, _ = Counter(p.in_channels for p in points).most_common(1)[0]
    line = [p for p in points if p.in_channels == usual]
    if not factorized and len(line) > 1:
        yield {
            **_coordinates(line), "mode": "lines", "hoverinfo": "skip", "opacity": 0.6,
            "line": {"color": colour, "width": 1.5},
        }  # fmt: skip
    yield {
        **_coordinates(points), "mode": "markers", "text": [_layer_hover(p) for p in points],
        "hovertemplate": "%{text}<extra></extra>", "opacity": 0.85,
        "marker": {"size": 6, "color": colour, "symbol": "diamond-open" if factorized else "circle"},
    }  # fmt: skip


def _coordinates(points: Sequence[Point]) -> dict[str, Any]:
    return {
        "x": [p.out_channels for p in points],
        "y": [p.time_ms for p in points],
        "customdata": [p.in_channels for p in points],
    }


def _panel_title(kernel: str, positions: int) -> str:
    side = math.isqrt(positions)
    where = f"{positions} position{'s' * (positions > 1)}"
    if side > 1 and side * side == positions:
        where = f"{side}×{side} outputs"
    return f"{kernel.replace('x', '×')}, {where}" if kernel else where


def _layer_hover(point: Point) -> str:
    first = point.rows[0]
    layers = list(dict.fromkeys(f"{row.name}: {row.layer}" for row in point.rows))
    lines = [
        f"<b>{point.in_channels} → {point.out_channels} channels, {escape(point.dtype)}</b>",
        f"{quantities.format_ms(point.time_ms)}, {len(point.rows)} row{'s' * (len(point.rows) > 1)}",
        *([f"rank {'×'.join(map(str, point.ranks))}"] if point.ranks else []),
        f"{first.macs / 1e6:.3g} M MACs",
        *map(escape, layers[:3]),
    ]
    return "<br>".join(lines + ([f"and {len(layers) - 3} more"] if len(layers) > 3 else []))


def _lay_out(figure: Any, height: int, *, top: int) -> None:
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 72, "r": 18, "t": top, "b": 58},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12.5, "color": TEXT},
        legend={
            "orientation": "h", "yref": "container", "y": 1, "yanchor": "top", "x": 0, "itemsizing": "constant",
            "font": {"size": 13},
        },
        hoverlabel={"align": "left", "font": {"size": 13}},
        hovermode="closest",
    )  # fmt: skip
