"""Engine files timed as they run where they are deployed: each alone in a process of its own.

An occasion is one moment: a process for each file, which take turns (A B A, A B A, …) on the same processor, quiet
first and then beside a process that keeps a neighbouring processor busy. What occasions say together is
`measurement.occasions`'s; the order of an occasion is `measurement.measure`'s.
"""

from __future__ import annotations

import base64
import os
import random
import re
import select
import subprocess
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from autocompress.engines import EngineFile, engine_class
from autocompress.engines.base import Array
from autocompress.errors import ConfigError, WorkerLostError
from autocompress.measurement.limits import RequestLimits
from autocompress.measurement.measure import Taken, measure_timers
from autocompress.measurement.noise import Watch, siblings
from autocompress.measurement.occasions import Spread, combined, figures, half_width
from autocompress.measurement.process import end, environment, python_command, wait_for
from autocompress.measurement.protocol import Protocol
from autocompress.measurement.statistics import mad
from autocompress.measurement.timers import Slice, Timer
from autocompress.runs.deadline import timestamp
from autocompress.runs.records import Measurement, Occasion
from autocompress.runs.scratch import ScratchFolder

if TYPE_CHECKING:
    from autocompress.measurement.client import EngineWorker

_Answer = TypeVar("_Answer")
# A process that stays between measurements is replaced after this many: where its memory lies is no property of a file.
_RENEWED_EVERY = 8
# Files that are timed in turns, the baseline included; of more, each has the baseline beside it in a group of its own.
_SIDE_BY_SIDE = 4
# What a load needs to be felt.
_FELT_S = 0.02
# A load answers within milliseconds of its start, which takes seconds on a busy machine.
_LOAD_ANSWERS_S = 30.0
# Another occasion is begun where so many times the longest so far are left.
_ROOM = 1.5


class RemoteTimer(Timer):
    """Times one file in a worker's child.

    Args:
        worker: Whose child has nothing else open meanwhile.
        file: What is timed.
        inputs: A ``.npy`` of samples ``(n, ...)``.
    """

    def __init__(self, worker: EngineWorker, file: EngineFile, inputs: Path) -> None:
        super().__init__(str(file.path))
        self._worker, self._file, self._inputs, self._requests = worker, file, inputs, 0

    def open(self) -> None:
        """Open the file; its inputs are read there."""
        self._ask("open", inputs=str(self._inputs.absolute()))

    def prepare(self, inputs: Array) -> None:
        """Nothing: inputs were bound by `open`."""

    def warm_up(self, protocol: Protocol) -> bool:
        """Run untimed until the median settles."""
        return self._ask("warm_up", read=bool, protocol=protocol.to_dict())

    def settle(self, *, switched: bool = True) -> None:
        """Run untimed."""
        self._ask("settle", switched=switched)

    def time(self, seconds: float, least: int) -> Slice:
        """Time calls."""
        return self._ask("time", read=_slice, seconds=seconds, least=least)

    def joined(self, pieces: Sequence[Slice]) -> float:
        """Return the median of all calls."""
        return float(np.median(np.concatenate([piece.samples for piece in pieces])))

    def used(self) -> tuple[float, int]:
        """Return the process's processor time in s, and how often it lost its processor, but for our requests."""
        seconds, switches = self._ask("used", read=lambda used: (float(used[0]), int(used[1])))
        return seconds, switches - self._requests

    def close(self) -> None:
        """Let the process use all processors again."""
        self._ask("close")

    def _ask(self, operation: str, read: Callable[[Any], _Answer] = lambda answer: answer, **arguments: Any) -> _Answer:
        # Its answer wakes us, often on its own processor.
        self._requests += 1
        return self._worker.timer(self._file, operation, read=read, **arguments)


