from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from autocompress import _optional
from autocompress.api.run import open_run
from autocompress.errors import MissingDependencyError
from autocompress.exploration.pareto import run_front, write_front
from autocompress.files import read_json, write_json
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.report.figure import pareto_figure
from autocompress.report.html import render, write_report
from autocompress.report.run_view import read_run
from autocompress.report.sections import natural, policy_map
from autocompress.runs.directory import RunDirectory
from autocompress.runs.records import TrialRecord


class _Page(HTMLParser):
    """The page's visible text, and whatever it would load from elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.said, self.loaded, self._hidden = "", list[str](), 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("script", "style")
        self.loaded += [v for k, v in attrs if k in ("src", "href") and v]

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.said += f" {data}"


def test_report_of_a_finished_run(finished: RunDirectory) -> None:
    path = write_report(finished)
    assert path == finished.report_file
    page = _Page(path.read_text())
    assert page.loaded == []
    said = re.sub(r"\s+", " ", page.said)
    view = read_run(finished)
    assert view.best is not None
    for part in (
        "resnet20", "cifar10", "limits met, verified", "test accuracy, read once", "91.49% → 91.12%", "−0.37 pp",
        "0.468 ms → 0.281 ms", "validation accuracy", "1 thread", "batch 1", "baseline bf16", "Intel Xeon", "24m 10s",
        "7 candidates failed", "avx512_vnni, amx_bf16", "NVIDIA L4", f"★ {view.best.record.number}",
    ):  # fmt: skip
        assert part in said, part
    assert "[bold]node[/bold]" in said
    assert "<Unsupported" not in path.read_text()


def test_report_of_an_interrupted_run(make_run: Callable[..., RunDirectory]) -> None:
    run = make_run(finished=False)
    said = _Page(write_report(run).read_text()).said
    assert "interrupted" in said
    assert "test data not read yet" in said
    assert "read once" in said  # only the footer, which explains
    assert "sum over the finished trials" in said
    assert "loss of validation accuracy" in said


def test_limits_missed_on_test_data_are_said(finished: RunDirectory) -> None:
    summary = finished.read("summary.json")
    summary["best"]["accuracy_drop_pp"] = 1.4
    finished.write("summary.json", summary)
    said = _Page(render(read_run(finished))).said
    assert "✗ not met" in said
    assert "limits met, verified" not in said


def test_no_feasible_result(finished: RunDirectory) -> None:
    summary = finished.read("summary.json")
    summary["best"]["feasible"] = False
    finished.write("summary.json", summary)
    assert "limits not met" in _Page(render(read_run(finished))).said


def test_no_best(finished: RunDirectory) -> None:
    finished.write("summary.json", {**finished.read("summary.json"), "best": None})
    view = read_run(finished)
    assert view.best is None
    assert "No candidate met every limit" in _Page(render(view)).said


def test_a_layer_pruned_and_factorized_shows_both(finished: RunDirectory) -> None:
    view = read_run(finished)
    assert view.best is not None
    policy = CompressionPolicy("bf16", {"a<b": 0.5}, {"a<b": LayerPolicy("int8", 0.25)}, ("block<1>",))
    best = replace(view.best, record=replace(view.best.record, policy=policy))
    page = policy_map(replace(view, points=(best,), best=best))
    assert "−50%, r 25%" in page
    assert "a&lt;b" in page and "block&lt;1&gt; removed" in page


def test_only_failures(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for number in range(3):
        run.append(TrialRecord(number, CompressionPolicy(), "failed", error=f"BuildError: reason {number}"))
    said = _Page(write_report(run).read_text()).said
    assert "3 candidates failed" in said
    assert "reason 2" in said
    assert "No candidate has been measured" in said


def test_empty_directory_and_damaged_summaries(tmp_path: Path, finished: RunDirectory) -> None:
    assert "No result yet" in _Page(write_report(RunDirectory(tmp_path / "none")).read_text()).said
    for name in ("summary.json", "pareto.json", "env.json", "config.yaml", "baseline/record.json", "best/record.json"):
        (finished.path / name).write_text("{")
        assert "autocompress report" in _Page(render(read_run(finished))).said


def test_figure_draws_front_limits_and_stages(finished: RunDirectory) -> None:
    view = read_run(finished)
    figure = pareto_figure(view)
    traces = {trace.name.split(",")[0].split(" (")[0]: trace for trace in figure.data}
    assert set(traces) == {"proxy", "recovered", "Pareto front", "baseline", "result"}
    assert traces["proxy"].marker.symbol == "circle-open"
    assert traces["recovered"].marker.symbol == "circle"
    assert traces["Pareto front"].line.shape == "hv"
    assert len(traces["proxy"].x) + len(traces["recovered"].x) == len(view.points) == 83
    assert list(traces["Pareto front"].y) == sorted(traces["Pareto front"].y)
    assert view.best is not None
    assert traces["result"].x[0] == view.best.measurement.latency_ms
    assert view.best.record.policy.describe() in traces["result"].text[0]
    notes = [note.text for note in figure.layout.annotations]
    assert notes == ["target 0.29 ms", "allowed drop 1 pp"]
    low, high = figure.layout.meta["everything"][1]
    assert all(low <= y <= high for y in traces["proxy"].y)
    json.loads(figure.to_json())


def test_what_was_not_built_is_drawn_where_it_was_predicted(finished: RunDirectory) -> None:
    before = pareto_figure(read_run(finished))
    policy = CompressionPolicy("bf16", {"layer1.0.conv1": 0.5})
    finished.append(TrialRecord(901, policy, "rejected", accuracy=0.31, predicted_ratio=0.25))
    view = read_run(finished)
    assert [r.number for r in view.rejected] == [901] and view.baseline_ms is not None
    figure = pareto_figure(view)
    trace = next(t for t in figure.data if t.name == "not built: latency predicted")
    assert list(trace.x) == pytest.approx([0.25 * view.baseline_ms]) and list(trace.y) == pytest.approx([31.0])
    assert "trial 901, not built" in trace.text[0] and "PREDICTED, 0.25x" in trace.text[0]
    # It does not move the part that matters, and is in the picture of everything.
    assert figure.layout.meta["focus"] == before.layout.meta["focus"]
    assert figure.layout.meta["everything"][1][0] <= 31.0
    page = write_report(finished).read_text()
    assert (
        "trials not built for what was seen of them" in page and "Crosses were not built: their latency is PRED" in page
    )
    assert all(t.name != "not built: latency predicted" for t in before.data)


def test_points_and_limit_are_drawn_at_one_speed_of_the_machine(finished: RunDirectory) -> None:
    # The run's first measurement of the baseline was disturbed; limits are of the last one.
    path = finished.baseline / "record.json"
    data = read_json(path)
    data["measurement"] = {**data["measurement"], "latency_ms": 3 * data["measurement"]["latency_ms"]}
    write_json(path, data)
    view = read_run(finished)
    assert view.baseline is not None and view.best is not None and view.latency_limit_ms is not None
    latest = finished.read("summary.json")["baseline"]["latency_ms"]
    assert view.latency_ms(view.baseline) == pytest.approx(latest)
    assert view.latency_ms(view.best) == pytest.approx(latest * view.best.measurement.ratio)
    met = view.best.measurement.ratio * latest <= view.latency_limit_ms
    assert (view.latency_ms(view.best) <= view.latency_limit_ms) == met


def test_front_is_computed_when_the_run_was_cut(make_run: Callable[..., RunDirectory], tmp_path: Path) -> None:
    cut = read_run(make_run(finished=False)).front
    assert [p.record.number for p in cut] == [p.record.number for p in read_run(make_run()).front]


def test_one_front_in_every_view(finished: RunDirectory) -> None:
    # What an older release, or a hand, wrote into pareto.json does not count; the records do.
    finished.write("pareto.json", {"axes": [], "front": [], "records": []})
    view = read_run(finished)
    numbers = [p.record.number for p in view.front]
    assert numbers == [r.number for r in run_front(finished)] == list(open_run(finished.path).front["trial"]) != []
    write_front(finished)
    assert finished.read("pareto.json")["front"] == numbers
    shown = re.findall(r'<tr class="[a-z]*"><td>(?:<span class=star>★</span> )?(\w+)<td', render(view))
    assert shown == ["baseline", *(str(p.record.number) for p in view.listed)]


def test_the_uncompressed_model_as_the_result(finished: RunDirectory) -> None:
    summary = finished.read("summary.json")
    summary["best"].update(trial=None, stage="baseline", feasible=False, latency_ratio=1.0, accuracy_drop_pp=0.0)
    finished.write("summary.json", summary)
    view = read_run(finished)
    assert view.best is view.baseline and not any(map(view.is_best, view.listed))
    said = _Page(render(view)).said
    assert "The result is the uncompressed model, which is what you had" in said and "nothing to offer" in said
    assert render(view).count("<td>baseline<td>") == 1


def test_a_metric_that_is_no_share_is_never_in_percent(finished: RunDirectory) -> None:
    finished.write("summary.json", {**finished.read("summary.json"), "metric": "cosine"})
    page = write_report(finished).read_text()
    body = page[page.index("<main>") :]
    said = _Page(page).said
    assert "0.9149 → 0.9112" in said and "test cosine, read once" in said and "loss of test cosine" in said
    assert "accuracy" not in said.lower() and "Cosine and latency" in said
    assert not re.search(r"\d pp\b|91\.\d+%", said)
    plot = body[body.index("Plotly.newPlot") :]
    assert "validation cosine" in plot and "validation accuracy" not in plot and " pp" not in plot


def test_a_limit_that_is_a_ratio_is_judged_by_the_ratio(finished: RunDirectory) -> None:
    summary = finished.read("summary.json")
    # Another minute: the milliseconds are above those of the limit, the interleaved ratio is within.
    summary["best"].update(latency_ratio=0.60, latency_ms=0.5)
    summary["constraints"].update(latency_ratio=0.62, latency_ms=0.29)
    finished.write("summary.json", summary)
    assert next(c for c in read_run(finished).checks() if "latency" in c.what).met
    summary["best"].update(latency_ratio=0.63, latency_ms=0.1)
    finished.write("summary.json", summary)
    assert not next(c for c in read_run(finished).checks() if "latency" in c.what).met


def test_both_answers_are_told_where_limits_are_missed(finished: RunDirectory) -> None:
    summary = finished.read("summary.json")
    summary["best"]["feasible"] = False
    layers = {"layer1.0.conv1": 0.2, "layer1.0.conv2": 0.1}
    summary["fastest_within_drop"] = {
        "trial": 12, "stage": "recovered", "latency_ratio": 0.71, "accuracy": 0.91, "drop": 0.0062, "size_bytes": 5,
        "slowest_layers": layers,
    }  # fmt: skip
    summary["most_accurate_within_latency"] = None
    summary["lowest_ratio"] = 0.65
    summary["constraints"].update(latency_ratio=0.62)
    finished.write("summary.json", summary)
    said = _Page(write_report(finished).read_text()).said
    assert "Fastest within 1 pp: trial 12, 0.71x, validation accuracy 91.00% (−0.62 pp)." in said
    assert "No trial was surely within 0.62x" in said and "the fastest took 0.65x." in said
    assert "In the way: layer1.0.conv1, layer1.0.conv2 take 30% of its time." in said


def test_why_without_a_latency_table(finished: RunDirectory) -> None:
    reason = {
        "parameter": "prune/layer1.0.conv1", "choice": 0.25, "saved_ms": None, "loss": 0.012, "next_choice": 0.125,
        "next_ms": None, "next_loss": 0.004, "saved_macs": 0.03, "saved_bytes": 0.021,
    }  # fmt: skip
    finished.write("summary.json", {**finished.read("summary.json"), "explanation": [reason]})
    page = write_report(finished).read_text()
    said = _Page(page).said
    assert "3.0%" in said and "2.1%" in said and "0.012" in said and "prune/layer1.0.conv1" in said
    assert "slower by" not in said and "PREDICTED, by taking" not in said
    # Nothing that tells anything: no table.
    bare = {**reason, "loss": None, "saved_macs": None, "saved_bytes": None, "next_loss": None}
    finished.write("summary.json", {**finished.read("summary.json"), "explanation": [bare]})
    assert "<h2>Why</h2>" not in write_report(finished).read_text()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_the_screen(finished: RunDirectory, tmp_path: Path, width: int) -> None:
    """Nothing sticks out at the right: the document is no wider than the frame it is shown in."""
    page = write_report(finished).read_text()
    # A browser's own window may not be as narrow as a telephone; a frame is.
    tell = (
        "<script>addEventListener('load',()=>setTimeout(()=>parent.postMessage("
        "document.documentElement.scrollWidth,'*'),500))</script>"
    )
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{tell}</body>"))
    (tmp_path / "frame.html").write_text(
        f"<body><iframe src=page.html style='border:0;width:{width}px;height:900px'></iframe><script>"
        "addEventListener('message',e=>{document.title='wide '+e.data;document.body.append('wide '+e.data)})</script>"
    )
    shown = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path / 'frame.html'}"],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    found = re.search(r"wide (\d+)", shown)
    assert found is not None and int(found[1]) <= width, shown[-500:]


def test_missing_plotly_names_the_extra(finished: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(_optional, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=r"autocompress\[report\]"):
        write_report(finished)
    assert not finished.report_file.exists()


def test_words() -> None:
    assert sorted(["layer10", "layer2", "conv"], key=natural) == ["conv", "layer2", "layer10"]
