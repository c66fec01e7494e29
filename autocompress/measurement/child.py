"""The worker's process: ``python -m autocompress.measurement.child``. Reads requests on stdin, one JSON object a line.

It imports numpy and a runtime alone. Runtimes print to file descriptor 1, so the answers go to a private duplicate of
it and 1 becomes stderr, which the client sends to a log. It ends when stdin closes, also in the middle of a request.
"""

from __future__ import annotations

import base64
import errno
import faulthandler
import json
import os
import select
import shutil
import sys
import tempfile
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.engines import Engine, EngineFile, EngineOptions, Runner, get_engine
from autocompress.engines.base import Array
from autocompress.errors import AutoCompressError, BuildError, ConfigError
from autocompress.measurement import overrun
from autocompress.measurement.energy import EnergyMeter
from autocompress.measurement.measure import measure, no_garbage_collection
from autocompress.measurement.noise import used_here
from autocompress.measurement.nvml import first_gpu
from autocompress.measurement.protocol import THROUGHPUT, Protocol
from autocompress.measurement.timers import LatencyTimer

# Opened engines kept between requests: the baseline of every measurement must outlive what one candidate opens (its
# ONNX graph and its engine file) and what the one before left. A large model keeps fewer: an opened engine takes
# several times the bytes of its file.
_KEPT = 12
_KEPT_BYTES = 512 * 2**20
# Files larger than this together are not opened side by side to be timed in turns.
_INSTANCE_BYTES = 96 * 2**20
# An instance of a baseline is opened anew after this many measurements.
_RENEWED_EVERY = 3
# Inputs that calls get in turn: none is the last one's.
_FRESH = 8
# Of one file that a measurement names more than once, each has this many numbers for what it opens.
_MOST_COPIES = 1000
# More runners than this for one evaluation cost more compiling and memory than they save.
_MAX_STREAMS = 16
# The client kills at its deadline. Should it be gone and the GIL held, the child ends itself this much later.
_GRACE_S = 10.0
_CAN_PIN = sys.platform == "linux"
# When memory runs out the kernel is to end this process and not the search (0 is neutral, 1000 the first to go).
_OOM_SCORE = "500"
# What a full disk, a quota and a limit of file sizes say.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# Of an opened engine: its engine's name, file, options, stamps of the file, number of the instance.
_Key = tuple[Any, ...]