class Bench:
    """Processes in which files are timed, one each.

    Args:
        another: Starts a worker for one file.
        limits: Say how long it may take; fewer occasions where not all fit.
    """

    def __init__(self, another: Callable[[], EngineWorker], limits: RequestLimits | None = None) -> None:
        self._another, self._limits = another, limits or RequestLimits()
        # The first loss of a process in this measurement: the occasion is taken anew, once.
        self._lost: WorkerLostError | None = None
        self._workers: list[EngineWorker] = []
        self._measured = 0
        # Of its own: what a search draws does not depend on how it was measured.
        self._random = random.Random()
        self._load: _Load | None = None

    def close(self) -> None:
        """End the processes."""
        while self._workers:
            self._workers.pop().close()
        if self._load is not None:
            self._load.close()
            self._load = None

    def measure(
        self, files: Sequence[EngineFile], inputs: Path, protocol: Protocol, keep_samples: Path | None = None
    ) -> list[Measurement]:
        """Measure files on as many occasions as the protocol asks for, and more while the ratio is not known well.

        Where a process is lost, the occasion is taken anew in new ones, once. Where time is short, the occasions are
        fewer, and the interval is as wide as that makes it.

        Args:
            files: The baseline first.
            inputs: A ``.npy`` of samples ``(n, ...)``.
            protocol: How long, how often.
            keep_samples: A ``.npz`` that gets the quiet samples in ms, ``samples_ms_0`` for the first file and so on.
        """
        self._lost = None
        try:
            made, taken = self._side_by_side(files[:_SIDE_BY_SIDE], inputs, protocol)
            for start in range(_SIDE_BY_SIDE, len(files), _SIDE_BY_SIDE - 1):
                others = files[start : start + _SIDE_BY_SIDE - 1]
                more, kept = self._side_by_side([files[0], *others], inputs, protocol)
                made, taken = [*made, *more[1:]], [*taken, *kept[1:]]
        except BaseException:
            # What they were doing, the next measurement must not wait for.
            self.close()
            raise
        if keep_samples is not None:
            _keep(keep_samples, taken)
        return made

    def _side_by_side(
        self, files: Sequence[EngineFile], inputs: Path, protocol: Protocol
    ) -> tuple[list[Measurement], list[list[Taken]]]:
        """Return the files' measurements, and what was taken of each on every occasion."""
        spread = Spread(protocol.deviation, protocol.freedom, protocol.crossed) if protocol.freedom else None
        taken: list[list[Taken]] = [[] for _ in files]
        occasions: list[list[Occasion]] = [[] for _ in files]
        longest = 0.0
        while True:
            begun = time.monotonic()
            quiet, beside = self._occasion(files, inputs, protocol)
            longest = max(longest, time.monotonic() - begun)
            at = timestamp()
            for index in range(len(files)):
                states = dict(figures(quiet[0], quiet[index], loaded=False, usual_ms=protocol.usual_ms))
                if beside:
                    states |= figures(beside[0], beside[index], loaded=True)
                occasions[index].append(Occasion(at, states))
                taken[index].append(quiet[index])
            made = [
                _whole(pieces, moments, spread, baseline=index == 0, precision=protocol.precision)
                for index, (pieces, moments) in enumerate(zip(taken, occasions, strict=True))
            ]
            count = len(occasions[0])
            wide = any(half_width(found) > protocol.precision for found in made[1:])
            enough = count >= protocol.occasions and (not wide or count >= protocol.max_occasions)
            if enough or self._limits.deadline.left() < _ROOM * longest:
                return made, taken

    def _occasion(
        self, files: Sequence[EngineFile], inputs: Path, protocol: Protocol
    ) -> tuple[list[Taken], list[Taken]]:
        once = protocol.occasion()
        gpu = engine_class(files[0].engine).uses_gpu
        try:
            workers = self._ready(1 if gpu else len(files), restart=protocol.restart)
            # A single request is asked again by the worker itself.
            found = _in_one(workers[0], files, inputs, once) if gpu else self._alone(workers, files, inputs, once)
        except WorkerLostError as error:
            if self._lost is not None:
                raise error.after(self._lost) from None
            if gpu or not error.again:
                raise
            self._lost = error
            self.close()
            return self._occasion(files, inputs, protocol)
        if protocol.restart:
            self._end()
        return found

    def _alone(
        self, workers: Sequence[EngineWorker], files: Sequence[EngineFile], inputs: Path, protocol: Protocol
    ) -> tuple[list[Taken], list[Taken]]:
        """Take an occasion with a process for each file."""
        shape = np.load(inputs, mmap_mode="r", allow_pickle=False).shape[1:]
        threads = files[0].options.threads
        cpus = _allowed()[-threads:]
        timers = [RemoteTimer(worker, file, inputs) for worker, file in zip(workers, files, strict=True)]

        def used() -> tuple[float, int]:
            each = [timer.used() for timer in timers]
            return sum(seconds for seconds, _ in each), sum(switches for _, switches in each)

        # What is opened first finds other memory free, and shares more of what the page cache holds.
        for timer in self._random.sample(timers, len(timers)):
            timer.open()
        found = measure_timers(
            timers, [np.empty((file.options.batch_size, *shape), np.float32) for file in files], protocol,
            threads=threads, watch=lambda: Watch(threads, cpus, used),
            load=self._busy(cpus) if protocol.beside_busy else None,
        )  # fmt: skip
        for timer in timers:
            timer.close()
        return found

    def _ready(self, count: int, *, restart: bool) -> list[EngineWorker]:
        """Return a worker for each file, started anew where that is asked for, or due."""
        self._measured += 1
        if restart or self._measured % _RENEWED_EVERY == 0:
            self._end()
        fresh = [self._another() for _ in range(count - len(self._workers))]
        for worker in fresh:
            worker.start()
        self._workers += fresh
        return self._workers[:count]

    def _end(self) -> None:
        while self._workers:
            self._workers.pop().close()

    def _busy(self, cpus: Sequence[int]) -> AbstractContextManager[object] | None:
        beside = neighbour(cpus)
        if beside is None:
            return None
        if self._load is not None and not self._load.serves(beside):
            self._load.close()
            self._load = None
        if self._load is None:
            self._load = _Load(beside, self._limits)
        return self._load.working()


