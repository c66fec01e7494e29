"""What the worker does when all goes well: describe, build, infer, measure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from autocompress.engines import EngineFile, EngineOptions
from autocompress.errors import BuildError, ConfigError
from autocompress.latency import Protocol
from autocompress.worker import EngineWorker
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
    assert set(described) == {"name", "version", "device", "capabilities"}
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


def test_evaluation_after_measuring_is_not_pinned(worker: EngineWorker, built: EngineFile) -> None:
    def allowed() -> set[str]:
        tasks = Path(f"/proc/{worker.pid}/task").iterdir()
        lines = [line for task in tasks for line in (task / "status").read_text().splitlines()]
        return {line for line in lines if line.startswith("Cpus_allowed_list")}

    before = allowed()
    worker.measure([built], graphs.images(1), Protocol(warm_up_s=0, min_iterations=1, min_seconds=0, rounds=1))
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
