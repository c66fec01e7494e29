"""What the worker does when a runtime crashes, hangs, prints or raises, and when its own process ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autocompress.engines import ENGINES, EngineFile, EngineOptions
from autocompress.errors import BuildError, UnsupportedDtypeError
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.protocol import Protocol
from tests.engines import graphs
from tests.measurement.faulty_child import FaultyEngine

COMMAND = [sys.executable, "-P", str(Path(__file__).with_name("faulty_child.py"))]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineWorker]:
    # The child knows the engine by itself.
    monkeypatch.setitem(ENGINES, "faulty", FaultyEngine)
    with EngineWorker(command=COMMAND, log_file=tmp_path / "logs" / "worker.log", time_limit_s=30) as worker:
        yield worker


@pytest.fixture
def build(worker: EngineWorker, tmp_path: Path) -> Callable[[str], EngineFile]:
    return lambda how: worker.build("faulty", Path(f"{how}.onnx"), EngineOptions(), tmp_path / how)


def alive(pid: int) -> bool:
    """Whether a thread of a process runs; a zombie does not."""
    try:
        stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return Path(f"/proc/{pid}").exists()
    return any(stat.rpartition(")")[2].split()[0] not in "ZX" for stat in stats)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("SIGSEGV", "killed by SIGSEGV"),
        ("SIGABRT", "killed by SIGABRT"),
        ("SIGKILL", r"killed by SIGKILL \(perhaps out of memory\)"),
        ("exit", "ended with status 7"),
    ],
)
def test_a_crash_costs_one_request(
    worker: EngineWorker, build: Callable[[str], EngineFile], how: str, said: str
) -> None:
    first = build("fine")
    pid = worker.pid
    with pytest.raises(BuildError, match=f"{how}.onnx with faulty: the worker process (was )?{said}"):
        build(how)
    assert build("fine") == first
    assert worker.pid != pid


def test_a_crash_tells_the_last_words(build: Callable[[str], EngineFile]) -> None:
    with pytest.raises(BuildError, match="the runtime gave up"):
        build("exit")
    with pytest.raises(BuildError, match="Segmentation fault"):
        build("SIGSEGV")
    with pytest.raises(BuildError, match="It said nothing"):
        build("SIGKILL")


@pytest.mark.parametrize("how", ["hang", "hang_with_gil"])
def test_a_hang_ends_at_the_time_limit_and_says_where_it_was(
    worker: EngineWorker, build: Callable[[str], EngineFile], how: str, tmp_path: Path
) -> None:
    build("fine")
    pid = worker.pid
    worker.time_limit_s = 1
    log = tmp_path / "logs" / "worker.log"
    said = (
        rf"Building {how}.onnx with faulty timed out after 1 s. Its process used \d+\.\d s of processor time "
        r"meanwhile. It was in build \(measurement/faulty_child.py:\d+\), "
        r"called by build \(measurement/child.py:\d+\), "
        rf"called by answer .* See the end of {re.escape(str(log))}\.$"
    )
    with pytest.raises(BuildError, match=said):
        build(how)
    assert pid is not None
    assert not alive(pid)
    written = log.read_text()
    assert f"The threads of process {pid}:" in written and "in _end_with_parent" in written and "in main" in written
    worker.time_limit_s = 30
    build("fine")


def test_a_hang_while_timed_says_whose_call_it_was(worker: EngineWorker, build: Callable[[str], EngineFile]) -> None:
    stuck = build("stuck")
    with pytest.raises(
        BuildError, match=r"Measuring .*stuck.* It was in run .*, called by _settle \(measurement/timers"
    ):
        worker.measure([stuck], graphs.images(1), time_limit_s=1)


def test_a_child_that_never_reads_is_given_up_as_well(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(1000)"]
    # Larger than a pipe holds.
    files = [EngineFile("onnxruntime", tmp_path / f"{i:0200}", EngineOptions()) for i in range(1000)]
    with (
        EngineWorker(command=command, time_limit_s=0.5) as worker,
        pytest.raises(BuildError, match=r"timed out after 0\.5 s"),
    ):
        worker.measure(files, graphs.images(1))


def test_a_device_that_disappears_while_timed(
    worker: EngineWorker, build: Callable[[str], EngineFile], tmp_path: Path
) -> None:
    brief = Protocol(
        warm_up_s=0, min_iterations=200, min_seconds=0.01, max_seconds=0.01, baseline_instances=1, instances=1
    )
    steady, gone = build("fine"), build("unplugged")
    for _ in range(2):
        said = r"unplugged\.faulty stopped running while it was timed, after \d+ calls: OSError: the device fell off"
        with pytest.raises(BuildError, match=said):
            worker.measure([steady, gone], graphs.images(1), brief)
    # The child lives, and nothing that was open on the device is used again.
    assert (tmp_path / "logs" / "worker.log").read_text().count("opened unplugged") == 2
    (measured,) = worker.measure([steady], graphs.images(1), brief)
    assert measured.n >= 200


def test_what_never_settles_is_measured_for_its_time_and_no_longer(
    worker: EngineWorker, build: Callable[[str], EngineFile]
) -> None:
    # Thousands of rounds of two calls would fit into the time, and leave the median uncertain.
    brief = Protocol(warm_up_s=0, min_iterations=1, min_seconds=0, max_seconds=4, rounds=1, baseline_instances=1)
    (measured,) = worker.measure([build("restless")], graphs.images(1), brief)
    assert measured.latency_ms < 0.3


def test_killed_from_outside_while_busy_and_while_idle(
    worker: EngineWorker, build: Callable[[str], EngineFile]
) -> None:
    build("fine")
    assert worker.pid is not None
    # It is asked again, and hangs then.
    worker.time_limit_s = 5
    killer = threading.Timer(0.2, os.kill, (worker.pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(BuildError, match="SIGKILL"):
        build("hang")
    killer.join()
    build("fine")
    pid = worker.pid
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not alive(pid))
    build("fine")


def test_prints_do_not_reach_the_answers(
    worker: EngineWorker, build: Callable[[str], EngineFile], tmp_path: Path
) -> None:
    assert build("noise").path.stem == "noise"
    assert build("fine").path.stem == "fine"
    log = (tmp_path / "logs" / "worker.log").read_text()
    assert "printed by Python" in log
    assert "a lie" in log


def test_errors_keep_class_and_message(
    worker: EngineWorker, build: Callable[[str], EngineFile], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedDtypeError, match=r"^no fp3 here; use fp32$"):
        build("unsupported")
    pid = worker.pid
    with pytest.raises(BuildError, match="build failed: KeyError: 'no such thing'"):
        build("bug")
    assert "Traceback" in (tmp_path / "logs" / "worker.log").read_text()
    assert worker.pid == pid


def test_an_interrupt_leaves_no_stale_answer(
    worker: EngineWorker, build: Callable[[str], EngineFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the tests run in the background, a shell has them ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    build("fine")
    timer = threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        build("hang")
    timer.join()
    signal.signal(signal.SIGINT, before)
    assert build("fine").path.stem == "fine"


def test_close_ends_the_child_and_is_final(build: Callable[[str], EngineFile], worker: EngineWorker) -> None:
    build("fine")
    pid = worker.pid
    assert pid is not None
    worker.close()
    worker.close()
    assert not alive(pid)
    with pytest.raises(Exception, match="closed"):
        build("fine")


def test_a_forgotten_worker_ends_its_child(tmp_path: Path) -> None:
    worker = EngineWorker(command=COMMAND)
    worker.describe("faulty")
    pid = worker.pid
    assert pid is not None
    del worker
    assert not alive(pid)


@pytest.mark.parametrize("end", ["os._exit(1)", "os.kill(os.getpid(), 9)", "sys.exit(0)"])
@pytest.mark.parametrize("busy", [False, True])
def test_neither_child_nor_files_outlive_the_parent(end: str, busy: bool, tmp_path: Path) -> None:
    script = f"""
        import os, pathlib, sys, threading, time
        from autocompress.engines import EngineOptions
        from autocompress.measurement.client import EngineWorker
        worker = EngineWorker(command={COMMAND!r})
        worker.describe("faulty")
        build = lambda: worker.build("faulty", pathlib.Path("hang.onnx"), EngineOptions(), pathlib.Path("x"))
        if {busy}:
            threading.Thread(target=build, daemon=True).start()
            time.sleep(0.2)
        print(worker.pid, flush=True)
        {end}
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )
    assert wait_until(lambda: not alive(int(result.stdout)))
    assert not list(tmp_path.iterdir())


def test_ctrl_c_reaches_the_parent_alone(worker: EngineWorker) -> None:
    worker.describe("faulty")
    assert worker.pid is not None
    assert os.getsid(worker.pid) != os.getsid(0)


def test_the_child_imports_no_framework(worker: EngineWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    for engine in ("openvino", "onnxruntime"):
        pytest.importorskip(engine)
        file = worker.build(engine, graphs.convnet(tmp_path / "model.onnx"), EngineOptions(), tmp_path / "model")
        worker.infer(file, graphs.images(2))
    seen = json.loads(worker.describe("faulty")["device"])
    tops = {name.partition(".")[0] for name in seen["modules"]}
    assert {"numpy", "openvino", "onnxruntime"} <= tops
    assert not tops & {"torch", "torchvision", "torch_pruning", "optuna", "onnx", "onnxscript", "scipy", "pandas"}
    assert "OMP_NUM_THREADS" not in seen["environment"]


def test_requests_of_several_threads_wait_for_each_other(build: Callable[[str], EngineFile]) -> None:
    names = [f"fine{i}" for i in range(8)]
    found: dict[str, str] = {}
    threads = [threading.Thread(target=lambda name=name: found.update({name: build(name).path.stem})) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: name for name in names}
