"""How often the worker opens what it times."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest

from autocompress.engines.base import Array, Runner
from autocompress.measurement import child as worker_child
from autocompress.measurement.child import Child
from autocompress.measurement.protocol import Protocol

BRIEF = Protocol.quick(warm_up_s=0, min_iterations=1, min_seconds=0, max_seconds=0, rounds=6)


class Opened(Runner):
    """Does nothing, and notes when it is opened and closed."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def __enter__(self) -> Self:
        self.log.append(f"open {self.name}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.log.append(f"close {self.name}")

    def infer(self, inputs: Array) -> Array:
        return inputs

    def prepare(self, inputs: Array) -> None:
        pass

    def run(self) -> None:
        pass


class Bench:
    """A child whose engine opens nothing."""

    def __init__(self, path: Path, *, uses_gpu: bool = False) -> None:
        self.log: list[str] = []
        self.uses_gpu = uses_gpu
        self.child = Child()
        self.child._engine = lambda name: self  # type: ignore[method-assign,assignment,return-value]
        self.files: list[dict[str, Any]] = []
        for name in ("baseline", "candidate"):
            file = path / f"{name}.onnx"
            file.write_bytes(b"0" * 1024)
            self.files.append({"engine": "onnxruntime", "path": str(file), "options": {}})
        self.inputs = str(path / "inputs.npy")
        np.save(self.inputs, np.zeros((1, 2), np.float32))

    def open(self, file: Any) -> Opened:
        return Opened(Path(file.path).stem, self.log)

    def measure(self, protocol: Protocol = BRIEF, count: int = 2) -> None:
        self.child.measure(self.files[:count], self.inputs, protocol.to_dict(), None)


@pytest.fixture(autouse=True)
def _unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_child, "_CAN_PIN", False)


def test_the_baseline_is_open_five_times_and_a_trial_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.measure()
    assert bench.log == ["open baseline", "open candidate"] + ["open baseline"] * 4
    bench.measure()
    assert len(bench.log) == 6


def test_what_decides_is_open_five_times_in_turns_with_the_baseline(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.measure(Protocol(warm_up_s=0, min_iterations=1, min_seconds=0, max_seconds=0, rounds=6))
    assert bench.log == ["open baseline", "open candidate"] * 5


def test_large_files_and_those_of_a_gpu_are_open_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_child, "first_gpu", lambda: None)
    on_gpu = Bench(tmp_path, uses_gpu=True)
    on_gpu.measure()
    assert on_gpu.log == ["open baseline", "open candidate"]
    monkeypatch.setattr(worker_child, "_INSTANCE_BYTES", 2048)
    large = Bench(tmp_path)
    large.measure()
    assert large.log == ["open baseline", "open candidate", "open baseline"]
    monkeypatch.setattr(worker_child, "_INSTANCE_BYTES", 100)
    larger = Bench(tmp_path)
    larger.measure()
    assert larger.log == ["open baseline", "open candidate"]


def test_no_instance_is_the_baseline_of_a_whole_table(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for _ in range(9):
        bench.measure()
    assert bench.log.count("close baseline") == 3 and bench.log.count("open baseline") == 7
    bench.measure()
    # Each was the oldest in its turn, and is open again.
    assert bench.log.count("open baseline") == 8
    assert bench.log.count("open candidate") == 1
