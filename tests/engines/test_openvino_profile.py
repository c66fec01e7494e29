"""What the plugin's rounded counters still tell, against counters simulated from known durations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from autocompress.engines import EngineOptions
from autocompress.engines.openvino import OpenVINOEngine, _core
from autocompress.engines.openvino_profile import _nodes, time_per_run
from tests.engines import graphs

pytest.importorskip("openvino")

Counts = NDArray[np.int64]


def counted(durations_us: NDArray[np.float64], start: int) -> tuple[Counts, Counts]:
    """The plugin's arithmetic: sums of whole microseconds, told as a whole mean; read often, then less so."""
    runs = np.arange(1, len(durations_us) + 1)
    means = np.cumsum(np.floor(durations_us)).astype(np.int64) // runs
    read, due = [], 0
    for run in runs:
        if run <= start or run >= due or run == runs[-1]:
            read.append(run - 1)
            due = run + max(1, run // 64)
    return runs[read], means[read]


def durations(rng: np.random.Generator, time_us: float, cold_us: float, cold: int, warm: int) -> NDArray[np.float64]:
    """Runs that vary by some percent, the first ones longer."""
    times: NDArray[np.float64] = time_us * (1 + 0.05 * np.abs(rng.standard_normal(cold + warm)))
    times[:cold] += cold_us * rng.uniform(0.7, 1.3, cold)
    return times


@pytest.mark.parametrize(("cold", "warm"), [(6, 60), (30, 300), (60, 2000)])
def test_times_are_told_to_a_third_of_a_microsecond(cold: int, warm: int) -> None:
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(200):
        times = durations(rng, rng.uniform(1, 12), 3, cold, warm)
        errors.append(time_per_run(*counted(times, cold), cold) + 0.5 - np.median(times[cold:]))
    assert np.sqrt(np.mean(np.square(errors))) < 0.33
    assert abs(np.mean(errors)) < 0.1


def test_cold_runs_do_not_count() -> None:
    times = np.concatenate([np.full(50, 90.2), np.full(500, 5.7)])
    runs, means = counted(times, 50)
    assert means[-1] >= 12
    assert time_per_run(runs, means, 50) == pytest.approx(5, abs=0.25)


def test_interruptions_do_not_count() -> None:
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(100):
        times = durations(rng, rng.uniform(2, 10), 3, 40, 600)
        true = np.median(times[40:])
        times[rng.integers(60, 500)] += 5000
        errors.append(time_per_run(*counted(times, 40), 40) + 0.5 - true)
    # 5000 µs in 600 runs are 8 µs a run.
    assert np.quantile(np.abs(errors), 0.9) < 1


@pytest.mark.parametrize("constant", [0.0, 0.9, 3.0, 250.0])
def test_a_mean_that_never_steps_is_known_to_one(constant: float) -> None:
    found = time_per_run(*counted(np.full(100, constant), 20), 20)
    assert np.floor(constant) - 0.5 <= found <= np.floor(constant) + 1


def test_two_runs_are_enough_for_an_answer() -> None:
    assert 5 <= time_per_run(np.array([1, 2]), np.array([9, 7]), 1) <= 7.5


def test_marks_do_not_change_what_the_plugin_makes_of_a_graph(tmp_path: Path) -> None:
    built = OpenVINOEngine().build(graphs.residual(tmp_path / "model.onnx"), EngineOptions(), tmp_path / "model")
    core = _core()

    def made(model: Any) -> list[tuple[str, str]]:
        operations = core.compile_model(model, "CPU", {"PERF_COUNT": True}).get_runtime_model().get_ordered_ops()
        kinds = ("layerType", "primitiveType", "runtimePrecision", "outputLayouts")
        return [tuple(operation.get_rt_info()[kind].value for kind in kinds) for operation in operations]

    plain, marked = core.read_model(built.path), core.read_model(built.path)
    names, _, _ = _nodes(marked)
    assert {"n_stem", "n_sum", "n_tail_relu"} < set(names)
    assert all(operation.get_friendly_name().startswith("@") for operation in marked.get_ordered_ops())
    assert made(marked) == made(plain)
