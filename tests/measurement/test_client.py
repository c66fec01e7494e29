"""What the worker does when all goes well: describe, build, infer, measure."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autocompress.engines import EngineFile, EngineOptions
from autocompress.errors import BuildError, ConfigError
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.protocol import Protocol
from tests.engines import graphs

BRIEF = Protocol(warm_up_s=0.05, min_iterations=50, min_seconds=0.2, max_seconds=0.4)
ENGINES = ["openvino", "onnxruntime"]


@pytest.fixture(scope="module")
def worker() -> Iterator[EngineWorker]:
    with EngineWorker(time_limit_s=60) as worker:
        yield worker


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return str(request.param)


@pytest.fixture
def built(worker: EngineWorker, engine: str, tmp_path: Path) -> EngineFile:
    return worker.build(engine, graphs.convnet(tmp_path / "model.onnx"), EngineOptions(), tmp_path / "model")


def test_describe(worker: EngineWorker, engine: str) -> None:
    described = worker.describe(engine)
    assert set(described) == {"name", "version", "device", "capabilities", "runs_here"}
    assert described["name"] == engine
    assert described["capabilities"][0] == "fp32"


def test_build_names_the_file(
    worker: EngineWorker, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs.convnet(tmp_path / "model.onnx")
    worker.describe(engine)
    monkeypatch.chdir(tmp_path)  # after the child took its own working directory
    file = worker.build(engine, Path("model.onnx"), EngineOptions(), Path("model"))
    assert not file.path.is_absolute()
    assert file.path.exists()
    assert (file.engine, file.options) == (engine, EngineOptions())


@pytest.mark.parametrize("count", [1, 3, 17])
@pytest.mark.parametrize("cpus", [None, 1])
def test_infer_any_number_of_samples(worker: EngineWorker, built: EngineFile, count: int, cpus: int | None) -> None:
    inputs = graphs.images(count)
    outputs = worker.infer(built, inputs, cpus)
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, graphs.reference(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 8, 19])
def test_infer_in_batches(worker: EngineWorker, engine: str, tmp_path: Path, count: int) -> None:
    graph = graphs.convnet(tmp_path / "model.onnx", batch=4)
    file = worker.build(engine, graph, EngineOptions(batch_size=4), tmp_path / "model")
    inputs = graphs.images(count)
    np.testing.assert_allclose(worker.infer(file, inputs), graphs.reference(inputs), rtol=1e-4, atol=1e-4)


def test_infer_maps_a_file(worker: EngineWorker, built: EngineFile, tmp_path: Path) -> None:
    inputs = graphs.images(5)
    np.save(tmp_path / "inputs.npy", inputs)
    np.testing.assert_array_equal(worker.infer(built, tmp_path / "inputs.npy"), worker.infer(built, inputs))
    assert (tmp_path / "inputs.npy").exists()


def test_infer_nothing_is_an_error(worker: EngineWorker, built: EngineFile) -> None:
    with pytest.raises(ConfigError, match="no samples"):
        worker.infer(built, graphs.images(0))


def test_wrong_shape_is_an_error(worker: EngineWorker, built: EngineFile) -> None:
    with pytest.raises(BuildError, match=r"\(1, 3, 16, 16\), not \(1, 3, 8, 8\)"):
        worker.infer(built, graphs.images(1, size=8))


def test_a_rebuilt_file_is_opened_anew(worker: EngineWorker, engine: str, tmp_path: Path) -> None:
    inputs = graphs.images(2)
    for channels in (8, 4):
        graph = graphs.convnet(tmp_path / "model.onnx", channels=channels)
        file = worker.build(engine, graph, EngineOptions(), tmp_path / "model")
        np.testing.assert_allclose(worker.infer(file, inputs), graphs.reference(inputs, channels), rtol=1e-4, atol=1e-4)


def test_a_file_against_itself_has_ratio_one(worker: EngineWorker, built: EngineFile) -> None:
    first, second = worker.measure([built, built], graphs.images(1), BRIEF)
    assert (first.ratio, first.ratio_low, first.ratio_high) == (1, 1, 1)
    # Wide: the machine that runs tests may be doing anything else.
    assert 0.5 < second.ratio < 2
    assert second.ratio_low <= second.ratio <= second.ratio_high
    assert second.baseline_ms == first.latency_ms
    assert second.aa_low <= second.aa_ratio <= second.aa_high
    assert second.throughput_per_s == pytest.approx(1e3 / second.latency_ms, rel=0.5)


def test_a_larger_network_is_slower(worker: EngineWorker, engine: str, tmp_path: Path) -> None:
    small, large = (
        worker.build(
            engine,
            graphs.convnet(tmp_path / f"{channels}.onnx", channels=channels, layers=3, size=32),
            EngineOptions(),
            tmp_path / f"{channels}",
        )
        for channels in (16, 64)
    )
    baseline, other = worker.measure([small, large], graphs.images(1, size=32), BRIEF)
    assert other.ratio_low > 1
    assert other.latency_ms > baseline.latency_ms > 0


def test_throughput_of_several_streams(worker: EngineWorker, engine: str, tmp_path: Path) -> None:
    allowed = len(os.sched_getaffinity(0))
    # Calls of about a millisecond: of shorter ones Python's lock and a busy machine's scheduler take most.
    graph = graphs.convnet(tmp_path / "model.onnx", channels=64, layers=3, size=32, batch=2)
    file = worker.build(engine, graph, EngineOptions(batch_size=2), tmp_path / "model")
    protocol = replace(BRIEF, mode="throughput")
    first, second = worker.measure([file, file], graphs.images(2, size=32), protocol)
    assert (first.mode, first.streams, first.threads, first.batch_size) == ("throughput", allowed, 1, 2)
    for result in (first, second):
        assert result.throughput_per_s is not None
        # As many times what one stream makes of its median latency; wide, as the machine may be busy.
        expected = allowed * 2 * 1e3 / result.latency_ms
        assert expected / 5 < result.throughput_per_s < 5 * expected
    (one,) = worker.measure([file], graphs.images(2, size=32), replace(protocol, streams=1))
    assert one.streams == 1
    with pytest.raises(ConfigError, match=f"{allowed + 1} streams of 1 thread each.*at most {allowed}"):
        worker.measure([file], graphs.images(2, size=32), replace(protocol, streams=allowed + 1))


def test_measurement_says_how_it_was_taken_and_keeps_samples(worker: EngineWorker, engine: str, tmp_path: Path) -> None:
    graph = graphs.convnet(tmp_path / "model.onnx", batch=2)
    file = worker.build(engine, graph, EngineOptions(batch_size=2), tmp_path / "model")
    # One sample only: repeated to fill the batch.
    (result,) = worker.measure([file], graphs.images(1), BRIEF, tmp_path / "kept" / "samples.npz")
    assert (result.batch_size, result.threads) == (2, 1)
    with np.load(tmp_path / "kept" / "samples.npz") as kept:
        samples = kept["samples_ms_0"]
    assert len(samples) == result.n >= BRIEF.min_iterations
    assert float(np.median(samples)) == pytest.approx(result.latency_ms)
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["samples.npz"]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="on one processor everything is pinned")
def test_measuring_stays_on_its_processor_while_the_runtime_runs(worker: EngineWorker, built: EngineFile) -> None:
    worker.infer(built, graphs.images(4))  # opened while all processors were allowed
    assert worker.pid is not None

    def share_pinned() -> float:
        seen: list[int] = []
        thread = threading.Thread(target=worker.measure, args=([built], graphs.images(1), BRIEF))
        thread.start()
        while thread.is_alive():
            seen.append(len(os.sched_getaffinity(worker.pid or 0)))
            time.sleep(0.001)
        return seen.count(1) / len(seen)

    # Another program may move processes too; the runtime would in every call.
    assert any(share_pinned() > 0.6 for _ in range(3))


def test_evaluation_after_measuring_is_not_pinned(worker: EngineWorker, built: EngineFile) -> None:
    def allowed() -> set[str]:
        tasks = Path(f"/proc/{worker.pid}/task").iterdir()
        lines = [line for task in tasks for line in (task / "status").read_text().splitlines()]
        return {line for line in lines if line.startswith("Cpus_allowed_list")}

    before = allowed()
    brief = Protocol(warm_up_s=0, min_iterations=1, min_seconds=0, max_seconds=0, rounds=1)
    worker.measure([built], graphs.images(1), brief)
    assert allowed() == before
    assert len(before) == 1


def test_more_threads_than_processors_is_an_error(worker: EngineWorker, built: EngineFile, tmp_path: Path) -> None:
    options = EngineOptions(threads=10_000)
    many = EngineFile(built.engine, built.path, options)
    for request in (
        lambda: worker.build(built.engine, tmp_path / "model.onnx", options, tmp_path / "model"),
        lambda: worker.infer(many, graphs.images(1)),
        lambda: worker.measure([many], graphs.images(1), BRIEF),
    ):
        with pytest.raises(ConfigError, match="10000 threads"):
            request()


def test_comparing_nothing_or_different_threads_is_an_error(worker: EngineWorker, built: EngineFile) -> None:
    with pytest.raises(ConfigError, match="none"):
        worker.measure([], graphs.images(1))
    other = EngineFile(built.engine, built.path, EngineOptions(threads=2))
    with pytest.raises(ConfigError, match=r"\[1, 2\]"):
        worker.measure([built, other], graphs.images(1))


def test_unknown_engine_is_the_same_error_as_in_this_process(worker: EngineWorker) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'openvino'"):
        worker.describe("openvin")


def test_profile_tells_the_kernels_of_a_file(worker: EngineWorker, engine: str, tmp_path: Path) -> None:
    graph = graphs.convnet(tmp_path / "model.onnx", batch=2)
    file = worker.build(engine, graph, EngineOptions(batch_size=2), tmp_path / "model")
    # One sample only: repeated to fill the batch.
    kernels = worker.profile(file, graphs.images(1), seconds=0.1)
    (convolution,) = (kernel for kernel in kernels if "conv0" in kernel.nodes)
    assert convolution.nodes == ("conv0", "act0")
    assert convolution.dtype == "fp32"
    assert convolution.n > 5
    assert sum(kernel.time_ms for kernel in kernels) > 0


def test_profiling_what_cannot_run_is_an_error(worker: EngineWorker, built: EngineFile) -> None:
    with pytest.raises(BuildError, match=r"\(1, 3, 16, 16\), not \(1, 3, 8, 8\)"):
        worker.profile(built, graphs.images(1, size=8))
    many = EngineFile(built.engine, built.path, EngineOptions(threads=1000))
    with pytest.raises(ConfigError, match="1000 threads"):
        worker.profile(many, graphs.images(1))


def test_a_profile_that_is_killed_leaves_nothing_behind(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graphs.convnet(tmp_path / "model.onnx")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with EngineWorker(time_limit_s=60) as worker:
        file = worker.build(engine, graph, EngineOptions(), tmp_path / "model")
        with pytest.raises(BuildError, match=r"Profiling .* timed out"):
            worker.profile(file, graphs.images(1), seconds=60, time_limit_s=1.5)
        assert list(temporary.glob("autocompress-*"))
    assert not list(temporary.glob("autocompress-*"))
