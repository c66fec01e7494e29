"""Files timed alone, each in a process of its own, on several occasions."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from autocompress.engines import EngineFile, EngineOptions, engine_class
from autocompress.errors import BuildError
from autocompress.measurement.bench import Bench, _once, neighbour
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.protocol import Protocol
from autocompress.runs.records import BUSY, QUIET
from tests.engines import graphs

pytestmark = pytest.mark.usefixtures("whole_protocols")
BRIEF = Protocol.standard(occasions=2, max_occasions=2, min_seconds=0.1, max_seconds=0.1, min_iterations=20)
TWO = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor has no neighbour")


@pytest.fixture
def worker() -> Iterator[EngineWorker]:
    with EngineWorker(time_limit_s=60) as worker:
        yield worker


@pytest.fixture(params=["openvino", "onnxruntime"])
def built(worker: EngineWorker, request: pytest.FixtureRequest, tmp_path: Path) -> EngineFile:
    pytest.importorskip(request.param)
    return worker.build(request.param, graphs.convnet(tmp_path / "model.onnx"), EngineOptions(), tmp_path / "model")


def children() -> list[int]:
    return [child.pid for child in psutil.Process().children()]


def test_occasions_have_a_process_for_each_file(worker: EngineWorker, built: EngineFile, tmp_path: Path) -> None:
    kept, before = tmp_path / "samples.npz", time.time()
    first, second = worker.measure([built, built], graphs.images(3), BRIEF, kept)
    assert (first.ratio, first.ratio_low, first.ratio_high) == (1, 1, 1)
    assert len(second.occasions) == len(first.occasions) == 2
    assert before < second.occasions[0].at < second.occasions[1].at and 0 < second.span_s < 60
    # Wide: the machine that runs tests may be doing anything else.
    assert 0.4 < second.ratio < 2.5 and second.ratio_low < second.ratio < second.ratio_high
    assert second.ratio_low == min(low for _, low, _ in second.states.values())
    assert QUIET in second.states
    with np.load(kept) as samples:
        assert len(samples["samples_ms_1"]) == second.n >= 40
    # Nothing stays but the worker that was asked, and what makes a processor busy.
    assert worker.pid in children()


@TWO
def test_every_occasion_is_repeated_beside_a_busy_processor(worker: EngineWorker, built: EngineFile) -> None:
    (_, found) = worker.measure([built, built], graphs.images(1), BRIEF)
    assert all({QUIET, BUSY} <= set(one.states) for one in found.occasions)
    (_, alone) = worker.measure([built, built], graphs.images(1), replace(BRIEF, beside_busy=False))
    assert all(BUSY not in one.states for one in alone.occasions)


def test_what_disturbed_several_occasions_is_told_once() -> None:
    reasons = ["the clock moved", "it waited 15% of the time", "it waited 16.5% of the time", "the clock moved"]
    assert _once(reasons) == ("the clock moved", "it waited 15% of the time")


@TWO
def test_the_load_is_on_a_processor_that_is_not_measured_on() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    assert neighbour(allowed[-1:]) in allowed[:-1]
    assert neighbour(allowed) is None


def test_more_occasions_are_taken_while_the_interval_is_wide(worker: EngineWorker, built: EngineFile) -> None:
    never = replace(BRIEF, precision=1e-6, max_occasions=4, beside_busy=False)
    assert len(worker.measure([built, built], graphs.images(1), never)[1].occasions) == 4
    soon = replace(never, precision=10.0, occasions=1)
    assert len(worker.measure([built, built], graphs.images(1), soon)[1].occasions) == 1


def test_processes_are_new_for_every_occasion_or_stay_for_the_next_trial(
    worker: EngineWorker, built: EngineFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[EngineWorker] = []
    another = worker._another

    def counted() -> EngineWorker:
        started.append(another())
        return started[-1]

    monkeypatch.setattr(worker, "_another", counted)
    worker.measure([built, built], graphs.images(1), BRIEF)
    assert len(started) == 4
    kept = replace(BRIEF, restart=False, occasions=1, max_occasions=1, beside_busy=False)
    for _ in range(3):
        worker.measure([built, built], graphs.images(1), kept)
    assert len(started) == 6
    pids = {one.pid for one in started[-2:]}
    assert None not in pids and len(pids) == 2 and worker.pid not in pids
    worker.close()
    assert not pids & set(children())


def test_a_process_that_dies_is_an_error_and_the_next_measurement_has_another(
    worker: EngineWorker, built: EngineFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = replace(BRIEF, beside_busy=False, occasions=1, max_occasions=1)
    real = Bench._ready

    def killed(bench: Bench, count: int, *, restart: bool) -> list[EngineWorker]:
        workers = real(bench, count, restart=restart)
        timer = workers[-1].timer

        def dying(file: EngineFile, operation: str, **arguments: object) -> object:
            if operation == "time":
                psutil.Process(workers[-1].pid).kill()
            return timer(file, operation, **arguments)

        monkeypatch.setattr(workers[-1], "timer", dying)
        return workers

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "_ready", killed)
        with pytest.raises(BuildError, match=r"Measuring .*model.* was killed by SIGKILL"):
            worker.measure([built, built], graphs.images(1), brief)
    assert worker.measure([built, built], graphs.images(1), brief)[1].n > 0


def test_many_files_are_measured_in_groups(worker: EngineWorker, built: EngineFile, tmp_path: Path) -> None:
    brief = replace(BRIEF, beside_busy=False, occasions=1, max_occasions=1)
    found = worker.measure([built] * 6, graphs.images(1), brief, tmp_path / "samples.npz")
    assert len(found) == 6 and all(one.occasions for one in found) and found[0].ratio == 1
    with np.load(tmp_path / "samples.npz") as samples:
        assert [len(samples[f"samples_ms_{index}"]) for index in range(6)] == [one.n for one in found]
    # Never more than four at once.
    assert len(children()) <= 1 + 4 + 1


@TWO
def test_a_load_that_ended_or_is_elsewhere_is_replaced(worker: EngineWorker, built: EngineFile) -> None:
    brief = replace(BRIEF, occasions=1, max_occasions=1)
    worker.measure([built, built], graphs.images(1), brief)
    bench = worker._bench
    assert bench is not None and bench._load is not None
    first = bench._load
    assert not first.serves(10_000)
    first._process.kill()
    first._process.wait()
    with pytest.raises(BuildError, match="keeps a processor busy"), first.working():
        pass
    found = worker.measure([built, built], graphs.images(1), brief)[1]
    assert BUSY in found.occasions[0].states and bench._load is not first


def test_on_a_gpu_all_files_are_in_one_process(
    worker: EngineWorker, built: EngineFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[EngineWorker] = []
    another = worker._another
    monkeypatch.setattr(worker, "_another", lambda: started.append(another()) or started[-1])
    monkeypatch.setattr(engine_class(built.engine), "uses_gpu", True)
    found = worker.measure([built, built], graphs.images(1), BRIEF)[1]
    assert len(started) == 2 and len(found.occasions) == 2
    assert all(set(one.states) == {QUIET} for one in found.occasions)
    assert found.ratio_low < found.ratio < found.ratio_high


def test_a_file_that_is_not_there_is_an_error(worker: EngineWorker, built: EngineFile, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot be opened"):
        worker.measure([built, replace(built, path=tmp_path / "gone.xml")], graphs.images(1), BRIEF)
