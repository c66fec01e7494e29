"""Runtimes that crash, hang, run out of memory or answer nonsense, in every request and at every stage of a search.

    python -m benchmarks.faults.runtimes [--part requests] [--part stages] [--part machine]

``requests``: each request of the measuring process meets each fault once (a new process answers) and always (an error
that names the end). ``stages``: whole searches of a tiny network under --timeout, in which the process fails at a
stage. ``machine``: clocks that are set, damaged caches, full disks, memory limits. Writes
``benchmarks/faults/results/runtimes.csv``: fault, request, stage, seconds, the deadline they had, what came of it, and
what was lost. Rows of other parts are kept.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import autocompress
from autocompress.engines import ENGINES, EngineFile, EngineOptions
from autocompress.engines.tensorrt.locked_cache import LockedCache
from autocompress.errors import AutoCompressError
from autocompress.exploration.sensitivity_cache import SensitivityCache
from autocompress.measurement import client
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.limits import RequestLimits
from autocompress.measurement.protocol import Protocol
from autocompress.runs.deadline import Deadline, timestamp
from autocompress.runs.observer import Observer
from autocompress.runs.records import TrialRecord
from autocompress.runs.scratch import sweep
from benchmarks.faults import soak
from tests.measurement.faulty_child import FaultyEngine

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "runtimes.csv"
COLUMNS = ("part", "fault", "request", "stage", "times", "seconds", "deadline_s", "outcome", "lost", "said")
COMMAND = (sys.executable, "-P", str(ROOT / "tests" / "measurement" / "faulty_child.py"))
OPERATIONS = (
    "describe", "build", "infer", "measure", "profile",
    *(f"timer_{name}" for name in ("open", "warm_up", "settle", "time", "used", "close")),
)  # fmt: skip
# SIGKILL is how a cgroup's memory limit ends a process; `memory` is one that RLIMIT_AS refuses.
FAULTS = ("SIGSEGV", "SIGABRT", "SIGKILL", "exit", "memory", "garbage", "half", "stale", "hang")
# Of those, what meets each request once, too: a crash, and nonsense.
ONCE = ("SIGSEGV", "garbage")
ALWAYS = 10**6
_AT_ONCE = Protocol(warm_up_s=0, min_iterations=5, min_seconds=0, max_seconds=0.01, rounds=2, baseline_instances=1)
# Of a request that hangs.
_HANGS_S, _USUAL_S = 8.0, 30.0
_SAID = 160


def row(part: str, fault: str, request: str, stage: str, times: str, **values: Any) -> dict[str, Any]:
    """Return a row, and print it."""
    found = {"part": part, "fault": fault, "request": request, "stage": stage, "times": times, **values}
    print(*(f"{found.get(key, '')}"[:60] for key in COLUMNS), sep=" | ", flush=True)
    return found


def told(error: BaseException) -> str:
    """Return the beginning of an error, without the folders of this machine."""
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/[\w-]+", "TMP", f"{type(error).__name__}: {error}")
    return text.replace("\n", " ")[:_SAID]


# -- requests -----------------------------------------------------------------------------------------------------


def requests(scratch: Path) -> Iterator[dict[str, Any]]:
    """Give every fault to every request."""
    ENGINES["faulty"] = FaultyEngine
    control = scratch / "fault"
    os.environ["FAULT"] = str(control)
    file = EngineFile("faulty", scratch / "fine.faulty", EngineOptions())
    file.path.touch()
    images = np.zeros((3, 3, 8, 8), np.float32)
    apart = Protocol.standard(
        warm_up_s=0, occasions=1, max_occasions=1, min_seconds=0.01, max_seconds=0.01, min_iterations=5, patience_s=0,
        beside_busy=False,
    )  # fmt: skip
    for operation in OPERATIONS:
        for how in FAULTS:
            for times in (1, ALWAYS) if how in ONCE else (ALWAYS,):
                limit = _HANGS_S if how == "hang" else _USUAL_S
                limits = RequestLimits(Deadline.after(limit))
                control.write_text(f"{operation} {how} {times}")
                with EngineWorker(command=COMMAND, limits=limits) as worker:
                    asked: dict[str, Callable[[EngineWorker], object]] = {
                        "describe": lambda worker: worker.describe("faulty"),
                        "build": lambda worker: worker.build(
                            "faulty", scratch / "fine.onnx", EngineOptions(), scratch / "fine"
                        ),
                        "infer": lambda worker: worker.infer(file, images, threads=1),
                        "measure": lambda worker: worker.measure([file, file], images, _AT_ONCE),
                        "profile": lambda worker: worker.profile(file, images),
                    }
                    ask = asked.get(operation, lambda worker: worker.measure([file, file], images, apart))
                    begun = time.monotonic()
                    outcome, lost, said = "answered", "nothing", ""
                    try:
                        ask(worker)
                    except AutoCompressError as error:
                        outcome, lost, said = "error", "the request", told(error)
                    yield row(
                        "requests", how, operation, "", "once" if times == 1 else "always",
                        seconds=round(time.monotonic() - begun, 1), deadline_s=limit, outcome=outcome, lost=lost,
                        said=said,
                    )  # fmt: skip


# -- stages -------------------------------------------------------------------------------------------------------

# Fault, request, the stage at whose beginning it is switched on, how often, and the --timeout.
STAGES = (
    ("hang", "build", "Measuring the baseline", ALWAYS, 60), ("hang", "describe", "Reading the model", ALWAYS, 60),
    ("SIGKILL", "timer_time", "Measuring the baseline", 1, 60), ("SIGKILL", "infer", "Reading the test data", 1, 60),
    ("SIGKILL", "timer_time", "Measuring the best again", 1, 60), ("SIGSEGV", "build", "Searching", 3, 60),
    ("SIGKILL", "timer_time", "Reading the test data", 1, 60), ("hang", "build", "Searching", ALWAYS, 60),
    ("hang", "timer_time", "Reading the test data", ALWAYS, 60),
    ("SIGSEGV", "timer_time", "Measuring the best again", 2, 60),
    ("SIGSEGV", "timer_time", "Measuring the baseline", ALWAYS, 60),
    ("hang", "timer_time", "Measuring the baseline", ALWAYS, 60),
    ("garbage", "timer_warm_up", "Reading the test data", 1, 60), ("SIGABRT", "infer", "Searching", 3, 60),
)  # fmt: skip


class Switch(Observer):
    """Switches a fault on when a stage begins, and counts trials."""

    def __init__(self, control: Path, stage: str, fault: str) -> None:
        self.control, self.at, self.fault = control, stage, fault
        self.finished = self.failed = 0

    def stage(self, text: str) -> None:
        """Switch it on."""
        if text.startswith(self.at) and self.fault:
            self.control.write_text(self.fault)
            self.fault = ""

    def trial(self, record: TrialRecord) -> None:
        """Count."""
        self.finished += record.state == "complete"
        self.failed += record.state == "failed"


def stages(scratch: Path) -> Iterator[dict[str, Any]]:
    """Search a tiny network with a process that fails at a stage."""
    control = scratch / "fault"
    os.environ["FAULT"] = str(control)
    client.python_command = lambda module: COMMAND  # type: ignore[assignment]
    real = Protocol.again, Protocol.trial

    def short(_: type[Protocol], *__: object) -> Protocol:
        return Protocol.standard(
            warm_up_s=0, occasions=1, max_occasions=1, min_seconds=0.05, max_seconds=0.05, min_iterations=5,
            patience_s=0, beside_busy=False,
        )  # fmt: skip

    Protocol.again = Protocol.trial = classmethod(short)  # type: ignore[assignment, method-assign]
    for how, request, stage, times, timeout in STAGES:
        control.write_text("none none 0")
        run, switch = scratch / "run", Switch(control, stage, f"{request} {how} {times}")
        shutil.rmtree(run, ignore_errors=True)
        begun, outcome, said = time.monotonic(), "finished", ""
        try:
            autocompress.search(
                soak.task(16, 2), engine="openvino", n_trials=4, target_latency="0.9x", out=run, observer=switch,
                first_candidates=False, stop_early=False, timeout=f"{timeout}s", table="none",
                sets=["recovery.enabled=false"],
            )  # fmt: skip
        except AutoCompressError as error:
            outcome, said = f"exit {error.exit_code}", told(error)
        seconds = round(time.monotonic() - begun, 1)
        lost = f"{switch.failed} of {switch.failed + switch.finished} trials" if switch.failed else "nothing"
        if outcome != "finished":
            lost = "verification; --resume goes on" if switch.finished else "all: there is no baseline"
        yield row(
            "stages", how, request, stage, "always" if times == ALWAYS else str(times), seconds=seconds,
            deadline_s=timeout, outcome=outcome, lost=lost, said=said,
        )  # fmt: skip
    Protocol.again, Protocol.trial = real  # type: ignore[method-assign]
    del os.environ["FAULT"]


# -- machine ------------------------------------------------------------------------------------------------------


@contextmanager
def timed(found: list[dict[str, Any]], fault: str, request: str, *, expected: str) -> Iterator[None]:
    """Add the row of a block; what it is to lose is `expected`."""
    begun, outcome, said = time.monotonic(), "went on", ""
    try:
        yield
    except AutoCompressError as error:
        outcome, said = f"exit {error.exit_code}", told(error)
    values = {"seconds": round(time.monotonic() - begun, 1), "deadline_s": "", "outcome": outcome, "said": said}
    found.append(row("machine", fault, request, "", "always", lost=expected, **values))


def machine(scratch: Path) -> Iterator[dict[str, Any]]:
    """Set clocks, damage caches, fill disks, limit memory."""
    found: list[dict[str, Any]] = []
    real = time.time
    for jump in (-86_400.0, 86_400.0):
        with timed(found, f"the clock jumps by {jump:+.0f} s", "deadline, occasions", expected="nothing"):
            whole, at = Deadline.after(60), timestamp()
            time.time = lambda jump=jump: real() + jump  # type: ignore[assignment, misc]
            assert 59 < whole.left() <= 60 and 0 <= timestamp() - at < 1
        time.time = real
    heard: list[str] = []
    for damage, content in (("bits flipped", b"\0" * 500), ("cut short", b"ab"), ("empty", b"")):
        cache = LockedCache(scratch / "timing.cache", heard.append)
        with timed(found, f"engine cache {damage}", "build", expected="the cache, which is made anew"):
            cache.path.write_bytes(content)
            assert cache.read() == b""
            cache.update(lambda old: b"fresh")
            assert cache.read() == b"fresh"
    losses: Any = object.__new__(SensitivityCache)
    losses.path = scratch / "losses.jsonl"
    with timed(found, "sensitivity cache with bytes that are no text", "profile", expected="the damaged lines"):
        losses.path.write_bytes(b'\xff\xfe\n{"parameter": "a", "choice": 1, "loss": 2}\nnull\n[]\n')
        assert losses.read() == {"a": {1: 2.0}}
    os.environ.pop("FAULT", None)
    for name, limit in (("files", resource.RLIMIT_FSIZE), ("memory", resource.RLIMIT_AS)):
        # `-S` leaves the hard limit; ulimit counts KiB.
        flag, size = ("f", 4) if limit == resource.RLIMIT_FSIZE else ("v", 1_200_000)
        limited = ("sh", "-c", f'ulimit -{flag} {size}; exec "$@"', "limited", *COMMAND)
        ENGINES["faulty"] = FaultyEngine
        file = EngineFile("faulty", scratch / "fine.faulty", EngineOptions())
        file.path.touch()
        inputs = scratch / "inputs.npy"
        shape = (20_000_000 if name == "memory" else 2_000, 10)
        np.lib.format.open_memmap(inputs, "w+", np.float32, shape).flush()
        with (
            timed(found, f"RLIMIT on {name}", "infer", expected="the request"),
            EngineWorker(command=limited) as worker,
        ):
            worker.infer(file, inputs, threads=1)
    for kind in ("folder of a killed process", "folder of a living one"):
        with timed(found, f"temporary {kind}", "start", expected="nothing"):
            left = scratch / f"autocompress-{len(kind)}"
            left.mkdir()
            (left / "owner.lock").touch()
            if "killed" in kind:
                assert sweep(scratch) == 1
            else:
                with EngineWorker() as worker:
                    held = worker._folder
                    sweep(held.parent)
                    assert held.is_dir()
    yield from found


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"requests": requests, "stages": stages, "machine": machine}
    parser.add_argument("--part", action="append", choices=parts)
    chosen = parser.parse_args().part or list(parts)
    kept: list[dict[str, Any]] = []
    if RESULTS.exists():
        with RESULTS.open() as file:
            kept = [old for old in csv.DictReader(file) if old["part"] not in chosen]
    with tempfile.TemporaryDirectory() as name:
        os.environ["AUTOCOMPRESS_CACHE"] = str(Path(name) / "cache")
        made = [one for part in chosen for one in parts[part](Path(name))]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows([*kept, *made])
    print(f"{len(kept) + len(made)} rows in {RESULTS}")


if __name__ == "__main__":
    main()
