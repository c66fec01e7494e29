"""What becomes of each kind of request when the process that answers it dies, hangs, or answers nonsense.

The whole table, each fault in each request, is ``benchmarks/faults/runtimes.py``; here each request meets two.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autocompress.engines import ENGINES, EngineFile, EngineOptions
from autocompress.errors import BuildError, ConfigError, WorkerLostError
from autocompress.measurement import bench
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.limits import RequestLimits
from autocompress.measurement.protocol import Protocol
from autocompress.runs.deadline import Deadline
from tests.engines import graphs
from tests.measurement.faulty_child import FaultyEngine
from tests.measurement.test_faults import COMMAND, alive

pytestmark = pytest.mark.usefixtures("whole_protocols")
AT_ONCE = Protocol(warm_up_s=0, min_iterations=5, min_seconds=0, max_seconds=0.01, rounds=2, baseline_instances=1)
APART = Protocol.standard(
    warm_up_s=0, occasions=1, max_occasions=1, min_seconds=0.01, max_seconds=0.01, min_iterations=5, patience_s=0
)
TIMER = tuple(f"timer_{name}" for name in ("open", "warm_up", "settle", "time", "used", "close"))
SAID = {
    "SIGSEGV": "was killed by SIGSEGV", "SIGABRT": "was killed by SIGABRT", "SIGKILL": r"SIGKILL \(perhaps out of mem",
    "exit": "ended with status 7", "garbage": "which is no answer", "half": "ended with status 0",
    "flood": "answered more than", "list": r"answered '\[1, 2\]', which is no", "stale": "answered request",
    "wrong": "answered what cannot be read", "hang": "timed out", "memory": "was killed by SIGABRT",
}  # fmt: skip
# In an answer that nobody reads nothing is wrong.
UNREAD = ("timer_open", "timer_settle", "timer_close")


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineWorker]:
    monkeypatch.setitem(ENGINES, "faulty", FaultyEngine)
    monkeypatch.setenv("FAULT", str(tmp_path / "fault"))
    with EngineWorker(command=COMMAND, log_file=tmp_path / "worker.log", time_limit_s=30) as worker:
        yield worker


@pytest.fixture
def request_of(worker: EngineWorker, tmp_path: Path) -> Callable[[str], object]:
    """Make the request that has a child do an operation."""
    onnx, file = tmp_path / "fine.onnx", EngineFile("faulty", tmp_path / "fine.faulty", EngineOptions())
    file.path.touch()
    requests: dict[str, Callable[[], object]] = {
        "describe": lambda: worker.describe("faulty"),
        "build": lambda: worker.build("faulty", onnx, EngineOptions(), tmp_path / "fine"),
        "infer": lambda: worker.infer(file, graphs.images(3), threads=1),
        "measure": lambda: worker.measure([file, file], graphs.images(1), AT_ONCE),
        "profile": lambda: worker.profile(file, graphs.images(1)),
        **dict.fromkeys(TIMER, lambda: worker.measure([file, file], graphs.images(1), APART)),
    }

    return lambda operation: requests[operation]()


@pytest.fixture
def fail(tmp_path: Path) -> Callable[[str, str, int], object]:
    """Have children fail in an operation, so many times together."""
    return lambda operation, how, times: (tmp_path / "fault").write_text(f"{operation} {how} {times}")


@pytest.mark.parametrize(
    ("operation", "how"),
    [
        ("describe", "SIGKILL"), ("build", "SIGSEGV"), ("infer", "wrong"), ("measure", "SIGABRT"), ("profile", "half"),
        ("timer_open", "SIGSEGV"), ("timer_warm_up", "garbage"), ("timer_settle", "stale"), ("timer_time", "wrong"),
        ("timer_used", "SIGKILL"), ("timer_close", "exit"), ("build", "memory"), ("infer", "list"), ("build", "flood"),
    ],
)  # fmt: skip
def test_what_is_lost_once_is_answered_by_the_next_process(
    request_of: Callable[[str], object], fail: Callable[[str, str, int], object], operation: str, how: str
) -> None:
    fail(operation, how, 1)
    assert request_of(operation) is not None


@pytest.mark.parametrize(
    ("operation", "how"),
    [
        ("describe", "garbage"), ("build", "SIGABRT"), ("infer", "SIGSEGV"), ("measure", "stale"), ("profile", "wrong"),
        ("timer_open", "SIGABRT"), ("timer_warm_up", "SIGKILL"), ("timer_settle", "SIGSEGV"), ("timer_time", "half"),
        ("timer_used", "wrong"), ("timer_close", "SIGSEGV"), ("infer", "memory"),
    ],
)  # fmt: skip
def test_what_is_lost_twice_is_an_error_that_names_the_end(
    worker: EngineWorker, request_of: Callable[[str], object], fail: Callable[[str, str, int], object],
    operation: str, how: str,
) -> None:  # fmt: skip
    fail(operation, how, 1000)
    with pytest.raises(WorkerLostError, match=rf"^Tried twice \(the first time the worker process .*{SAID[how]}"):
        request_of(operation)
    fail(operation, how, 0)
    assert request_of(operation) is not None


@pytest.mark.parametrize("operation", ["describe", "infer", "timer_time"])
def test_a_hang_lives_within_what_is_left(
    worker: EngineWorker, request_of: Callable[[str], object], fail: Callable[[str, str, int], object], operation: str
) -> None:
    fail(operation, "hang", 1000)
    worker.limits.deadline, begun = Deadline.after(8), time.monotonic()
    with pytest.raises(BuildError, match="timed out"):
        request_of(operation)
    # Half of it, and half of the rest; what a killed child was doing is asked for at most two seconds.
    assert 5 < time.monotonic() - begun < 8 + 4


def test_nothing_is_begun_when_no_time_is_left(worker: EngineWorker, request_of: Callable[[str], object]) -> None:
    worker.limits.deadline = Deadline.after(0)
    with pytest.raises(BuildError, match="was not begun: no time is left of --timeout"):
        request_of("build")
    assert worker.pid is None


def test_the_second_hang_fails_a_candidate(
    worker: EngineWorker, request_of: Callable[[str], object], fail: Callable[[str, str, int], object], tmp_path: Path
) -> None:
    worker.time_limit_s = 3
    fail("build", "hang", 1)
    request_of("build")
    fail("infer", "hang", 1000)
    with pytest.raises(WorkerLostError, match=r"^Running .* timed out"):
        request_of("infer")
    assert (tmp_path / "fault").read_text() == "infer hang 999"
    worker.limits.new_candidate()
    fail("infer", "hang", 1)
    request_of("infer")


def test_a_full_disk_is_no_candidate_s_fault(
    request_of: Callable[[str], object], fail: Callable[[str, str, int], object]
) -> None:
    fail("infer", "full", 1000)
    with pytest.raises(ConfigError, match=r"infer could not write: OSError.*Free some space"):
        request_of("infer")


def test_what_a_killed_build_leaves_is_removed(
    request_of: Callable[[str], object], fail: Callable[[str, str, int], object], tmp_path: Path
) -> None:
    (tmp_path / ".build-abcd1234").mkdir()
    fail("build", "SIGKILL", 1)
    request_of("build")
    assert not list(tmp_path.glob(".build-*"))


def test_a_load_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    load = bench._Load(min(os.sched_getaffinity(0)), RequestLimits())
    with load.working():
        pass
    os.kill(load._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(bench, "_LOAD_ANSWERS_S", 0.2)
    with pytest.raises(BuildError, match=r"keeps a processor busy .* does not answer"), load.working():
        pass
    pid = load._process.pid
    load.close()
    assert not alive(pid)


@pytest.mark.parametrize("occasions", [1, 3])
def test_occasions_are_fewer_where_time_is_short(
    worker: EngineWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, occasions: int
) -> None:
    file = EngineFile("faulty", tmp_path / "fine.faulty", EngineOptions())
    file.path.touch()
    several = Protocol.standard(
        warm_up_s=0, occasions=3, max_occasions=3, min_seconds=0.01, max_seconds=0.01, min_iterations=5, patience_s=0,
        beside_busy=False,
    )  # fmt: skip
    worker.limits.deadline = Deadline.after(600)
    if occasions == 1:
        monkeypatch.setattr(bench, "_ROOM", 1e6)
    assert len(worker.measure([file, file], graphs.images(1), several)[1].occasions) == occasions
