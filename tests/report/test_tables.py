from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from autocompress.engines.base import EngineFile, EngineOptions
from autocompress.report.result_panel import result_panel
from autocompress.report.run_view import read_run
from autocompress.report.tables import benchmark_table, front_table
from autocompress.runs.directory import RunDirectory


def printed(renderable: RenderableType, width: int = 80) -> str:
    console = Console(width=width, color_system=None, file=io.StringIO())
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.mark.parametrize("width", [80, 100, 140])
def test_front_table_fits_and_marks_the_result(finished: RunDirectory, width: int) -> None:
    view = read_run(finished)
    text = printed(front_table(view, width), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert view.best is not None
    starred = next(line for line in text.splitlines() if "★" in line)
    assert f"★ {view.best.record.number}" in starred
    assert f"{view.best.accuracy:.2%}" in starred
    first = text.splitlines()[4]
    assert "base" in first and "0.468 ms" in first
    assert ("MACs" in text) == (width >= 104)
    assert ("recovered" in text) == (width >= 96)


def test_the_result_is_listed_even_where_the_front_does_not_hold_it(finished: RunDirectory) -> None:
    view = read_run(finished)
    assert view.best is not None
    front = {p.record.number for p in view.front}
    beaten = next(p for p in view.points if p.record.number not in front)
    table = printed(front_table(replace(view, best=beaten)))
    assert f"★ {beaten.record.number}" in table
    ratios = [p.measurement.ratio for p in replace(view, best=beaten).listed]
    assert ratios == sorted(ratios) and len(ratios) == len([p for p in view.front if p.record.stage != "baseline"]) + 1


def test_narrow_front_table_marks_proxies(finished: RunDirectory) -> None:
    view = read_run(finished)
    proxies = [p.record.number for p in view.front if p.record.stage == "proxy"]
    assert proxies
    text = printed(front_table(view))
    assert all(f"{number}°" in text for number in proxies)
    assert "not fine-tuned" in text


def test_front_table_of_an_empty_run(tmp_path: Path) -> None:
    assert "trial" in printed(front_table(read_run(RunDirectory(tmp_path))))


def test_result_panel(finished: RunDirectory) -> None:
    summary = finished.read("summary.json")
    summary["run_dir"] = "runs/r1"
    text = printed(result_panel(summary))
    for part in (
        "limits met, verified",
        "✓ at most 0.29 ms",
        "91.49% → 91.12%",
        "−0.37 pp",
        "accuracy, test",
        "24m 10s",
    ):
        assert part in text
    assert "autocompress deploy runs/r1 --to DIR" in text
    assert "✗" not in text


def test_result_panel_says_which_limit_was_missed(finished: RunDirectory) -> None:
    summary = finished.read("summary.json")
    summary["best"]["feasible"] = False
    summary["constraints"]["latency_ms"] = 0.1
    text = printed(result_panel(summary))
    assert "limits not met" in text
    assert "✗ at most 0.1 ms" in text


@pytest.mark.parametrize("best", [None, {}])
def test_result_panel_without_a_result(finished: RunDirectory, best: Any) -> None:
    text = printed(result_panel({**finished.read("summary.json"), "best": best}))
    assert "no result" in text
    assert "7 failed" in text


def test_result_panel_without_limits(finished: RunDirectory) -> None:
    summary = finished.read("summary.json")
    summary["constraints"] = {"latency_ms": None, "max_drop": None, "size_bytes": None}
    assert "at most" not in printed(result_panel(summary))


@pytest.mark.parametrize(
    ("prediction", "said"),
    [
        ({"screened_out": 12, "fitted": 40, "mape": 0.0213}, "12 engine builds saved; off by 2.1% on average"),
        ({"screened_out": 1, "fitted": 0, "mape": 0.1}, "1 engine build saved; off by 10.0% on average"),
        ({"screened_out": 12, "rejected": 3, "mape": 0.1}, "15 engine builds saved; off by 10.0% on average"),
        ({"screened_out": 0, "fitted": 0, "mape": 0.05}, "off by 5.0% on average"),
    ],
)
def test_result_panel_tells_what_prediction_saved(finished: RunDirectory, prediction: Any, said: str) -> None:
    text = printed(result_panel({**finished.read("summary.json"), "prediction": prediction}))
    assert f"prediction      {said} " in text


@pytest.mark.parametrize("prediction", [None, {"networks_known": 3, "screened_out": 0, "fitted": 0, "mape": None}])
def test_result_panel_is_silent_where_nothing_was_predicted(finished: RunDirectory, prediction: Any) -> None:
    summary = finished.read("summary.json")
    assert "prediction" not in printed(result_panel(summary))
    assert "prediction" not in printed(result_panel({**summary, "prediction": prediction}))


def test_benchmark_table(finished: RunDirectory, tmp_path: Path, make_measurement: Callable[..., Any]) -> None:
    files = []
    for name in ("a.onnx", "with [red]markup[/red].onnx"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"0" * 2000)
        files.append(EngineFile("openvino", tmp_path / name, EngineOptions("bf16")))
    measured = [make_measurement(0.5, 1.0), make_measurement(0.25, 0.5)]
    text = printed(benchmark_table(files, measured), 160)
    assert "[red]markup[/red]" in text
    assert "0.500x" in text and "0.494 to 0.506" in text
    assert "1 thread, batch 1" in text
    assert max(map(len, printed(benchmark_table(files, measured)).splitlines())) <= 80


def test_benchmark_table_tells_verdict_noise_and_energy(tmp_path: Path, make_measurement: Callable[..., Any]) -> None:
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(b"0" * 2000)
    files = [EngineFile("openvino", tmp_path / name, EngineOptions("bf16")) for name in ("a.onnx", "b.onnx")]
    both, own = "other programs used 48% of a processor", "the ratio is known only to ±3.1%"
    measured = [
        replace(make_measurement(0.5, 1.0), noise=(both,), energy_mj=12.3),
        replace(make_measurement(0.25, 0.5), noise=(both, own), noisy=True),
    ]
    text = printed(benchmark_table(files, measured), 160)
    assert "faster" in text and "12.3 mJ" in text
    assert f"noise: {both}" in text and text.count(both) == 1
    assert f"noise, b.onnx: {own}" in text and "too noisy" in text
    assert max(map(len, printed(benchmark_table(files, measured)).splitlines())) <= 80
    throughput = [replace(m, mode="throughput", streams=3, throughput_per_s=12_345.6) for m in measured]
    text = printed(benchmark_table(files, throughput), 160)
    assert "12,346" in text and "3 streams" in text and "time per sample" in text
    assert max(map(len, printed(benchmark_table(files, throughput)).splitlines())) <= 80
