"""One child process: started with a clean environment, asked by JSON lines over pipes, ended with its owner."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

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
# Between the pipe's end and the exit status there is at most the kernel's clean-up of a large process. One that the
# kernel cannot end, as it waits for a device, is left to it.
_EXIT_S = 10.0
# The largest answer is the raw samples of one slice of timing, far below.
_LONGEST_ANSWER = 64 * 2**20
# As much of a wrong answer is told.
_TOLD = 60


def python_command(module: str) -> tuple[str, ...]:
    """Return the command that runs a module in a child; nothing in the working directory can stand in for ours (-P)."""
    return sys.executable, "-P", "-m", module


class ChildProcess:
    """One child process, from start to end."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment(),
                # Ctrl-C is for the parent, which then ends the child.
                start_new_session=True,
            )
        self._owner = os.getpid()
        self._rest = bytearray()
        self.end = weakref.finalize(self, end, self._process, self._owner)

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
            EOFError, OSError: The child died.
            ValueError: It wrote what is no answer to this request.
        """
        put, get = self._process.stdin, self._process.stdout
        if put is None or get is None:
            raise EOFError
        unsent = json.dumps(request).encode() + b"\n"
        while unsent:
            # What a pipe is ready for is at least this much; more may wait for a child that does not read.
            wait_for(put.fileno(), select.POLLOUT, deadline)
            unsent = unsent[os.write(put.fileno(), unsent[: select.PIPE_BUF]) :]
        seen = 0
        while (end := self._rest.find(b"\n", seen)) < 0:
            seen = len(self._rest)
            wait_for(get.fileno(), select.POLLIN, deadline)
            data = os.read(get.fileno(), 65_536)
            if not data:
                raise EOFError
            self._rest += data
            if len(self._rest) > _LONGEST_ANSWER:
                raise ValueError(f"answered more than {_LONGEST_ANSWER} bytes")
        line = bytes(self._rest[:end])
        del self._rest[: end + 1]
        return _checked(line, request["id"])

    def status(self) -> int | None:
        """Return the exit status of a child that closed its end; negative is a signal, None when it still runs."""
        try:
            return self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            return None


def _checked(line: bytes, number: int) -> dict[str, Any]:
    """Return an answer; raise ValueError with the words that say what it is instead."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        answer = None
    known = isinstance(answer, dict) and ("result" in answer or {"error", "message"} <= answer.keys())
    if not known:
        raise ValueError(f"answered {line[:_TOLD].decode(errors='replace')!r}, which is no answer")
    if answer.get("id") != number:
        raise ValueError(f"answered request {answer.get('id')!r} instead of {number}")
    return dict(answer)


def ending(status: int | None) -> str:
    """Say how a child with this exit status ended; None for one that still runs."""
    if status is None:
        return "stopped answering"
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was killed by {name}" + (" (perhaps out of memory)" if name == "SIGKILL" else "")


def wait_for(descriptor: int, event: int, deadline: float) -> None:
    """Return when a pipe is ready or broken; raise TimeoutError at `deadline`."""
    poll = select.poll()
    poll.register(descriptor, event)
    while (left := deadline - time.monotonic()) > 0:
        if poll.poll(min(left, _WAKE_S) * 1000):
            return
    raise TimeoutError


def end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Kill a process and close its pipes, unless this one only inherited it by a fork."""
    if owner != os.getpid():
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # What was buffered for a dead child.
                continue
    with suppress(subprocess.TimeoutExpired):
        process.wait(_EXIT_S)


def environment() -> dict[str, str]:
    """Return a child's environment variables."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_DROPPED)}
    paths = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, **_NO_BINDING, **dict.fromkeys(_ONE_THREAD, "1"), "PYTHONPATH": os.pathsep.join(paths)}