class Child:
    """The requests. Holds opened engines between them."""

    def __init__(self) -> None:
        self._engines: dict[str, Engine] = {}
        self._open: OrderedDict[_Key, Runner] = OrderedDict()
        # How often a file was the baseline.
        self._used: dict[str, int] = {}
        self._operations: Mapping[str, Callable[..., Any]] = {
            "describe": self.describe,
            "build": self.build,
            "infer": self.infer,
            "measure": self.measure,
            "profile": self.profile,
            "timer_open": self.timer_open,
            "timer_warm_up": self.timer_warm_up,
            "timer_settle": self.timer_settle,
            "timer_time": self.timer_time,
            "timer_used": self.timer_used,
            "timer_close": self.timer_close,
        }
        self._timing = Timing()

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run one request and return its answer, an error included."""
        try:
            result = self._operations[request["operation"]](**request["arguments"])
            return {"id": request["id"], "result": result}
        except AutoCompressError as error:
            return {"id": request["id"], "error": type(error).__name__, "message": str(error)}
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises costs one request, never the child.
            # A disk that is full takes no traceback either.
            with suppress(OSError):
                traceback.print_exc()
            name, message = _explained(request["operation"], error)
            return {"id": request["id"], "error": name, "message": message}

    # -- requests -----------------------------------------------------------------------------------------------

    def describe(self, engine: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return what an engine is on this machine, or on the one that its settings name."""
        found = self._engine(engine)
        version = found.version()
        given = EngineOptions(settings=settings).settings  # type: ignore[arg-type]
        device, capabilities = found.describe(given)
        return {
            "name": found.name,
            "version": version,
            "device": device,
            "capabilities": list(capabilities),
            "runs_here": found.runs_here(given),
        }

    def build(self, engine: str, onnx: str, options: Mapping[str, Any], output: str) -> str:
        """Build an engine file and return its path."""
        built_with = EngineOptions(**options)
        _check_threads(built_with.threads)
        return str(self._engine(engine).build(Path(onnx), built_with, Path(output)).path)

    def infer(self, file: Mapping[str, Any], inputs: str, output: str, cpus: int | None) -> None:
        """Run ``(n, ...)`` inputs of one ``.npy`` in batches and write the outputs, float32, to another."""
        engine_file = _file(file)
        samples = np.load(inputs, mmap_mode="r", allow_pickle=False)
        size = engine_file.options.batch_size
        starts = range(0, len(samples), size)
        if not starts:
            raise ConfigError(f"{inputs} holds no samples.")
        allowed = cpus or len(_allowed_cpus())
        streams = max(1, min(allowed // engine_file.options.threads, len(starts), _MAX_STREAMS))
        with ExitStack() as stack:
            first = self._runner(engine_file)
            head = first.infer(_batch(samples, 0, size))
            if head.shape[:1] != (size,):
                raise BuildError(
                    f"{engine_file.path} returns shape {head.shape} for a batch of {size}; axis 0 must be the batch."
                )
            outputs = np.empty((len(samples), *head.shape[1:]), dtype=np.float32)
            outputs[:size] = head[: len(samples)]

            def share(stream: int) -> None:
                runner = first
                if stream:
                    with opening:
                        runner = stack.enter_context(self._engine(engine_file.engine).open(engine_file))
                for start in starts[1 + stream :: streams]:
                    outputs[start : start + size] = runner.infer(_batch(samples, start, size))[: len(samples) - start]

            opening = threading.Lock()
            with ThreadPoolExecutor(streams) as pool:
                list(pool.map(share, range(streams)))
            np.save(output, outputs, allow_pickle=False)
        self._evict()

    def measure(
        self, files: Sequence[Mapping[str, Any]], inputs: str, protocol: Mapping[str, Any], keep_samples: str | None
    ) -> list[dict[str, Any]]:
        """Measure engine files against the first, pinned to as many processors as they keep busy."""
        engine_files = [_file(file) for file in files]
        threads = max(file.options.threads for file in engine_files)
        timing = Protocol.from_dict(protocol)
        streams = 1
        if timing.mode == THROUGHPUT:
            streams = timing.streams or max(1, len(_allowed_cpus()) // threads)
            _check_threads(threads, streams)
        samples = np.load(inputs, mmap_mode="r", allow_pickle=False)
        batches = [_batch(samples, 0, file.options.batch_size) for file in engine_files]
        on_gpu = any(self._engine(file.engine).uses_gpu for file in engine_files)
        numbered = [(repeat * _MOST_COPIES, file) for repeat, file in _numbered(engine_files)]
        # First of all: it says what is wrong with a file that is not there.
        opened = [[self._runner(file, first)] for first, file in numbered]
        counts = [timing.baseline_instances, *[timing.instances] * (len(numbered) - 1)]
        if timing.mode == THROUGHPUT:
            counts = [streams] * len(numbered)
        else:
            counts = [_instances(f, n, on_gpu=on_gpu) for (_, f), n in zip(numbered, counts, strict=True)]
        # In turns: what is opened later finds other memory free (a VGG-11 beside a busy loop, all of its candidate's
        # instances opened after all of its baseline's: 2.6 % faster than itself).
        for copy in range(1, max(counts)):
            for runners, count, (first, file) in zip(opened, counts, numbered, strict=True):
                if copy < count:
                    runners.append(self._runner(file, first + copy))
        meter, gpu = EnergyMeter(gpu=on_gpu), first_gpu() if on_gpu else None
        try:
            with _pinned(threads * streams):
                names = [str(file.path) for file in engine_files]
                results = measure(opened, batches, timing, threads=threads, names=names, meter=meter, gpu=gpu)
        except BuildError:
            # What is open may be on a device that is gone; the next request opens anew.
            while self._open:
                with suppress(Exception):
                    self._open.popitem()[1].__exit__(None, None, None)
            raise
        if keep_samples is not None:
            # By the place in `files`; the client renames the file into its place.
            np.savez(keep_samples, **{f"samples_ms_{i}": taken for i, (_, taken) in enumerate(results)})  # type: ignore[arg-type]
        if timing.mode != THROUGHPUT and len(opened[0]) > 1:
            self._renew(engine_files[0], len(opened[0]))
        self._evict()
        return [measurement.to_dict() for measurement, _ in results]

    def timer_open(self, file: Mapping[str, Any], inputs: str) -> None:
        """Open one file alone in this process, to be timed with the first samples of a ``.npy`` in turn."""
        engine_file = _file(file)
        kept = self._key(engine_file, 0)
        for key in [key for key in self._open if key != kept]:
            self._open.pop(key).__exit__(None, None, None)
        runner = self._runner(engine_file)
        samples = np.load(inputs, mmap_mode="r", allow_pickle=False)
        size = engine_file.options.batch_size
        starts = range(0, min(len(samples), _FRESH * size), size)
        fresh = [np.array(_batch(samples, start, size)) for start in starts]
        self._timing.open(LatencyTimer([runner], str(engine_file.path), fresh), fresh[0], engine_file.options.threads)

    def timer_warm_up(self, protocol: Mapping[str, Any]) -> bool:
        """Run untimed until the median settles; return whether it did."""
        return self._timing.timer.warm_up(Protocol.from_dict(protocol))

    def timer_settle(self, *, switched: bool) -> None:
        """Run untimed after another process ran."""
        self._timing.timer.settle(switched=switched)

    def timer_time(self, seconds: float, least: int) -> dict[str, Any]:
        """Time calls and return them."""
        piece = self._timing.timer.time(seconds, least)
        samples = base64.b64encode(piece.samples.tobytes()).decode()
        return {"samples": samples, "value": piece.value, "seconds": piece.seconds}

    def timer_used(self) -> tuple[float, int]:
        """Return this process's processor time in s, and how often it lost its processor."""
        return used_here()

    def timer_close(self) -> None:
        """Be as before `timer_open`; the file stays open for the next one."""
        self._timing.close()

    def profile(self, file: Mapping[str, Any], inputs: str, seconds: float) -> list[dict[str, Any]]:
        """Return the kernels of an engine file and their times, pinned as a measurement is."""
        engine_file = _file(file)
        _check_threads(engine_file.options.threads)
        samples = np.load(inputs, mmap_mode="r", allow_pickle=False)
        batch = _batch(samples, 0, engine_file.options.batch_size)
        with _pinned(engine_file.options.threads):
            kernels = self._engine(engine_file.engine).kernel_times(engine_file, batch, seconds)
        return [kernel.to_dict() for kernel in kernels]

    # -- opened engines -----------------------------------------------------------------------------------------

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            self._engines[name] = get_engine(name)
        return self._engines[name]

    def _runner(self, file: EngineFile, copy: int = 0) -> Runner:
        """Return an opened runner, kept from an earlier request when the file has not changed since."""
        _check_threads(file.options.threads)
        key = self._key(file, copy)
        if key not in self._open:
            self._open[key] = self._engine(file.engine).open(file).__enter__()
        self._open.move_to_end(key)
        return self._open[key]

    def _key(self, file: EngineFile, copy: int) -> _Key:
        try:
            stamps = tuple((p.stat().st_mtime_ns, p.stat().st_size) for p in file.files())
        except OSError as error:
            raise BuildError(f"{file.path} cannot be opened: {error.strerror or error}.") from error
        return file.engine, str(file.path), file.options, stamps, copy

    def _renew(self, file: EngineFile, instances: int) -> None:
        """Close one of a baseline's instances now and then, so that none is compared with for a whole table."""
        used = self._used[str(file.path)] = self._used.get(str(file.path), 0) + 1
        if used % _RENEWED_EVERY == 0:
            oldest = self._open.pop(self._key(file, used // _RENEWED_EVERY % instances), None)
            if oldest is not None:
                # What was measured is not to be lost for it.
                with suppress(Exception):
                    oldest.__exit__(None, None, None)

    def _evict(self) -> None:
        """Close the runners used longest ago. The last two stay: the baseline and the candidate."""

        def total() -> int:
            return sum(size for key in self._open for _, size in key[3])

        while len(self._open) > _KEPT or (len(self._open) > 2 and total() > _KEPT_BYTES):
            self._open.popitem(last=False)[1].__exit__(None, None, None)


class Timing:
    """What is timed for the client, slice by slice, while this process is pinned."""

    def __init__(self) -> None:
        self._timer: LatencyTimer | None = None
        self._stack = ExitStack()

    @property
    def timer(self) -> LatencyTimer:
        """The open one."""
        if self._timer is None:
            raise ConfigError("No engine is open to be timed.")
        return self._timer

    def open(self, timer: LatencyTimer, inputs: Array, threads: int) -> None:
        """Bind inputs, pin, and keep the garbage collector off until `close`."""
        self.close()
        timer.prepare(inputs)
        self._stack.enter_context(no_garbage_collection())
        self._stack.enter_context(_pinned(threads))
        self._timer = timer

    def close(self) -> None:
        """Unpin."""
        self._timer = None
        self._stack.close()


def _explained(operation: str, error: Exception) -> tuple[str, str]:
    """Return the class and the message of what a runtime, or numpy, raised."""
    said = traceback.format_exception_only(error)[-1].strip()
    # Of an array that did not fit numpy says "n requested and m written", and no number.
    if isinstance(error, OSError) and (error.errno in _FULL or (error.errno is None and "written" in said)):
        # Of no candidate in particular: the next one would find the disk as full.
        return ConfigError.__name__, f"{operation} could not write: {said}. Free some space, or set TMPDIR."
    if isinstance(error, MemoryError):
        said = f"out of memory ({said}). Free some, or choose a smaller --batch-size"
    return BuildError.__name__, f"{operation} failed: {said}"


def _file(data: Mapping[str, Any]) -> EngineFile:
    return EngineFile(data["engine"], Path(data["path"]), EngineOptions(**data["options"]))


def _instances(file: EngineFile, wanted: int, *, on_gpu: bool) -> int:
    """Return how often to open a file to time it: once on a GPU, whose memory is its own, and when it is large."""
    if on_gpu:
        return 1
    return max(1, min(wanted, _INSTANCE_BYTES // max(file.size_bytes, 1)))


def _numbered(files: Sequence[EngineFile]) -> list[tuple[int, EngineFile]]:
    """Number repeats of one file, so that each gets a runner of its own."""
    return [(list(files[:index]).count(file), file) for index, file in enumerate(files)]


def _batch(samples: Array, start: int, size: int) -> Array:
    """Return `size` samples from `start`; too few are repeated."""
    batch = np.asarray(samples[start : start + size])
    return batch if len(batch) == size else np.resize(batch, (size, *batch.shape[1:]))


def _allowed_cpus() -> list[int]:
    if not _CAN_PIN:
        return list(range(os.cpu_count() or 1))
    return sorted(os.sched_getaffinity(0))


def _check_threads(threads: int, streams: int = 1) -> None:
    """Refuse more threads than processors, whose latency would be that of the scheduler.

    Raises:
        ConfigError: There are fewer processors, or no threads.
    """
    allowed = len(_allowed_cpus())
    if not 1 <= threads <= allowed:
        raise ConfigError(f"Cannot run {threads} threads: this process may use 1 to {allowed}. Change --threads.")
    if threads * streams > allowed:
        raise ConfigError(
            f"Cannot run {streams} streams of {threads} thread{'' if threads == 1 else 's'} each: this process may use "
            f"{allowed} processors. Choose at most {allowed // threads} for --streams."
        )


@contextmanager
def _pinned(threads: int) -> Iterator[None]:
    """Keep every thread of this process on `threads` processors, the highest-numbered it may use.

    Interrupts and other programs favour the low ones. Where the system cannot pin (not Linux), nothing is done.
    """
    allowed = _allowed_cpus()
    _set_affinity(allowed[-threads:])
    try:
        yield
    finally:
        _set_affinity(allowed)


def _set_affinity(cpus: Sequence[int]) -> None:
    """Move all threads, as runtimes made theirs before."""
    if not _CAN_PIN:
        return
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cpus)


def _end_with_parent(folder: str | None) -> None:
    """End this process when the other end of stdin closes, and remove what a killed parent could not."""
    poll = select.poll()
    poll.register(0, 0)
    poll.poll()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def main(folder: str | None = None) -> None:
    """Answer requests until stdin closes, then remove `folder`, the client's temporary one."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    faulthandler.enable()
    overrun.listen()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    # What a killed child leaves of its own temporary files goes with the client's.
    tempfile.tempdir = folder
    child = Child()
    for line in sys.stdin:
        request = json.loads(line)
        faulthandler.dump_traceback_later(request["time_limit_s"] + _GRACE_S, exit=True)
        answer = child.answer(request)
        faulthandler.cancel_dump_traceback_later()
        with suppress(BrokenPipeError):
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    # The thread above ends this process, once it has removed the folder.
    threading.Event().wait(_GRACE_S)


if __name__ == "__main__":
    main(*sys.argv[1:2])
