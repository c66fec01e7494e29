"""Searches that are killed at random moments, and go on: what is lost, damaged or done twice.

    python -m benchmarks.faults.crashes --kills 200 [--seconds 1500] [--seed 0]

A deterministic search of a tiny network (trials and fine-tuning; latencies from a made-up table) runs once undisturbed.
Then it is started again and again, killed by SIGKILL at a random moment (the searching process alone, its measuring
process alone, both, or its whole process group) and resumed, up to six times each, until it ends. Writes
``results/crashes.csv``, a row a kill, and ``results/crashes.json``:

- lost: acknowledged lines of the log that the finished run does not have;
- damaged: artefacts that a record named before a kill and that hold something else, or nothing, after the run;
- undeployable: kills after which ``best/``, which was whole before, was not;
- other_front: runs whose front differs from the undisturbed one's in any figure.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import psutil

import autocompress
from autocompress.config import TaskConfig
from autocompress.engines.artifact import read_artifact
from autocompress.errors import AutoCompressError
from autocompress.files import read_json, write_json
from autocompress.runs.directory import RunDirectory
from autocompress.tasks import load_task
from benchmarks.faults.steering_table import DTYPE, ENGINE, write_table

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]
WAYS = ("search", "worker", "both", "group")
_KILLS_A_RUN = 6
# Share of kills that may come while the process still imports.
_EARLY = 0.15
# Files of an artefact that further measurements write.
_MEASURED = ("record.json", "latency.json", "samples.npz", "kernels.json")

TASK = """
import torch
from torch import nn
from autocompress import ClassificationTask


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 2
    inputs = torch.randn(count, 1, 8, 8, generator=generator) / 2
    inputs[..., :4] += (0.08 - 0.16 * targets.float()).view(-1, 1, 1, 1)
    return inputs, targets


def make():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    width = 64
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2),
    )
    inputs, targets = images(256, 0)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return ClassificationTask(model.eval(), images(256, 0), images(256, 1), images(512, 2), name="crash")
"""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL and what came of it.

    Attributes:
        run, number: Which run, and which kill of it.
        way: What was killed.
        after_s: Seconds after the process had started.
        stage: What the search had said last.
        acknowledged: Lines of the log by then.
        deployable: Whether ``best/`` was whole after the kill; None where there was none before.
    """

    run: int
    number: int
    way: str
    after_s: float
    stage: str
    acknowledged: int
    deployable: bool | None


@dataclass
class Disturbed:
    """One run that was killed, and gone on with until it ended.

    Attributes:
        number: Which.
        kills: What it went through.
        lost: Acknowledged lines of the log that were gone or different later.
        damaged: Artefacts that held something else later.
        same_front: Whether its front is the undisturbed run's, in every figure.
    """

    number: int
    kills: list[Kill] = field(default_factory=list)
    lost: int = 0
    damaged: int = 0
    same_front: bool = False


class Search:
    """One run directory and the command that fills it."""

    def __init__(self, folder: Path, table: Path, name: str) -> None:
        self.folder, self.run = folder, RunDirectory(folder / name)
        self._log = folder / f"{name}.log"
        self._words = [
            sys.executable, "-m", "autocompress", "search", "--task", "crash_task:make", "--engine", ENGINE,
            "--set", f"dense_dtype={DTYPE}", "--deterministic", "--table", str(table), "--target-latency", "0.55x",
            "--n-trials", "10", "--set", "recovery.epochs=2", "--set", "recovery.candidates=2",
            "--set", "recovery.batch_size=32", "--set", "stop_early=false", "--out", name,
        ]  # fmt: skip

    def start(self) -> subprocess.Popen[bytes]:
        """Start it, or go on with it, in a process group of its own."""
        resume = ["--resume"] if self.run.config_file.exists() else []
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [*self._words, *resume], cwd=self.folder, stdout=subprocess.DEVNULL, stderr=log,
                env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{self.folder}", "OMP_NUM_THREADS": "1",
                     "AUTOCOMPRESS_CACHE": str(self.folder / "cache")},
                start_new_session=True,
            )  # fmt: skip

    def finish(self) -> None:
        """Let it end.

        Raises:
            SystemExit: It does not end as a search does.
        """
        process = self.start()
        code = process.wait(timeout=600)
        if code not in (0, 3):
            raise SystemExit(f"{self.run.path} ended with {code}:\n{self._log.read_text()}")

    @property
    def stage(self) -> str:
        """What it said last."""
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:60].strip() if lines else "starting"

    def acknowledged(self) -> list[str]:
        """Return the whole lines of the log."""
        file = self.run.trials_file
        return [line for line in file.read_text().split("\n")[:-1] if line] if file.exists() else []

    def artifacts(self) -> dict[str, str]:
        """Return a digest of what each artefact that the log names holds, measurements left out."""
        found = {}
        for record in self.run.history():
            if record.artifact is not None:
                digest = hashlib.sha256()
                for path in sorted((self.run.path / record.artifact).glob("*")):
                    if path.is_file() and path.name not in _MEASURED:
                        digest.update(path.name.encode() + path.read_bytes())
                found[record.artifact] = digest.hexdigest()
        return found

    def deployable(self) -> bool:
        """Whether ``best/`` is whole: its files are those that its record names."""
        try:
            file = read_artifact(self.run.best)
            listed = read_json(self.run.best / "engine.json")["sha256"]
        except (AutoCompressError, KeyError):
            return False
        return all(hashlib.sha256(path.read_bytes()).hexdigest() == listed[path.name] for path in file.files())

    def front(self) -> list[tuple[object, ...]]:
        """Return every figure of the front and of the result."""
        run = autocompress.open_run(self.run.path)
        rows = [tuple(row) for row in run.front.drop(columns="policy").itertuples(index=False)]
        policies = [policy.hash for policy in run.front["policy"]]
        return [*rows, *((policy,) for policy in policies), (run.best.number, run.best.accuracy, run.best.policy.hash)]


