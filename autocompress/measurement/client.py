"""The client of the worker: builds, runs and measures engines in a child process with a deadline.

Requests and answers are JSON lines over pipes; arrays go through ``.npy`` files that the child maps. What is lost with
a child, by a crash, a hang, an out-of-memory kill or an answer that is none, is asked once more of a new one; lost
again, it is a `WorkerLostError`. How long an answer may take is `measurement.limits`'s to say.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from autocompress import errors
from autocompress.engines import EngineFile, EngineOptions
from autocompress.engines.base import Array
from autocompress.engines.kernel_attribution import KernelTime
from autocompress.errors import HUNG, AutoCompressError, BuildError, ConfigError, WorkerLostError
from autocompress.measurement import overrun
from autocompress.measurement.array_file import ArrayFile
from autocompress.measurement.bench import Bench
from autocompress.measurement.limits import RequestLimits
from autocompress.measurement.process import ChildProcess, ending, python_command
from autocompress.measurement.protocol import LATENCY, Protocol
from autocompress.runs.records import Measurement
from autocompress.runs.scratch import ScratchFolder

_Answer = TypeVar("_Answer")
_LOG_LINES = 6
_LOG_BYTES = 16_384
# Lines of faulthandler's report that show our own stack, or lists of modules.
_STACK = ("  File ", "Current thread ", "Thread 0x", "Extension modules:")
_LINE_CHARACTERS = 300
# What of an answer's content can be wrong.
_WRONG = (ArithmeticError, AttributeError, EOFError, LookupError, OSError, TypeError, ValueError)


@dataclass(frozen=True)
class _Request:
    """What a child is asked.

    Attributes:
        what: The beginning of a sentence about its failure.
        operation, arguments: As the child names them.
        engine: That it is for.
        size: How much of it there is: samples, files.
        usual_s: The caller's limit; None for the worker's.
        repeatable: Whether a new child could answer it, too: one of a series could not.
        output: What is built.
    """

    what: str
    operation: str
    arguments: Mapping[str, Any]
    engine: str
    size: float = 1.0
    usual_s: float | None = None
    repeatable: bool = True
    output: Path | None = None


class EngineWorker:
    """A warm child process in which engines are built, run and measured. A context manager.

    The child starts with the first request, is replaced when it died or overran its time, and ends with `close`, with
    this object and with this process. Requests of several threads are answered one after the other.

    `log_file` takes what the child and the runtimes print; without one it is dropped at `close`. `time_limit_s` is for
    one request and includes starting the child; `limits` may make it shorter. `command` replaces the child's command
    line; the temporary folder is added as its last argument.

    Every request raises:
        WorkerLostError: The runtime crashed, was killed, or ran out of time (`overrun` says doing what), and did so
            again in a new child where that was worth trying.
        BuildError: The runtime refused the graph, or no time is left for the request.
        AutoCompressError: Whatever the child raised, as the same class with the same message.
    """

    def __init__(
        self, *, log_file: Path | None = None, time_limit_s: float = 300.0, command: Sequence[str] | None = None,
        limits: RequestLimits | None = None,
    ) -> None:  # fmt: skip
        self.time_limit_s = time_limit_s
        self.limits = limits or RequestLimits()
        self._command = tuple(command or python_command("autocompress.measurement.child"))
        self._scratch = ScratchFolder("worker")
        self._folder = self._scratch.path
        self._log = log_file or self._folder / "worker.log"
        self._child: ChildProcess | None = None
        self._lock = threading.Lock()
        self._bench: Bench | None = None
        self._requests = 0

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
        self._scratch.close()

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
        arguments = {"engine": engine, "settings": dict(settings or {})}
        return self._ask(_Request(f"Loading the engine {engine!r}", "describe", arguments, engine), _description)

    def build(self, engine: str, onnx: Path, options: EngineOptions, output: Path) -> EngineFile:
        """Build an engine file from an ONNX file, as `Engine.build`."""

        def built(path: Any) -> EngineFile:
            file = output.with_name(Path(path).name)
            if not file.exists():
                raise ValueError(f"{file} is not there")
            return EngineFile(engine, file, options)

        arguments = {
            "engine": engine, "onnx": _absolute(onnx), "options": options.to_dict(), "output": _absolute(output),
        }  # fmt: skip
        what = f"Building {onnx} with {engine}"
        return self._ask(_Request(what, "build", arguments, engine, output=output), built)

    def infer(
        self, file: EngineFile, inputs: Array | Path, threads: int | None = None, *, time_limit_s: float | None = None
    ) -> Array:
        """Run ``(n, ...)`` samples and return ``(n, ...)`` outputs, float32.

        `inputs` may be a ``.npy`` file, written once and used for every candidate. Calls of the file's batch size and
        thread count run side by side on `threads` processors, all allowed ones by default. The last batch is padded.
        """
        output = self._folder / "outputs.npy"
        shared = ArrayFile(inputs, self._folder)
        with shared as path:
            arguments = {"file": _described(file), "inputs": path, "output": str(output), "cpus": threads}
            request = _Request(
                f"Running {file.path}", "infer", arguments, file.engine, size=len(shared), usual_s=time_limit_s
            )
            return self._ask(request, lambda _: _taken(output, len(shared)))

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
            with ArrayFile(inputs, self._folder) as shared:
                bench = self._bench = self._bench or Bench(self._another, self.limits)
                return bench.measure(files, Path(shared), protocol, keep_samples)
        fresh = None
        if keep_samples is not None:
            keep_samples.parent.mkdir(parents=True, exist_ok=True)
            fresh = keep_samples.with_name(f".{keep_samples.name}.new.npz")
        with ArrayFile(inputs, self._folder) as shared:
            arguments = {
                "files": [_described(file) for file in files], "inputs": shared, "protocol": protocol.to_dict(),
                "keep_samples": None if fresh is None else _absolute(fresh),
            }  # fmt: skip
            what = f"Measuring {', '.join(str(file.path) for file in files)}"
            request = _Request(
                what, "measure", arguments, files[0].engine, size=len(files), usual_s=time_limit_s
            )  # fmt: skip
            measured = self._ask(request, lambda results: _measurements(results, len(files)))
        if fresh is not None and keep_samples is not None:
            fresh.replace(keep_samples)
        return measured

    def profile(
        self, file: EngineFile, inputs: Array | Path, *, seconds: float = 0.3, time_limit_s: float | None = None
    ) -> list[KernelTime]:
        """Return an engine file's kernels and their times, as `Engine.kernel_times`, pinned as in `measure`.

        Raises:
            UnavailableError: This runtime does not tell.
        """
        with ArrayFile(inputs, self._folder) as shared:
            arguments = {"file": _described(file), "inputs": shared, "seconds": seconds}
            request = _Request(f"Profiling {file.path}", "profile", arguments, file.engine, usual_s=time_limit_s)
            return self._ask(request, lambda kernels: [KernelTime.from_dict(kernel) for kernel in kernels])

    def timer(
        self, file: EngineFile, operation: str, *, read: Callable[[Any], _Answer] = lambda answer: answer,
        **arguments: Any,
    ) -> _Answer:  # fmt: skip
        """Ask the child for one of a timer's operations on a file, as `measurement.bench` does.

        A new child knows nothing of the operations before: what is lost here the caller begins anew.
        """
        if operation == "open":
            arguments["file"] = _described(file)
        request = _Request(
            f"Measuring {file.path}", f"timer_{operation}", arguments, file.engine, repeatable=False
        )  # fmt: skip
        return self._ask(request, read)

    def _another(self) -> EngineWorker:
        """Return a worker of the same kind, with the same log and the same limits."""
        log = None if self._log.parent == self._folder else self._log
        return EngineWorker(
            log_file=log, time_limit_s=self.time_limit_s, command=self._command, limits=self.limits
        )  # fmt: skip

    # -- the child ----------------------------------------------------------------------------------------------

    def _ask(self, request: _Request, read: Callable[[Any], _Answer]) -> _Answer:
        """Return what `read` makes of the answer; ask a second child where the first one was lost."""
        with self._lock:
            try:
                return self._attempt(request, read)
            except WorkerLostError as first:
                if not (request.repeatable and first.again):
                    raise
                try:
                    return self._attempt(request, read)
                except WorkerLostError as second:
                    raise second.after(first) from None

    def _attempt(self, request: _Request, read: Callable[[Any], _Answer]) -> _Answer:
        usual = self.time_limit_s if request.usual_s is None else request.usual_s
        onnx = request.arguments.get("onnx")
        limit = self.limits.seconds(
            request.operation, request.engine, request.size, usual, None if onnx is None else Path(onnx)
        )
        if limit <= 0:
            raise BuildError(f"{request.what} was not begun: no time is left of --timeout.")
        begun = time.monotonic()
        child = self._living_child()
        mark, used_s = self._log.stat().st_size, overrun.processor_seconds(child.pid)
        self._requests += 1
        message = {
            "id": self._requests, "time_limit_s": limit, "operation": request.operation,
            "arguments": request.arguments,
        }  # fmt: skip
        try:
            answer = child.ask(message, begun + limit)
            if "error" not in answer:
                result = read(answer["result"])
        except TimeoutError:
            raise self._hung(request, child, limit, used_s) from None
        except (EOFError, BrokenPipeError, ConnectionError):
            status = child.status()
            self._lose(request)
            raise self._lost(request, ending(status), self._tail(mark)) from None
        except _WRONG as error:
            # What it says next is not to be believed either.
            self._lose(request)
            told = str(error) if isinstance(error, ValueError) and str(error).startswith("answered") else None
            told = told or f"answered what cannot be read ({type(error).__name__}: {error})"
            raise self._lost(request, told, self._tail(mark)) from None
        except BaseException:
            # Interrupted between request and answer: the next request must not read this one's answer.
            self._lose(request)
            raise
        if "error" in answer:
            raise _error_class(str(answer["error"]))(str(answer["message"]))
        self.limits.answered(request.operation, request.engine, request.size, time.monotonic() - begun)
        return result

    def _lost(self, request: _Request, ended: str, tail: str) -> WorkerLostError:
        return WorkerLostError(
            f"{request.what}: the worker process {ended}.{tail}", ending=ended, again=not self.limits.deadline.passed()
        )

    def _hung(
        self, request: _Request, child: ChildProcess, limit: float, used_before_s: float | None
    ) -> WorkerLostError:
        """Kill a child whose time is up, and return the error that says what it was doing."""
        used_s = overrun.processor_seconds(child.pid)
        used = None if used_s is None or used_before_s is None else used_s - used_before_s
        try:
            doing = overrun.describe(child.pid, self._log, used_before_s)
        finally:
            self._lose(request)
        where = "" if self._log.parent == self._folder else f" See the end of {self._log}."
        return WorkerLostError(
            f"{request.what} timed out after {round(limit, 1):g} s.{doing}{where}", ending=HUNG,
            again=self.limits.again_after_hang(limit, used),
        )  # fmt: skip

    def _lose(self, request: _Request) -> None:
        """End the child, and remove what it leaves of a build."""
        self._drop()
        if request.output is not None:
            for left in request.output.parent.glob(".build-*"):
                shutil.rmtree(left, ignore_errors=True)

    def _living_child(self) -> ChildProcess:
        if not self._scratch.alive:
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


def _description(answer: Any) -> dict[str, Any]:
    """Return an engine's description, with everything it has to have."""
    for key in ("name", "version", "device", "capabilities", "runs_here"):
        _ = answer[key]
    return dict(answer)


def _taken(path: Path, count: int) -> Array:
    """Return the outputs in a file of the child, and remove it."""
    outputs: Array = np.load(path, allow_pickle=False)
    path.unlink()
    if len(outputs) != count:
        raise ValueError(f"answered with {len(outputs)} outputs for {count} samples")
    return outputs


def _measurements(results: Any, count: int) -> list[Measurement]:
    found = [Measurement.from_dict(result) for result in results]
    if len(found) != count:
        raise ValueError(f"answered with {len(found)} measurements of {count} files")
    return found


def _error_class(name: str) -> type[AutoCompressError]:
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, AutoCompressError) else BuildError


def _described(file: EngineFile) -> dict[str, Any]:
    return {"engine": file.engine, "path": _absolute(file.path), "options": file.options.to_dict()}


def _absolute(path: Path) -> str:
    return str(path.absolute())
