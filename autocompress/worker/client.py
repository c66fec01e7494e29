"""The client of the worker: builds, runs and measures engines in a child process with a deadline.

A crash, a hang or an out-of-memory kill in a runtime becomes a `BuildError` here, and the next request gets a new
child. Requests and answers are JSON lines over pipes; arrays go through ``.npy`` files that the child maps.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
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
from autocompress.engines.kernels import KernelTime
from autocompress.errors import AutoCompressError, BuildError, ConfigError
from autocompress.latency.protocol import Protocol
from autocompress.results import Measurement
from autocompress.worker import overrun

# -P: nothing in the user's working directory can stand in for a module of ours.
_COMMAND = (sys.executable, "-P", "-m", "autocompress.worker.child")
_PACKAGE_ROOT = Path(__file__).parents[2]
# Numpy does no linear algebra in the child; its pool of threads would only lie beside what is timed.
_ONE_THREAD = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# OpenVINO's TBB binds the calling thread to all processors of the machine's topology during every call, and back after
# it: what pins a measurement would be undone while it is timed. hwloc, which TBB binds by, then binds nothing.
_NO_BINDING = {"HWLOC_THISSYSTEM": "0"}
# What was set for the parent's OpenMP (torch) must not reach the runtimes.
_DROPPED = ("OMP_", "KMP_", "GOMP_")
# A signal that another thread of the parent caught is handled in this one only when it wakes.
_WAKE_S = 1.0
_LOG_LINES = 6
_LOG_BYTES = 16_384
# Lines of faulthandler's report that show our own stack, or lists of modules.
_STACK = ("  File ", "Current thread ", "Thread 0x", "Extension modules:")
_LINE_CHARACTERS = 300
# Between the pipe's end and the exit status there is at most the kernel's clean-up of a large process.
_EXIT_S = 10.0


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
        self._command = tuple(command or _COMMAND)
        self._folder = Path(tempfile.mkdtemp(prefix="autocompress-worker-"))
        self._log = log_file or self._folder / "worker.log"
        self._child: _Child | None = None
        self._lock = threading.Lock()
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
        self._drop()
        self._clean()

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

        That is their threads, and in the protocol's throughput mode that times its streams, all that fit by default.
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
                protocol=(protocol or Protocol()).to_dict(),
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
                raise BuildError(f"{what}: the worker process {_ending(status)}.{self._tail(mark)}") from None
            except BaseException:
                # Interrupted between request and answer: the next request must not read this one's answer.
                self._drop()
                raise
        if "error" in answer:
            raise _error_class(answer["error"])(answer["message"])
        return answer["result"]

    def _living_child(self) -> _Child:
        if not self._clean.alive:
            raise ConfigError("This EngineWorker is closed; make another.")
        if self._child is None or not self._child.usable():
            self._drop()
            self._child = _Child((*self._command, str(self._folder)), self._log)
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


class _Child:
    """One child process, from start to end."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=_environment(),
                # Ctrl-C is for the parent, which then ends the child.
                start_new_session=True,
            )
        self._owner = os.getpid()
        self._rest = b""
        self.end = weakref.finalize(self, _end, self._process, self._owner)

    @property
    def pid(self) -> int:
        """The process number."""
        return self._process.pid

    def usable(self) -> bool:
        """Return whether it lives and is this process's own, not inherited by a fork."""
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, request: Mapping[str, Any], deadline: float) -> dict[str, Any]:
        """Send a request and return its answer.

        Raises:
            TimeoutError: `deadline` (of `time.monotonic`) passed.
            EOFError, OSError, ValueError: The child died or wrote something else.
        """
        put, get = self._process.stdin, self._process.stdout
        if put is None or get is None:
            raise EOFError
        unsent = json.dumps(request).encode() + b"\n"
        while unsent:
            # What a pipe is ready for is at least this much; more may wait for a child that does not read.
            _await(put.fileno(), select.POLLOUT, deadline)
            unsent = unsent[os.write(put.fileno(), unsent[: select.PIPE_BUF]) :]
        while b"\n" not in self._rest:
            _await(get.fileno(), select.POLLIN, deadline)
            data = os.read(get.fileno(), 65_536)
            if not data:
                raise EOFError
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if answer.get("id") != request["id"]:
            raise ValueError("an answer to another request")
        return answer

    def status(self) -> int | None:
        """Return the exit status of a child that closed its end; negative is a signal, None when it still runs."""
        try:
            return self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            return None


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


def _await(descriptor: int, event: int, deadline: float) -> None:
    """Return when a pipe is ready or broken; raise TimeoutError at `deadline`."""
    poll = select.poll()
    poll.register(descriptor, event)
    while (left := deadline - time.monotonic()) > 0:
        if poll.poll(min(left, _WAKE_S) * 1000):
            return
    raise TimeoutError


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner != os.getpid():
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # What was buffered for a dead child.
                continue
    process.wait()


def _remove(folder: Path, owner: int) -> None:
    if owner == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_DROPPED)}
    paths = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, **_NO_BINDING, **dict.fromkeys(_ONE_THREAD, "1"), "PYTHONPATH": os.pathsep.join(paths)}


def _ending(status: int | None) -> str:
    if status is None:
        return "stopped answering"
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was killed by {name}" + (" (perhaps out of memory)" if name == "SIGKILL" else "")


def _error_class(name: str) -> type[AutoCompressError]:
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, AutoCompressError) else BuildError


def _described(file: EngineFile) -> dict[str, Any]:
    return {"engine": file.engine, "path": _absolute(file.path), "options": file.options.to_dict()}


def _absolute(path: Path) -> str:
    return str(path.absolute())