def _kill(process: subprocess.Popen[bytes], way: str) -> None:
    children = psutil.Process(process.pid).children(recursive=True)
    if way == "group":
        os.killpg(process.pid, signal.SIGKILL)
    if way in ("search", "both"):
        process.kill()
    for child in children if way in ("worker", "both") else ():
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue


def _disturbed(search: Search, number: int, rng: random.Random, whole_s: float) -> Disturbed:
    """Run a search that is killed; return the kills, and how much was lost and damaged."""
    found = Disturbed(number)
    seen: list[str] = []
    held: dict[str, str] = {}
    process = None

    def look() -> None:
        nonlocal seen, held
        lines, now = search.acknowledged(), search.artifacts()
        found.lost += sum(old != new for old, new in zip(seen, lines, strict=False)) + max(0, len(seen) - len(lines))
        found.damaged += sum(now.get(name) != digest for name, digest in held.items())
        seen, held = lines, now

    while len(found.kills) < _KILLS_A_RUN:
        if process is None or process.poll() is not None:
            if process is not None and found.kills and found.kills[-1].way == "worker":
                break  # it has ended by itself
            process, started = search.start(), time.monotonic()
        # Most of the moments are after the imports.
        until = time.monotonic() + rng.uniform(0.2 if rng.random() < _EARLY else min(3.0, whole_s / 3), whole_s)
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        if process.poll() is not None:
            break
        way, stage, whole = rng.choice(WAYS), search.stage, search.deployable()
        try:
            _kill(process, way)
        except psutil.NoSuchProcess:
            break
        if way != "worker":
            process.wait()
        after_s = round(time.monotonic() - started, 2)
        look()
        left = search.deployable() if whole and way != "worker" else None
        found.kills.append(Kill(number, len(found.kills), way, after_s, stage, len(seen), left))
    if process is not None and process.poll() is None:
        process.wait(timeout=600)
        look()
    search.finish()
    look()
    return found


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="Begin no other run after so many.")
    parser.add_argument("--jobs", type=int, default=2, help="Searches at once.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="crashes-"))
    (folder / "crash_task.py").write_text(TASK)
    sys.path.insert(0, str(folder))
    table = write_table(load_task(TaskConfig(name="crash_task:make")), folder / f"{ENGINE}.csv")
    undisturbed = Search(folder, table, "undisturbed")
    started = time.monotonic()
    undisturbed.finish()
    whole_s = time.monotonic() - started
    expected = undisturbed.front()
    print(f"undisturbed: {whole_s:.1f} s, {len(undisturbed.acknowledged())} records", flush=True)
    done: list[Disturbed] = []

    def runs(job: int) -> None:
        for number in itertools.count(job, options.jobs):
            if sum(len(one.kills) for one in done) >= options.kills or time.monotonic() - begun > options.seconds:
                return
            search = Search(folder, table, f"run-{number}")
            found = _disturbed(search, number, random.Random(f"{options.seed} {number}"), whole_s)
            found.same_front = search.front() == expected
            done.append(found)
            print(
                f"run {number}: {len(found.kills)} kills, lost {found.lost}, damaged {found.damaged}, "
                f"same front: {found.same_front}",
                flush=True,
            )
            if found.same_front and not found.lost and not found.damaged:
                shutil.rmtree(search.run.path)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(runs, range(options.jobs)))
    kills = [kill for one in sorted(done, key=lambda one: one.number) for kill in one.kills]
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "crashes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Kill)])
        writer.writeheader()
        writer.writerows(asdict(kill) for kill in kills)
    summary = {
        "kills": len(kills), "runs": len(done), "lost": sum(one.lost for one in done),
        "damaged": sum(one.damaged for one in done), "other_front": sum(not one.same_front for one in done),
        "undeployable": sum(kill.deployable is False for kill in kills), "undisturbed_s": round(whole_s, 1),
    }  # fmt: skip
    write_json(RESULTS / "crashes.json", summary)
    print(json.dumps(summary))
    if not any(summary[key] for key in ("lost", "damaged", "other_front", "undeployable")):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
