"""The two flavours of TensorRT behind one Python API, and what they say while they work.

TensorRT (10 and 11: data centre, desktop, Jetson) builds on the GPU it builds for. TensorRT for RTX builds without one.
Owns importing them, their logger and progress monitor; must not touch a device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from autocompress._optional import optional
from autocompress.engines.tensorrt.compute_capability import TENSORRT, TENSORRT_RTX

# TensorRT's DataType members in our words; those that are missing here (int32, bool…) are not dtypes of layers.
DTYPE_NAMES = {
    "FLOAT": "fp32",
    "HALF": "fp16",
    "BF16": "bf16",
    "INT8": "int8",
    "FP8": "fp8_e4m3",
    "INT4": "int4",
    "FP4": "fp4_e2m1",
}
_LOG_LINES = 4000
_WORDS = 3


@dataclass(frozen=True)
class Flavour:
    """One TensorRT.

    Attributes:
        name: As users write it.
        module: Of its Python package.
        extra: The package extra that installs it.
        suffix: Of its engine files.
        needs_gpu_to_build: Whether it builds on the GPU it builds for.
    """

    name: str
    module: str
    extra: str
    suffix: str
    needs_gpu_to_build: bool

    def library(self) -> Any:
        """Return the imported package.

        Raises:
            MissingDependencyError: It is not installed, or one of its libraries cannot be loaded.
        """
        return optional(self.module, self.extra, f"The engine {self.name!r}")

    def version(self) -> str:
        """Return the library's version, as ``"11.4.0.106"``."""
        return cast(str, self.library().__version__)


FLAVOURS = {
    TENSORRT: Flavour(TENSORRT, "tensorrt", "tensorrt", ".trt.engine", needs_gpu_to_build=True),
    TENSORRT_RTX: Flavour(TENSORRT_RTX, "tensorrt_rtx", "tensorrt-rtx", ".rtx.engine", needs_gpu_to_build=False),
}


class BuildLog:
    """What the library said, in order, with the seconds since the start. Thread-safe: it logs from its own threads."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._lines: list[str] = []
        self._errors: list[str] = []

    def add(self, severity: str, message: str) -> None:
        """Take one message."""
        line = f"{time.monotonic() - self._start:9.3f} {severity:<8} {message.rstrip()}"
        with self._lock:
            if len(self._lines) < _LOG_LINES:
                self._lines.append(line)
            elif len(self._lines) == _LOG_LINES:
                self._lines.append("… more was said than is kept")
            if severity in ("ERROR", "INTERNAL_ERROR"):
                self._errors.append(" ".join(message.split()))

    def text(self) -> str:
        """Return everything, one message a line."""
        with self._lock:
            return "\n".join(self._lines) + "\n" if self._lines else ""

    def words(self) -> str:
        """Return the last errors, for a message; empty when there were none."""
        with self._lock:
            # A machine without a driver is said once, elsewhere, and not after every failure.
            told = [e for e in self._errors if "cudaError 35" not in e] or self._errors
            return " ".join(dict.fromkeys(told[-_WORDS:]))


def make_logger(library: Any, log: BuildLog) -> Any:
    """Return a logger of this library that writes to `log`. It must outlive every object made with it."""
    names = {str(value): name for name, value in library.ILogger.Severity.__members__.items()}

    class Logger(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            name = names.get(str(severity), "INFO")
            if name != "VERBOSE":
                log.add(name, message)

    return Logger()


def make_progress_monitor(library: Any, tell: Callable[[str, str], None]) -> Any:
    """Return a progress monitor of this library that tells each phase of a build as it ends, with its seconds."""

    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self._started: dict[str, tuple[float, int]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._started[phase_name] = (time.monotonic(), num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

        def phase_finish(self, phase_name: str) -> None:
            begun, steps = self._started.pop(phase_name, (time.monotonic(), 0))
            tell("PHASE", f"{phase_name}: {steps} steps in {time.monotonic() - begun:.3f} s")

    return Monitor()
