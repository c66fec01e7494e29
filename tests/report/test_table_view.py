from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from autocompress import _optional
from autocompress.errors import MissingDependencyError
from autocompress.prediction.predictor import PredictionError
from autocompress.prediction.table import LatencyTable
from autocompress.prediction.table_rows import NetworkRow
from autocompress.report.table_figures import Predicted, panels, predicted_figure, staircase_figure
from autocompress.report.table_view import Guess, render, write_table_report
from tests.prediction.tables import layer_row, network_row, profiled, table

RESNET, MOBILE = "aaaa000000000001", "bbbb000000000002"


class _Page(HTMLParser):
    """The page's visible text, and whatever it would load from elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.said, self.loaded, self.ids, self._hidden = "", list[str](), list[str](), 0
        self.feed(page)
        self.said = re.sub(r"\s+", " ", self.said)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("script", "style")
        self.loaded += [v for k, v in attrs if k in ("src", "href") and v]
        self.ids += [v for k, v in attrs if k == "id" and v]

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.said += f" {data}"


@pytest.fixture(scope="module")
def made() -> LatencyTable:
    return profiled(policies=16)


def guesses(found: LatencyTable, off: float = 0.02) -> list[Guess]:
    """Predictions that are too high by `off`, the very first one by 18 %."""
    rows = [row for row in found.networks if row.ok and row.held_out]
    shares = [0.18, *[off] * (len(rows) - 1)]
    return [
        (row, row.ratio * (1 + share), row.ratio * (1 + share) * 0.95, row.ratio * (1 + share) * 1.05)
        for row, share in zip(rows, shares, strict=True)
    ]


def test_the_page_of_a_profiled_table(made: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.html"
    write_table_report(made, path, guesses(made))
    page = _Page(path.read_text())
    assert page.loaded == []
    for part in (
        "Intel(R) Xeon(R) Gold 6338N", "openvino 2026.4.1-22982 · 1 thread · batch 1", "cifar10 resnet20",
        "imagenet mobilenet_v2", "8 held out", "2 unsupported", "Kendall's tau", "7 of 8", "1 outside it, outlined",
        "2 networks that the engine refused", "could not create <a primitive>", "avx512_vnni", "held-out error 4.0%",
        "Depthwise convolutions: latency against channels", "intel-xeon-gold-6338n-8c-012345",
    ):  # fmt: skip
        assert part in page.said, part
    assert "Measured elsewhere" not in page.said
    assert {"predicted", "staircase-conv", "staircase-pointwise", "staircase-depthwise"} <= set(page.ids)
    assert "nan" not in page.said


def test_errors_that_are_given_go_before_those_worked_out(made: LatencyTable) -> None:
    given = {RESNET: PredictionError(40, 0.0123, 0.975, 0.951, 0.93)}
    said = _Page(render(made, guesses(made), given)).said
    # Of the other network four were predicted, each 2 % too high.
    for part in ("1.2%", "98%", "0.951", "93%", "2.0%", "of 44 held-out networks"):
        assert part in said, part


def test_a_table_from_elsewhere_says_so(made: LatencyTable) -> None:
    here = {**made.device, "cpu": "AMD <EPYC>"}
    foreign = LatencyTable(made.device, "openvino", "1", networks=made.networks)
    foreign.check(here, "openvino", "2", 1, 1, allow_foreign=True)
    page = render(foreign)
    said = _Page(page).said
    assert "measured elsewhere" in said and "engine version: 1, here 2" in said and "here AMD <EPYC>" in said
    assert "AMD <EPYC>" not in page


def test_without_predictions_no_error_is_claimed(made: LatencyTable) -> None:
    said = _Page(render(made)).said
    assert "held-out error unknown" in said and "no predictions were made" in said
    assert "Predicted against measured" not in said


def test_a_table_without_layers_or_networks() -> None:
    said = _Page(render(table(network_row()))).said
    assert "no rows of single layers" in said
    said = _Page(render(table())).said
    assert "Nothing has been measured yet" in said and "nothing measured yet" in said
    said = _Page(render(table(NetworkRow.unsupported("a", "refused", network_row().policy, "no", 1)))).said
    assert "1 network that the engine refused" in said and "nan" not in said
    assert "Convolutions: latency" in _Page(render(table(layer_row()))).said


def test_a_noisy_machine_is_pointed_out() -> None:
    rows = [network_row(noisy=number < 2) for number in range(4)]
    assert "2 of 4 networks are noisy" in _Page(render(table(*rows))).said
    assert "networks are noisy" not in _Page(render(table(*rows[1:], network_row()))).said


def test_a_good_error_and_a_poor_one_look_different(made: LatencyTable) -> None:
    good = PredictionError(40, 0.02, 0.975, 0.95, 0.95)
    assert 'class="status good"' in render(made, error={RESNET: good})
    for poor in (PredictionError(40, 0.02, 0.9, 0.95, 0.95), PredictionError(40, 0.05, 1.0, 0.95, 0.95)):
        assert 'class="status warn"' in render(made, error={RESNET: good, MOBILE: poor})


def test_the_figure_of_predictions_marks_what_is_outside_the_band() -> None:
    rows = [network_row(name="a"), network_row(name="b", network="b")]
    points = [Predicted(rows[0], 1.0, 1.05, 1.0, 1.1), Predicted(rows[1], 2.0, 2.3, 2.2, 2.4)]
    figure = predicted_figure(points)
    band, _, first, second = figure.data
    # Above the identity by a tenth at both ends, then below.
    assert [y / x for x, y in zip(band.x, band.y, strict=True)] == pytest.approx([1.1, 1.1, 0.9, 0.9])
    assert (list(first.x), list(first.y), first.error_y.array[0]) == ([1.0], [1.05], pytest.approx(0.05))
    assert first.marker.line.color[0] != second.marker.line.color[0]
    low, high = (10**v for v in figure.layout.xaxis.range)
    assert low < 1.0 and high > 2.3
    assert "+15.0%" in second.text[0]
    json.loads(figure.to_json())


def test_layers_of_one_shape_are_one_point_and_drift_is_out_of_it() -> None:
    rows = [
        layer_row(time_ms=time_ms, baseline_ms=baseline_ms, ranks=())
        for time_ms, baseline_ms in ((0.010, 1.0), (0.024, 2.0), (0.011, 1.0))
    ]
    ((panel, (point,)),) = panels(rows, {RESNET: 1.0}).items()
    assert panel == ("3x3", 256)
    assert (point.in_channels, point.out_channels, point.dtype, len(point.rows)) == (16, 24, "int8", 3)
    assert math.isclose(point.time_ms, 0.011)
    ((_, (raw,)),) = panels(rows[1:2], {}).items()
    assert raw.time_ms == 0.024


def test_panels_have_a_trace_for_each_dtype_and_rank_and_a_line_of_equal_inputs() -> None:
    rows = [
        layer_row(in_channels=ins, out_channels=outs, dtype=dtype, ranks=ranks, positions=positions)
        for ins, outs, dtype, ranks, positions in (
            (16, 24, "int8", (), 256), (16, 8, "int8", (), 256), (32, 16, "int8", (), 256), (16, 8, "bf16", (), 256),
            (16, 8, "bf16", (4, 4), 256), (16, 8, "bf16", (), 250), (16, 8, "int8", (), 1),
        )
    ]  # fmt: skip
    found = panels(rows, {})
    figure = staircase_figure(found)
    assert [note.text for note in figure.layout.annotations] == [
        "3×3, 16×16 outputs", "3×3, 250 positions", "3×3, 1 position",
    ]  # fmt: skip
    first = [trace for trace in figure.data if trace.xaxis == "x"]
    assert [(t.name, t.mode) for t in first] == [
        ("bf16", "markers"), ("bf16, low rank", "markers"), ("int8", "lines"), ("int8", "markers"),
    ]  # fmt: skip
    assert list(first[2].x) == [8, 24] and set(first[2].customdata) == {16}
    assert sorted(first[3].x) == [8, 16, 24]
    # One legend entry for each, whatever the number of panels.
    assert sorted(t.name for t in figure.data if t.showlegend) == ["bf16", "bf16, low rank", "int8"]


def test_panels_that_do_not_fill_a_row_leave_no_axes() -> None:
    figure = staircase_figure(panels([layer_row(positions=n) for n in (1, 4, 9, 16)], {}))
    assert sorted(k for k in figure.layout.to_plotly_json() if k.startswith("yaxis")) == [
        "yaxis", "yaxis2", "yaxis3", "yaxis4",
    ]  # fmt: skip


def test_without_plotly_the_extra_is_named(made: LatencyTable, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(_optional, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=r"autocompress\[report\]"):
        render(made)
