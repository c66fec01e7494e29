"""The client of the worker: builds, runs and measures engines in a child process with a deadline.

A crash, a hang or an out-of-memory kill in a runtime becomes a `BuildError` here, and the next request gets a new
child. Requests and answers are JSON lines over pipes; arrays go through ``.npy`` files that the child maps.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from autocompress import errors
from autocompress.engines import EngineFile, EngineOptions
from autocompress.engines.base import Array
from autocompress.engines.kernel_attribution import KernelTime
from autocompress.errors import AutoCompressError, BuildError, ConfigError
from autocompress.measurement import overrun
from autocompress.measurement.bench import Bench
from autocompress.measurement.process import ChildProcess, ending, python_command
from autocompress.measurement.protocol import LATENCY, Protocol
from autocompress.runs.records import Measurement

_LOG_LINES = 6
_LOG_BYTES = 16_384
# Lines of faulthandler's report that show our own stack, or lists of modules.
_STACK = ("  File ", "Current thread ", "Thread 0x", "Extension modules:")
_LINE_CHARACTERS = 300


class EngineWorker:
    """A warm child process in which engines are built, run and measured. A context manager.

    The child starts with the first request, is replaced when it died or overran its time, and ends with `close`, with
    this object and with this process. Requests of several threads are answered one after the other.

    `log_file` takes what the child and the runtimes print; without one it is dropped at `close`. `time_limit_s` is for
    one request and includes starting the child. `command` replaces the child's command line; the temporary
    folder is added as its last argument.

    Every request raises:
        BuildError: The runtime refused the graph, crashed, was killed, or ran out of time (`overrun` says doing what).
        AutoCompressError: Whatever the child raised, as the same class with the same message.
    """

    def __init__(
        self, *, log_file: Path | None = None, time_limit_s: float = 300.0, command: Sequence[str] | None = None
    ) -> None:
        self.time_limit_s = time_limit_s
        self._command = tuple(command or python_command("autocompress.measurement.child"))
        self._folder = Path(tempfile.mkdtemp(prefix="autocompress-worker-"))
        self._log = log_file or self._folder / "worker.log"
        self._child: ChildProcess | None = None
        self._lock = threading.Lock()
        self._bench: Bench | None = None
        self._requests = 0
        self._clean = weakref.finalize(self, _remove, self._folder, os.getpid())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the child and remove the temporary files. A closed worker cannot be used again."""
        if self._bench is not None:
            self._bench.close()
        self._drop()
        self._clean()

    def start(self) -> None:
        """Start the child now, without waiting for it; else the first request does."""
        with self._lock:
            self._living_child()

    @property
    def pid(self) -> int | None:
        """The child's process number; None before the first request and after `close`."""
        return None if self._child is None else self._child.pid

    def describe(self, engine: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return an engine's ``name``, ``version``, ``device`` and ``capabilities`` (dtypes, dense ones first).

        `settings` are the engine's own (`EngineOptions.settings`): they may name a device that is not here, and then
        ``runs_here`` is False.
        """
        result: dict[str, Any] = self._ask(
            f"Loading the engine {engine!r}", "describe", engine=engine, settings=dict(settings or {})
        )
        return result

    def build(self, engine: str, onnx: Path, options: EngineOptions, output: Path) -> EngineFile:
        """Build an engine file from an ONNX file, as `Engine.build`."""
        path = self._ask(
            f"Building {onnx} with {engine}",
            "build",
            engine=engine,
            onnx=_absolute(onnx),
            options=options.to_dict(),
            output=_absolute(output),
        )
        return EngineFile(engine, output.with_name(Path(path).name), options)

    def infer(
        self, file: EngineFile, inputs: Array | Path, threads: int | None = None, *, time_limit_s: float | None = None
    ) -> Array:
        """Run ``(n, ...)`` samples and return ``(n, ...)`` outputs, float32.

        `inputs` may be a ``.npy`` file, written once and used for every candidate. Calls of the file's batch size and
        thread count run side by side on `threads` processors, all allowed ones by default. The last batch is padded.
        """
        output = self._folder / "outputs.npy"
        with _Shared(inputs, self._folder) as shared:
            self._ask(
                f"Running {file.path}",
                "infer",
                time_limit_s,
                file=_described(file),
                inputs=shared,
                output=str(output),
                cpus=threads,
            )
        outputs: Array = np.load(output, allow_pickle=False)
        output.unlink()
        return outputs

    def measure(
        self,
        files: Sequence[EngineFile],
        inputs: Array | Path,
        protocol: Protocol | None = None,
        keep_samples: Path | None = None,
        *,
        time_limit_s: float | None = None,
    ) -> list[Measurement]:
        """Measure files against the first one, the baseline, while pinned to as many processors as they keep busy.

        A protocol of occasions, as the standard one (None) is, times each file alone in a process of its own (on a GPU
        all in one fresh process); else all are opened in this worker's child. What they keep busy is their threads, in
        the protocol's throughput mode that times its streams, all that fit by default.
        Each file runs the first ``batch_size`` of the ``(n, ...)`` samples, repeated when there are fewer.
        `keep_samples` names a ``.npz`` that gets the raw samples in ms, ``samples_ms_0`` for the first file and so on.

        Raises:
            ConfigError: No files, files of different thread counts, or more threads than processors.
            BuildError: Also when an engine stops running in the middle, as when its device is gone.
        """
        counts = sorted({file.options.threads for file in files})
        if len(counts) != 1:
            said = f"not of {counts}" if counts else "but there are none"
            raise ConfigError(f"Engine files to compare must be of one thread count, {said}.")
        protocol = protocol or Protocol.standard()
        if protocol.occasions and protocol.mode == LATENCY:
            with _Shared(inputs, self._folder) as shared:
                bench = self._bench = self._bench or Bench(self._another)
                return bench.measure(files, Path(shared), protocol, keep_samples)
        fresh = None
        if keep_samples is not None:
            keep_samples.parent.mkdir(parents=True, exist_ok=True)
            fresh = keep_samples.with_name(f".{keep_samples.name}.new.npz")
        with _Shared(inputs, self._folder) as shared:
            results = self._ask(
                f"Measuring {', '.join(str(file.path) for file in files)}",
                "measure",
                time_limit_s,
                files=[_described(file) for file in files],
                inputs=shared,
                protocol=protocol.to_dict(),
                keep_samples=None if fresh is None else _absolute(fresh),
            )
        if fresh is not None and keep_samples is not None:
            fresh.replace(keep_samples)
        return [Measurement.from_dict(result) for result in results]

    def profile(
        self, file: EngineFile, inputs: Array | Path, *, seconds: float = 0.3, time_limit_s: float | None = None
    ) -> list[KernelTime]:
        """Return an engine file's kernels and their times, as `Engine.kernel_times`, pinned as in `measure`.

        Raises:
            UnavailableError: This runtime does not tell.
        """
        with _Shared(inputs, self._folder) as shared:
            found = self._ask(
                f"Profiling {file.path}", "profile", time_limit_s, file=_described(file), inputs=shared, seconds=seconds
            )
        return [KernelTime.from_dict(kernel) for kernel in found]

    def timer(self, file: EngineFile, operation: str, **arguments: Any) -> Any:
        """Ask the child for one of a timer's operations on a file, as `measurement.bench` does."""
        if operation == "open":
            arguments["file"] = _described(file)
        return self._ask(f"Measuring {file.path}", f"timer_{operation}", None, **arguments)

    def _another(self) -> EngineWorker:
        """Return a worker of the same kind, with the same log."""
        log = None if self._log.parent == self._folder else self._log
        return EngineWorker(log_file=log, time_limit_s=self.time_limit_s, command=self._command)

    # -- the child ----------------------------------------------------------------------------------------------

    def _ask(self, what: str, operation: str, time_limit_s: float | None = None, /, **arguments: Any) -> Any:
        limit = self.time_limit_s if time_limit_s is None else time_limit_s
        with self._lock:
            deadline = time.monotonic() + limit
            child = self._living_child()
            mark, used_s = self._log.stat().st_size, overrun.processor_seconds(child.pid)
            self._requests += 1
            request = {"id": self._requests, "time_limit_s": limit, "operation": operation, "arguments": arguments}
            try:
                answer = child.ask(request, deadline)
            except TimeoutError:
                try:
                    doing = overrun.describe(child.pid, self._log, used_s)
                finally:
                    self._drop()
                where = "" if self._log.parent == self._folder else f" See the end of {self._log}."
                raise BuildError(f"{what} timed out after {limit:g} s.{doing}{where}") from None
            except (EOFError, OSError, ValueError):
                status = child.status()
                self._drop()
                raise BuildError(f"{what}: the worker process {ending(status)}.{self._tail(mark)}") from None
            except BaseException:
                # Interrupted between request and answer: the next request must not read this one's answer.
                self._drop()
                raise
        if "error" in answer:
            raise _error_class(answer["error"])(answer["message"])
        return answer["result"]

    def _living_child(self) -> ChildProcess:
        if not self._clean.alive:
            raise ConfigError("This EngineWorker is closed; make another.")
        if self._child is None or not self._child.usable():
            self._drop()
            self._child = ChildProcess((*self._command, str(self._folder)), self._log)
        return self._child

    def _drop(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None

    def _tail(self, mark: int) -> str:
        """Return the last lines that the child wrote after byte `mark` of its log."""
        try:
            with self._log.open("rb") as log:
                log.seek(max(mark, self._log.stat().st_size - _LOG_BYTES))
                lines = [line.rstrip() for line in log.read().decode(errors="replace").splitlines()]
        except OSError:  # Closed by another thread.
            return ""
        kept = [line[:_LINE_CHARACTERS] for line in lines if line and not line.startswith(_STACK)]
        return " Its last words:\n  " + "\n  ".join(kept[-_LOG_LINES:]) if kept else " It said nothing."


class _Shared:
    """An array as a ``.npy`` file for the child: the user's own, or a temporary one."""

    def __init__(self, inputs: Array | Path, folder: Path) -> None:
        self._inputs, self._folder = inputs, folder
        self._made: Path | None = None

    def __enter__(self) -> str:
        if isinstance(self._inputs, Path):
            return _absolute(self._inputs)
        handle, name = tempfile.mkstemp(dir=self._folder, prefix="inputs-", suffix=".npy")
        self._made = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, self._inputs, allow_pickle=False)
        except OSError as error:
            self._made.unlink(missing_ok=True)
            raise ConfigError(
                f"Cannot write inputs to {self._folder}: {error.strerror or error}. Free some space, or set TMPDIR."
            ) from error
        return name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._made is not None:
            self._made.unlink(missing_ok=True)


def _remove(folder: Path, owner: int) -> None:
    if owner == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)


def _error_class(name: str) -> type[AutoCompressError]:
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, AutoCompressError) else BuildError


def _described(file: EngineFile) -> dict[str, Any]:
    return {"engine": file.engine, "path": _absolute(file.path), "options": file.options.to_dict()}


def _absolute(path: Path) -> str:
    return str(path.absolute())