class _Load:
    """A process that keeps a processor busy when told.

    Args:
        cpu: The processor.
        limits: Say how long its answer may take.
    """

    def __init__(self, cpu: int, limits: RequestLimits) -> None:
        self._cpu, self._limits = cpu, limits
        self._process = subprocess.Popen(
            [*python_command("autocompress.measurement.load"), str(cpu)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(), bufsize=0,
            start_new_session=True,
        )  # fmt: skip
        self.close = weakref.finalize(self, end, self._process, os.getpid())

    def serves(self, cpu: int) -> bool:
        """Return whether it lives and is on this processor: files of other thread counts have other neighbours."""
        return self._cpu == cpu and self._process.poll() is None

    @contextmanager
    def working(self) -> Iterator[None]:
        """Keep the processor busy meanwhile."""
        self._tell(b"b")
        time.sleep(_FELT_S)
        try:
            yield
        finally:
            self._tell(b"e")

    def _tell(self, letter: bytes) -> None:
        put, get = self._process.stdin, self._process.stdout
        ended, answered = "has ended", False
        try:
            if put is not None and get is not None:
                put.write(letter)
                wait_for(get.fileno(), select.POLLIN, self._limits.deadline.within(_LOAD_ANSWERS_S).end)
                answered = get.read(1) == letter
        except TimeoutError:
            ended = "does not answer"
        except OSError:
            pass
        if not answered:
            raise WorkerLostError(
                f"The process that keeps a processor busy beside what is timed {ended}. Try again.",
                ending=ended, again=True,
            )  # fmt: skip


def _slice(found: Any) -> Slice:
    """Read a slice of timing from an answer."""
    samples = np.frombuffer(base64.b64decode(found["samples"]), dtype=np.float32)
    return Slice(samples, float(found["value"]), float(found["seconds"]))


def _in_one(
    worker: EngineWorker, files: Sequence[EngineFile], inputs: Path, protocol: Protocol
) -> tuple[list[Taken], list[Taken]]:
    """Take an occasion with all files in one process: two processes on one GPU take turns by slices of its own."""
    with ScratchFolder("samples") as folder:
        kept = folder / "samples.npz"
        measured = worker.measure(files, inputs, protocol, kept)
        with np.load(kept, allow_pickle=False) as samples:
            # Without the rounds, the ratio of all of them is the occasion's.
            return [
                Taken(found, samples[f"samples_ms_{index}"], np.array([found.ratio * measured[0].latency_ms]))
                for index, found in enumerate(measured)
            ], []


def neighbour(cpus: Sequence[int]) -> int | None:
    """Return the processor that shares most with those that are measured on: of the same core, else any other."""
    allowed = [cpu for cpu in _allowed() if cpu not in cpus]
    same = [cpu for cpu in allowed if any(cpu in siblings(measured) for measured in cpus)]
    return max(same or allowed, default=None)


def _whole(
    taken: Sequence[Taken], occasions: Sequence[Occasion], spread: Spread | None, *, baseline: bool, precision: float
) -> Measurement:
    """Return one file's measurement of all occasions."""
    each = [one.measurement for one in taken]
    samples = np.concatenate([one.samples for one in taken])
    p90, p95, p99 = (float(p) for p in np.percentile(samples, (90, 95, 99)))
    energies = [one.energy_mj for one in each if one.energy_mj is not None]
    halves = [one.aa_ratio for one in each]
    found = combined(each[-1], occasions, spread)
    doubtful = not baseline and half_width(found) > 2 * precision
    if baseline:
        found = replace(
            found, ratio=1.0, ratio_low=1.0, ratio_high=1.0, expected_low=1.0, expected_high=1.0, states={}
        )  # fmt: skip
    return replace(
        found, p90_ms=p90, p95_ms=p95, p99_ms=p99, mad_ms=mad(samples), n=len(samples),
        noisy=doubtful or 2 * sum(one.noisy for one in each) > len(each),
        noise=_once(reason for one in each for reason in one.noise),
        aa_ratio=float(np.median(halves)), aa_low=min(halves), aa_high=max(halves),
        throughput_per_s=1e3 * found.batch_size / found.latency_ms,
        energy_mj=float(np.mean(energies)) if energies else None,
    )  # fmt: skip


def _once(reasons: Iterable[str]) -> tuple[str, ...]:
    """Return the reasons, of those that differ in figures alone the first."""
    found: dict[str, str] = {}
    for reason in reasons:
        found.setdefault(re.sub(r"[\d.]+", "", reason), reason)
    return tuple(found.values())


def _keep(path: Path, taken: Sequence[Sequence[Taken]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new.npz")
    arrays = {f"samples_ms_{i}": np.concatenate([one.samples for one in pieces]) for i, pieces in enumerate(taken)}
    try:
        np.savez(fresh, **arrays)  # type: ignore[arg-type]
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise ConfigError(
            f"Cannot write {path}: {error.strerror or error}. Free some space; --resume goes on from here."
        ) from error


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
