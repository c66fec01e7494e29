"""A search for a GPU that is not here: engines are really built by TensorRT-RTX, latency comes from a made-up table."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import autocompress
from autocompress.compress import rewrite
from autocompress.engines import get_engine
from autocompress.errors import ConfigError, DeviceNotFoundError, TableMismatchError
from autocompress.evaluation.profiler import random_choices
from autocompress.graph.builder import GraphBuilder
from autocompress.graph.layout import Unit
from autocompress.model.inventory import take_inventory
from autocompress.prediction.table import LatencyTable
from autocompress.runs.records import PREDICTED
from autocompress.space.search_space import SearchSpace, load_space
from autocompress.tasks import Task
from tests.exploration import tiny
from tests.prediction.tables import DEVICE, layer_row, network_row

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("onnxruntime")
GPU = {"name": "NVIDIA GeForce RTX 4090", "compute_capability": "8.9", "driver": "570.0", "clocks_mhz": {},
       "power_limit_w": 450.0}  # fmt: skip
BASELINE_MS = 0.4


@pytest.fixture(scope="module")
def task() -> Task:
    return tiny.made("wide")


def _time(unit: Unit) -> float:
    return 2e-3 + unit.macs * (1e-9 if unit.int8 else 2e-9)


@pytest.fixture(scope="module")
def table(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `profile` would leave on that GPU."""
    base = rewrite(task.model())
    inventory = take_inventory(base, task.example_inputs(2))
    layout = GraphBuilder(base, task.example_inputs(1), inventory, "tensorrt-rtx").layout
    space = SearchSpace(load_space("default"), inventory, "fp16", int8=True, sparse=True)
    path = tmp_path_factory.mktemp("tables") / "tensorrt-rtx.csv"
    made = LatencyTable({**DEVICE, "gpu": GPU}, "tensorrt-rtx", get_engine("tensorrt-rtx").version())
    made.save(path)
    whole = sum(_time(unit) for unit in layout.units(space.policy({})))
    rng = random.Random(0)
    for _ in range(40):
        policy = space.policy(random_choices(space, rng))
        units = layout.units(policy)
        ratio = sum(map(_time, units)) / whole
        rows = [
            layer_row(
                network=layout.hash, name="wide", layer=u.layer, op=u.kind, in_channels=u.in_channels, ranks=u.ranks,
                out_channels=u.out_channels, dtype="int8" if u.int8 else "fp16", macs=u.macs, policy=policy.hash,
                time_ms=_time(u) / whole * BASELINE_MS, baseline_ms=BASELINE_MS, dense_dtype="fp16",
            )
            for u in units
        ]  # fmt: skip
        own = {"ratio": ratio, "ratio_low": 0.99 * ratio, "ratio_high": 1.01 * ratio, "baseline_ms": BASELINE_MS}
        made.append(
            *rows, network_row(network=layout.hash, name="wide", policy=policy, latency_ms=ratio * BASELINE_MS, **own)
        )
    return path


OPTIONS: dict[str, Any] = {
    "engine": "tensorrt-rtx", "engine_options": {"compute_capability": "8.9"}, "target_latency": "0.6x",
    "recovery": {"enabled": False}, "n_trials": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(task: Task, table: Path, tmp_path_factory: pytest.TempPathFactory) -> autocompress.Run:
    out = tmp_path_factory.mktemp("ahead") / "run"
    return autocompress.search(task, table=str(table), out=out, **OPTIONS)


def test_engines_are_built_and_latency_is_predicted(run: autocompress.Run) -> None:
    summary, done = run.summary, [r for r in run.records if r.state == "complete"]
    assert summary["device"] == "compute capability 8.9, ahead of time"
    assert summary["baseline"]["latency_ms"] == pytest.approx(BASELINE_MS) and summary["baseline"]["dtype"] == "fp16"
    best = summary["best"]
    assert best["latency_source"] == PREDICTED and best["feasible"] and best["verified"] is False
    assert best["latency_ratio_interval"][1] <= 0.6 and best["accuracy"] > 0.5
    assert len(done) >= 4
    for record in done:
        assert record.measurement is not None and record.artifact is not None
        assert (record.measurement.source, record.measurement.n) == (PREDICTED, 0)
        assert (run.path / record.artifact / "model.rtx.engine").stat().st_size > 1000
    report = (run.path / "report.html").read_text()
    assert "Latencies are PREDICTED" in report and "predicted ratio" in report


def test_what_was_only_predicted_is_not_deployed_nor_measured_without_its_device(
    run: autocompress.Run, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"is predicted.*autocompress measure"):
        run.deploy(tmp_path / "out")
    before = (run.path / "trials.jsonl").read_bytes()
    with pytest.raises(DeviceNotFoundError, match="driver"):
        autocompress.measure(run)
    assert (run.path / "trials.jsonl").read_bytes() == before and not (tmp_path / "out").exists()


def test_the_terminal_says_so_too(run: autocompress.Run) -> None:
    from click.testing import CliRunner

    from autocompress.cli import main

    shown = CliRunner().invoke(main, ["pareto", str(run.path)])
    assert "≈" in shown.stdout and "NOT measured" in shown.stdout and "autocompress measure" in shown.stdout


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"table": "auto"}, (ConfigError, "none was named")),
        ({"engine_options": {"compute_capability": "8.6"}}, (TableMismatchError, "is of compute capability 8.9")),
        ({"dense_dtype": "fp32"}, (ConfigError, "0 forms of this model in fp32")),
        ({"engine_options": {"compute_capability": "7.0"}}, (ConfigError, "does not build for compute capability 7.0")),
    ],
)
def test_a_table_that_does_not_fit(
    options: dict[str, Any], refusal: tuple[type[Exception], str], task: Task, table: Path, tmp_path: Path
) -> None:
    with pytest.raises(refusal[0], match=refusal[1]):
        autocompress.search(task, out=tmp_path / "run", **{**OPTIONS, "table": str(table), **options})
