"""A long search of a tiny network: does anything of the process grow? Memory, descriptors, files, time to propose.

    python -m benchmarks.faults.soak --trials 2000 [--seconds 900] [--engine openvino] [--name soak]

Every trial is a real one: compressed, exported, built, checked, timed in the measuring process. Only the timing is cut
short, as what is looked at is the searching process. Writes ``benchmarks/faults/results/NAME.json`` with the number of
trials that were reached, and NAME.html, the plot (`pip install plotly`). ``--trace`` adds what tracemalloc says grew.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import shutil
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

import autocompress
from autocompress import ClassificationTask
from autocompress.exploration.trial_loop import TrialLoop
from autocompress.files import write_json
from autocompress.measurement.protocol import Protocol
from autocompress.runs.observer import Observer
from autocompress.runs.records import TrialRecord

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
LIBC = ctypes.CDLL(None)
# Trials before this one warm caches of torch, Optuna and the allocator.
WARM = 20
EVERY = 20
GROWS = ("rss_mib", "descriptors", "threads", "temporary_files", "log_bytes", "database_bytes", "proposal_ms")


def brief(protocol: type[Protocol], *_: object, **__: object) -> Protocol:
    """Return a protocol of milliseconds."""
    return protocol(
        warm_up_s=0.0, min_iterations=5, min_seconds=0.01, max_seconds=0.02, rounds=2, baseline_instances=1, instances=1
    )


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images of two classes, told apart by which half is brighter."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 2
    inputs = torch.randn(count, 1, 8, 8, generator=generator) / 2
    inputs[..., :4] += (0.3 - 0.6 * targets.float()).view(-1, 1, 1, 1)
    return inputs, targets


def task(width: int = 64, depth: int = 4) -> ClassificationTask:
    """Return a network with more choices than a soak tries."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 1
    for _ in range(depth):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2))
    return ClassificationTask(model.eval(), images(128, 0), images(64, 1), name="soak", calibration_size=64)


def size(path: Path) -> int:
    """Return the bytes of a file, or 0."""
    return path.stat().st_size if path.exists() else 0


class Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`, of which are read: bytes in use, bytes that are free, bytes mapped one by one."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    )


class EnoughError(Exception):
    """The time of the soak is up."""


class Meter(Observer):
    """Samples this process every few trials."""

    def __init__(self, out: Path, seconds: float, *, trace: bool) -> None:
        self.out, self.until, self.trace = out, time.monotonic() + seconds, trace
        self.rows: list[dict[str, Any]] = []
        self.proposals: list[float] = []
        self.done = 0
        self.process = psutil.Process()
        self.started = time.monotonic()
        self.objects: Counter[str] = Counter()
        self.snapshot: tracemalloc.Snapshot | None = None

    def trial(self, record: TrialRecord) -> None:
        """Sample."""
        self.done += 1
        if self.done % EVERY == 0:
            self.sample()
        if self.done == WARM and self.trace:
            gc.collect()
            self.objects = Counter(type(one).__name__ for one in gc.get_objects())
            tracemalloc.start()
            self.snapshot = tracemalloc.take_snapshot()
        if time.monotonic() > self.until:
            if self.trace:
                self.grew()
            raise EnoughError

    def sample(self) -> None:
        """Add a row."""
        temporary = Path(tempfile.gettempdir())
        memory = self.process.memory_info()
        self.rows.append(
            {
                "trials": self.done,
                "seconds": round(time.monotonic() - self.started, 1),
                "rss_mib": round(memory.rss / MIB, 1),
                "descriptors": self.process.num_fds(),
                "threads": self.process.num_threads(),
                "temporary_files": sum(1 for _ in temporary.rglob("*")),
                "log_bytes": size(self.out / "trials.jsonl"),
                "database_bytes": size(self.out / "study.db"),
                "worker_log_bytes": size(self.out / "worker.log"),
                "proposal_ms": round(1e3 * float(np.median(self.proposals)), 2) if self.proposals else None,
            }
        )
        if self.trace:
            # What the allocator holds without use, and what is held.
            gc.collect()
            LIBC.malloc_trim(0)
            self.rows[-1]["rss_trimmed_mib"] = round(self.process.memory_info().rss / MIB, 1)
            LIBC.mallinfo2.restype = Heap
            heap = LIBC.mallinfo2()
            used = {"used": heap.uordblks, "free": heap.fordblks, "mapped": heap.hblkhd}
            self.rows[-1] |= {f"heap_{name}_mib": round(size / MIB, 1) for name, size in used.items()}
        self.proposals.clear()
        print(self.rows[-1], flush=True)

    def grew(self) -> None:
        """Print what Python's own objects grew by."""
        gc.collect()
        now = Counter(type(one).__name__ for one in gc.get_objects())
        print((now - self.objects).most_common(25))
        if self.snapshot is not None:
            for line in tracemalloc.take_snapshot().compare_to(self.snapshot, "lineno")[:25]:
                print(line)


def growth(rows: list[dict[str, Any]], keys: tuple[str, ...], since: float) -> dict[str, float]:
    """Return what columns grow by in 1,000 trials, by least squares over the rows after a share of them."""
    later = rows[int(since * len(rows)) :]
    if len(later) < 3:
        return {}
    trials = [row["trials"] for row in later]
    return {key: round(1e3 * float(np.polyfit(trials, [row[key] for row in later], 1)[0]), 1) for key in keys}


def plot(document: dict[str, Any], path: Path) -> None:
    """Write the plot."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    rows = document["rows"]
    keys = ("rss_mib", "descriptors", "temporary_files", "log_bytes", "database_bytes", "proposal_ms")
    figure = make_subplots(rows=3, cols=2, subplot_titles=keys)
    for index, key in enumerate(keys):
        line = go.Scatter(x=[row["trials"] for row in rows], y=[row[key] for row in rows], mode="lines", name=key)
        figure.add_trace(line, row=index // 2 + 1, col=index % 2 + 1)
    figure.update_layout(template="plotly_white", height=800, showlegend=False, title=f"{document['trials']} trials")
    figure.update_yaxes(rangemode="tozero")
    figure.write_html(path, include_plotlyjs="cdn")


def main() -> None:
    """Run the soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after the trial that is running then")
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--sampler", default="knapsack")
    parser.add_argument("--name", default="soak")
    parser.add_argument("--trace", action="store_true")
    words = parser.parse_args()
    Protocol.standard = Protocol.trial = Protocol.again = classmethod(brief)  # type: ignore[assignment, method-assign]
    scratch = Path(tempfile.mkdtemp(prefix="soak-"))
    own = scratch / "temporary"
    own.mkdir()
    os.environ["TMPDIR"], os.environ["AUTOCOMPRESS_CACHE"], tempfile.tempdir = str(own), str(scratch / "cache"), None
    meter = Meter(scratch / "run", words.seconds, trace=words.trace)
    ask = TrialLoop._ask

    def timed(loop: TrialLoop) -> Any:
        begun = time.perf_counter()
        asked = ask(loop)
        meter.proposals.append(time.perf_counter() - begun)
        return asked

    TrialLoop._ask = timed  # type: ignore[method-assign]
    try:
        autocompress.search(
            task(), engine=words.engine, n_trials=words.trials, sampler=words.sampler, target_latency="0.5x",
            first_candidates=False, stop_early=False, out=scratch / "run", observer=meter,
            sets=["recovery.enabled=false"],
        )  # fmt: skip
    except EnoughError:
        print(f"The time was up after {meter.done} trials.")
    document = {
        "command": f"python -m benchmarks.faults.soak --trials {words.trials} --seconds {words.seconds:g}",
        "engine": words.engine, "sampler": words.sampler, "trials": meter.done,
        "artifacts": sum(1 for _ in (scratch / "run" / "artifacts").iterdir()),
        # What is cached by shape, and what the predictor may hold, fills up in the first hundreds of trials.
        "per_1000_trials": growth(meter.rows, GROWS, 1 / 4),
        "per_1000_trials_last_third": growth(meter.rows, GROWS, 2 / 3),
        "rows": meter.rows,
    }  # fmt: skip
    print({key: value for key, value in document.items() if key != "rows"})
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(RESULTS / f"{words.name}.json", document)
    plot(document, RESULTS / f"{words.name}.html")
    shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
