"""A task small enough to search in seconds, the command line on it, and one finished run for every test to read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from autocompress.tasks import Task

# Two classes of 8x8 images, told apart by which half is brighter. Timing is cut short: what is searched here is logic,
# and the protocol has its own tests. One process for all files, one moment.
TASK = """
from functools import partial

import torch
from torch import nn

from autocompress import ClassificationTask
from autocompress.measurement.protocol import Protocol
from autocompress.tasks import load_weights


def brief(protocol, **changes):
    return protocol(warm_up_s=0.01, min_iterations=20, min_seconds=0.05, max_seconds=0.1, rounds=5)


Protocol.standard = Protocol.trial = classmethod(brief)


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 2
    inputs = torch.randn(count, 1, 8, 8, generator=generator) / 2
    inputs[..., :4] += (0.3 - 0.6 * targets.float()).view(-1, 1, 1, 1)
    return inputs, targets


class Net(nn.Sequential):
    def __init__(self, width=16):
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2),
        )


class Decides(Net):
    def forward(self, inputs):
        outputs = super().forward(inputs)
        return outputs if outputs.sum() > 0 else -outputs


def make(kind=Net):
    # Sums of two threads differ in their last digits: the weights would depend on the machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = kind()
    inputs, targets = images(128, 0)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(nn.Sequential.forward(model, inputs), targets).backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return ClassificationTask(model.eval(), (inputs, targets), images(64, 1), name="tiny", calibration_size=64)


def wide():
    # Seven widths of two groups: more networks than a test can try before it is stopped.
    return make(partial(Net, 128))


def decides():
    return make(Decides)


def weighted(config):
    model = Net()
    load_weights(model, config.weights)
    return ClassificationTask(model, images(128, 0), images(64, 1))


def empty():
    return ClassificationTask(Net(), images(0, 0), images(64, 1))
"""
QUICK = ("--set", "recovery.epochs=0.5", "--set", "recovery.candidates=1", "--set", "recovery.batch_size=32")
_finished: list[Path] = []


def made(kind: str) -> Task:
    """Return a task of `TASK` as an object of this process."""
    names: dict[str, Any] = {}
    exec(TASK, names)
    task: Task = names[kind]()
    return task


def write_task(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny_task.py").write_text(TASK)
    return folder


def command(*words: str) -> list[str]:
    return [sys.executable, "-W", "error::DeprecationWarning:autocompress", "-m", "autocompress", *words]


def environment(**changes: str) -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [changes.pop("path", ""), root]))
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "80", **changes}


def run(*words: str, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        command(*words), cwd=cwd, env=environment(**changes), capture_output=True, text=True, check=False, timeout=120
    )


def finished(make_folder: Callable[[str], Path]) -> tuple[Path, str, str]:
    """Return a finished run, the stdout of the search that made it and its stderr; made once a session. Read only."""
    if not _finished:
        folder = write_task(make_folder("finished"))
        # Of a network this small every change makes it slower; what is offered here is logic.
        plain = ("--set", "first_candidates=false")
        words = ("search", "--task", "tiny_task:make", "--max-drop", "20pp", "--n-trials", "3", "--timeout", "90s")
        answer = run(*words, *QUICK, *plain, "--out", "run", "--json", cwd=folder)
        (folder / "stdout").write_text(answer.stdout)
        (folder / "stderr").write_text(f"{answer.returncode}\n{answer.stderr}")
        _finished.append(folder)
    folder = _finished[0]
    code, _, stderr = (folder / "stderr").read_text().partition("\n")
    assert code == "0", stderr
    return folder / "run", (folder / "stdout").read_text(), stderr


def stopped(words: Sequence[str], cwd: Path, how: signal.Signals, when: Callable[[], bool]) -> tuple[int, str, str]:
    """Start the command in a group of its own, send it a signal once `when` holds, and return how it ended."""
    # Where the tests run in the background, a shell has them, and what they start, ignore interrupts; nohup, hang-ups.
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    before |= {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGTERM)}
    process = subprocess.Popen(
        command(*words),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for number, handler in before.items():
        signal.signal(number, handler)
    deadline = time.monotonic() + 90
    while not when() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[1]
    process.send_signal(how)
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr
