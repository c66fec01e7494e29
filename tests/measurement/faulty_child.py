"""The worker's child with one more engine, which fails in the way that the ONNX file's name says.

It fails in any other request, too: `FAULT` in the environment names a file of ``OPERATION HOW TIMES``.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from autocompress.engines import ENGINES, Engine, EngineFile, EngineOptions, Runner
from autocompress.engines.base import Array
from autocompress.engines.kernel_attribution import KernelTime
from autocompress.errors import UnsupportedDtypeError
from autocompress.measurement import child


class FaultyEngine(Engine):
    name = "faulty"
    suffix = ".faulty"
    extra = "none"

    def version(self) -> str:
        return str(os.getpid())

    def device(self) -> str:
        """The modules of the child and its environment, for the test of what it imports."""
        return json.dumps({"modules": sorted(sys.modules), "environment": dict(os.environ)})

    def capabilities(self) -> Sequence[str]:
        return ("fp32",)

    def build(self, onnx: Path, options: EngineOptions, output: Path) -> EngineFile:
        how = onnx.stem
        if how in ("SIGSEGV", "SIGKILL", "SIGABRT"):
            os.kill(os.getpid(), signal.Signals[how])
        if how == "exit":
            print("the runtime gave up")
            sys.stdout.flush()
            os._exit(7)
        if how == "hang":
            time.sleep(1000)
        if how == "hang_with_gil":
            ctypes.PyDLL(None).sleep(1000)
        if how == "unsupported":
            raise UnsupportedDtypeError("no fp3 here; use fp32")
        if how == "bug":
            raise KeyError("no such thing")
        if how == "noise":
            print("printed by Python", flush=True)
            os.write(1, b'{"id": 1, "result": "a lie"}\n')
            ctypes.CDLL(None).puts(b"printed by C")
        output.with_suffix(self.suffix).touch()
        return EngineFile(self.name, output.with_suffix(self.suffix), options)

    def kernel_times(self, file: EngineFile, inputs: Array, seconds: float) -> list[KernelTime]:
        return []

    def open(self, file: EngineFile, threads: int | None = None) -> Runner:
        return FaultyRunner(file.path.stem)


class FaultyRunner(Runner):
    """Runs until its device is gone after a hundred times, hangs, or takes 10 to 300 µs; cannot be closed."""

    def __init__(self, how: str) -> None:
        self.how, self.runs = how, 0

    def __enter__(self) -> Self:
        print(f"opened {self.how}", flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise OSError("no such device")

    def infer(self, inputs: Array) -> Array:
        return inputs

    def prepare(self, inputs: Array) -> None:
        pass

    def run(self) -> None:
        self.runs += 1
        if self.how == "unplugged" and self.runs > 100:
            raise OSError("the device fell off the bus")
        if self.how == "stuck":
            time.sleep(1000)
        if self.how == "restless":
            end = time.perf_counter_ns() + int(10_000 * 30 ** random.Random(self.runs).random())
            while time.perf_counter_ns() < end:
                pass


def spin() -> None:
    while True:
        pass


# What ends or stops this process.
ENDS: Mapping[str, Callable[[], object]] = {
    **{s.name: partial(os.kill, os.getpid(), s) for s in (signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL)},
    "stop": partial(os.kill, os.getpid(), signal.SIGSTOP),
    "exit": partial(os._exit, 7),
    "hang": partial(time.sleep, 1000),
    "spin": spin,
}
# What is written in place of an answer.
PIECES = {"garbage": b"\xff\x00 nothing that JSON knows\n", "list": b"[1, 2]\n", "half": b'{"id": 1, "res'}


class FaultyChild(child.Child):
    """Fails in the request that `FAULT` names, as often as it says."""

    # The pipe that answers go to.
    answers = 1

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        fault = Path(os.environ.get("FAULT", "/nowhere"))
        operation, how, times = fault.read_text().split() if fault.exists() else ("none", "", "0")
        if request["operation"] != operation or times == "0":
            return super().answer(request)
        fault.write_text(f"{operation} {how} {int(times) - 1}")
        return self.fail(how, request)

    def fail(self, how: str, request: Mapping[str, Any]) -> dict[str, Any]:
        number = request["id"]
        if how in ENDS:
            ENDS[how]()
        if how in PIECES:
            os.write(self.answers, PIECES[how])
        if how == "half":
            os._exit(0)
        while how == "flood":
            os.write(self.answers, b"x" * 65_536)
        if how == "memory":
            self.starve()
        if how == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
            return super().answer(request)
        if how == "stale":
            return {"id": number - 1, "result": None}
        return {"id": number, "result": {"nobody": "asked"}}

    @staticmethod
    def starve() -> None:
        """Use more memory than this process may have, as numpy would, and as C++ would."""
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
        try:
            np.ones(2**28)
        except MemoryError:
            print("terminate called after throwing an instance of 'std::bad_alloc'", flush=True)
            os.kill(os.getpid(), signal.SIGABRT)


if __name__ == "__main__":
    FaultyChild.answers = os.dup(1)
    child.Child = FaultyChild  # type: ignore[misc]
    ENGINES["faulty"] = FaultyEngine
    child.main(*sys.argv[1:2])
