"""The worker's child with one more engine, which fails in the way that the ONNX file's name says."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from autocompress.engines import ENGINES, Engine, EngineFile, EngineOptions, Runner
from autocompress.engines.base import Array
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


if __name__ == "__main__":
    ENGINES["faulty"] = FaultyEngine
    child.main(*sys.argv[1:2])
