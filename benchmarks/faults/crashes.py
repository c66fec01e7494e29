"""Searches that are killed at random moments, and go on: what is lost, damaged or done twice.

    python -m benchmarks.faults.crashes --kills 200 [--seconds 1500] [--seed 0]

A deterministic search of a tiny network (trials and fine-tuning; latencies from a made-up table) runs once undisturbed.
Then it is started again and again, killed by SIGKILL at a random moment (the searching process alone, its measuring
process alone, both, or its whole process group) and resumed, up to four times each, until it ends. Writes
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
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
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
_KILLS_A_RUN = 4

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
                env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{self.folder}", "OMP_NUM_THREADS": "1"},
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
                    if path.is_file() and path.name not in (
                        "record.json",
                        "latency.json",
                        "samples.npz",
                        "kernels.json",
                    ):
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


def _disturbed(
    search: Search, number: int, rng: random.Random, whole_s: float, most: int
) -> tuple[list[Kill], int, int]:
    """Run a search that is killed; return the kills, and how much was lost and damaged."""
    kills: list[Kill] = []
    seen: list[str] = []
    held: dict[str, str] = {}
    lost = damaged = 0
    while len(kills) < most:
        process, started, after = search.start(), time.monotonic(), rng.uniform(0.2, whole_s)
        while process.poll() is None and time.monotonic() - started < after:
            time.sleep(0.01)
        if process.poll() is not None:
            break
        had_best = search.deployable()
        stage = search.stage
        try:
            _kill(process, way := WAYS[(number + len(kills)) % len(WAYS)])
        except psutil.NoSuchProcess:
            break
        if way == "worker":
            # Whatever it was asked is lost; the search goes on.
            process.wait(timeout=600)
        process.wait()
        lines = search.acknowledged()
        lost += sum(before != after for before, after in zip(seen, lines, strict=False)) + max(
            0, len(seen) - len(lines)
        )
        now = search.artifacts()
        damaged += sum(now.get(name) != digest for name, digest in held.items())
        kills.append(
            Kill(number, len(kills), way, time.monotonic() - started, stage, len(lines),
                 search.deployable() if had_best else None)
        )  # fmt: skip
        seen, held = lines, now
        if way == "worker":
            break
    search.finish()
    lines = search.acknowledged()
    lost += sum(before != after for before, after in zip(seen, lines, strict=False)) + max(0, len(seen) - len(lines))
    now = search.artifacts()
    damaged += sum(now.get(name) != digest for name, digest in held.items())
    return kills, lost, damaged


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="Begin no other run after so many.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begun, rng = time.monotonic(), random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="crashes-"))
    (folder / "crash_task.py").write_text(TASK)
    sys.path.insert(0, str(folder))
    table = write_table(load_task(TaskConfig(name="crash_task:make")), folder / f"{ENGINE}.csv")
    undisturbed = Search(folder, table, "undisturbed")
    started = time.monotonic()
    undisturbed.finish()
    whole_s = time.monotonic() - started
    expected = undisturbed.front()
    print(
        f"undisturbed: {whole_s:.1f} s, {len(undisturbed.acknowledged())} records, front of {len(expected)}", flush=True
    )
    kills: list[Kill] = []
    totals = {"lost": 0, "damaged": 0, "other_front": 0, "runs": 0}
    while len(kills) < options.kills and time.monotonic() - begun < options.seconds:
        search = Search(folder, table, f"run-{totals['runs']}")
        found, lost, damaged = _disturbed(
            search, totals["runs"], rng, whole_s, min(_KILLS_A_RUN, options.kills - len(kills))
        )
        same = search.front() == expected
        kills += found
        totals = {
            "lost": totals["lost"] + lost, "damaged": totals["damaged"] + damaged,
            "other_front": totals["other_front"] + (not same), "runs": totals["runs"] + 1,
        }  # fmt: skip
        print(
            f"run {totals['runs']}: {len(found)} kills, lost {lost}, damaged {damaged}, same front {same}", flush=True
        )
        if same and not lost and not damaged:
            shutil.rmtree(search.run.path)
    undeployable = sum(kill.deployable is False for kill in kills)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "crashes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(kills[0])] if kills else ["run"])
        writer.writeheader()
        writer.writerows(asdict(kill) | {"after_s": round(kill.after_s, 2)} for kill in kills)
    summary = {"kills": len(kills), **totals, "undeployable": undeployable, "undisturbed_s": round(whole_s, 1)}
    write_json(RESULTS / "crashes.json", summary)
    print(json.dumps(summary))
    if not any((totals["lost"], totals["damaged"], totals["other_front"], undeployable)):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
