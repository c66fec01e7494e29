"""What a child was doing when its time was up: the stacks of its threads, and how busy it was.

Python's own stacks come from faulthandler, which the client asks by a signal and which answers also while a runtime
holds the GIL. What the threads of a runtime do only the kernel tells (proc(5) ``stat`` and ``wchan``, on Linux).
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil

# Windows has neither the signal nor faulthandler's `register`.
_SIGNAL = getattr(signal, "SIGUSR1", None)
# A stack is written within milliseconds; a process that the kernel does not wake writes none.
_WRITTEN_S, _STILL_S, _LOOK_S = 2.0, 0.1, 0.02
# Of the innermost frames, as many are told in the error's message.
_TOLD_FRAMES = 4
_LOG_BYTES = 262_144
_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+|\?+) in (?P<function>.+)$')
_HEAD = "(most recent call first):"


def listen() -> None:
    """Have this process, a child, write the stacks of its threads to stderr when `describe` asks for them."""
    if _SIGNAL is not None:
        faulthandler.register(_SIGNAL, all_threads=True)


def processor_seconds(pid: int) -> float | None:
    """Return the processor time in s that a process has used; None when it has ended."""
    try:
        used = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    return float(used.user + used.system)


def describe(pid: int, log: Path, used_before_s: float | None) -> str:
    """Return sentences about a living child that overran its time, and append all of its stacks to its log.

    Args:
        pid: The child's process number.
        log: The file that the child's stderr goes to.
        used_before_s: Its `processor_seconds` when the request began.

    Returns:
        Sentences with a space before each; empty when nothing is known.
    """
    used = processor_seconds(pid)
    said = ""
    if used is not None and used_before_s is not None:
        said += f" Its process used {used - used_before_s:.1f} s of processor time meanwhile."
    try:
        with log.open("a") as file:
            file.write(f"Out of time. The threads of process {pid}:\n{_threads(pid)}")
        stacks = _stacks(pid, log, log.stat().st_size)
    except OSError:  # Closed by another thread, or the disk is full.
        return said
    if frames := _main_thread(stacks):
        said += f" It was in {', called by '.join(frames[:_TOLD_FRAMES])}."
    return said


def _stacks(pid: int, log: Path, mark: int) -> str:
    """Ask for the stacks and return what came into the log after byte `mark`."""
    if _SIGNAL is None:
        return ""
    with suppress(ProcessLookupError):
        os.kill(pid, _SIGNAL)
    size, grew = mark, time.monotonic()
    deadline = grew + _WRITTEN_S
    while time.monotonic() < (deadline if size == mark else min(deadline, grew + _STILL_S)):
        time.sleep(_LOOK_S)
        if log.stat().st_size > size:
            size, grew = log.stat().st_size, time.monotonic()
    with log.open("rb") as file:
        file.seek(mark)
        return file.read(_LOG_BYTES).decode(errors="replace")


def _main_thread(stacks: str) -> list[str]:
    """Return the frames of the thread that answers requests, the innermost first, as ``function (file:line)``.

    faulthandler writes the oldest thread last.
    """
    frames: list[str] = []
    for line in stacks.splitlines():
        if line.endswith(_HEAD):
            frames = []
        elif match := _FRAME.match(line):
            path = Path(match["file"])
            frames.append(f"{match['function']} ({path.parent.name}/{path.name}:{match['line']})")
    return frames


def _threads(pid: int) -> str:
    """Return a line for each thread, runtimes' too: name, state, what it waits for in the kernel, processor time."""
    lines = []
    with suppress(OSError):
        for task in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda task: int(task.name)):
            with suppress(OSError, ValueError, IndexError):
                name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
                fields = rest.split()
                ticks = int(fields[11]) + int(fields[12])
                seconds = ticks / os.sysconf("SC_CLK_TCK")
                waits = (task / "wchan").read_text().strip("0\n") or "-"
                lines.append(f"  {task.name} {name}: {fields[0]} {waits}, {seconds:.2f} s\n")
    return "".join(lines)
