"""Every case through the command line, as a user runs it, and judged against its right answer.

    python -m benchmarks.cases.run                             # writes openvino.csv
    python -m benchmarks.cases.run --engine onnxruntime        # and onnxruntime.csv
    python -m benchmarks.cases.run --only slopes "group norm"  # these alone; their rows are replaced

Latency is not judged: a search that ends with exit code 3 missed a limit and delivers the best so far. The table is
written after every case; `--resume` goes on with those that are not in it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from autocompress import environment
from autocompress.errors import AutoCompressError
from autocompress.files import read_json
from autocompress.model.inventory import ITS_OUTPUT
from autocompress.policy import CompressionPolicy
from autocompress.quantities import parse_duration
from autocompress.runs.directory import RunDirectory
from benchmarks.cases.registry import CASES, WORKS, Case
from benchmarks.cases.table import HERE, read_table, write_readme

_TARGET, _DROP, _TRIALS = "0.6x", "5pp", 4
# A search that takes this many times its time, and as many seconds more, hangs.
_OVERTIME, _SPARE_S = 3.0, 300.0
# Characters of what is left alone that the table keeps.
_KEPT = 300


@dataclass
class Row:
    """What came of one case.

    Attributes:
        case: Its name.
        right: Whether that is the right answer.
        exit_code: Of the search.
        drop_pp: Points of the metric that what was delivered loses on test data; NaN where nothing was.
        stage: Of what was delivered: ``"proxy"``, ``"recovered"`` or ``"baseline"``.
        n_failed: Trials that failed.
        axes: Axes of channels that can be pruned.
        left_alone: Layers, or their channels, with the reason.
        said: The error; else the last line of stderr.
        wrong: What is not as it should be.
        seconds: Of the search.
    """

    case: str
    right: bool = True
    exit_code: int = -1
    drop_pp: float = math.nan
    stage: str = ""
    n_failed: int = 0
    axes: int = 0
    left_alone: str = ""
    said: str = ""
    wrong: str = ""
    seconds: float = 0.0


class Runner:
    """Runs cases with the same engine and limits.

    Args:
        engine: A name of ``--engine``.
        timeout: As ``--timeout`` takes it.
        cache: Folder of trained weights and of what the package itself keeps.
        runs: Folder of the runs.
    """

    def __init__(self, engine: str, timeout: str, cache: Path, runs: Path) -> None:
        self._engine, self._timeout, self._runs = engine, timeout, runs
        self._environment = {**os.environ, "AUTOCOMPRESS_CACHE": str(cache), "COLUMNS": "200", "NO_COLOR": "1"}

    def run(self, name: str) -> Row:
        """Return what comes of a case."""
        case, row, begun = CASES[name], Row(name), time.monotonic()
        folder = self._runs / f"{self._engine}-{name.replace(' ', '-')}"
        done = self._call("search", case, "--engine", self._engine, "--target-latency", _TARGET, "--max-drop", _DROP,
                          "--timeout", self._timeout, "--n-trials", str(_TRIALS), "--out", str(folder))  # fmt: skip
        row.seconds = round(time.monotonic() - begun, 1)
        row.exit_code = done.returncode
        stderr = done.stderr.replace(str(folder), "DIR")
        row.said = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "")[:_KEPT]
        wrong = [*_judged(case, self._engine, row, done.stdout, stderr)]
        if row.exit_code in WORKS:
            wrong += _chosen(case, folder)
            wrong += self._inspected(case, row)
        row.wrong, row.right = "; ".join(wrong), not wrong
        return row

    def _inspected(self, case: Case, row: Row) -> Iterable[str]:
        found = json.loads(self._call("inspect", case).stdout)
        left = [f"{name}: {why}" for name, why in found["skipped"].items() if why != ITS_OUTPUT]
        row.axes, row.left_alone = len(found["groups"]), "; ".join(left)[:_KEPT]
        if row.axes < case.least_axes:
            yield f"{row.axes} axes of channels can be pruned, not {case.least_axes}"
        yield from (f"nothing that is left alone matches {p!r}" for p in case.named if not _any(p, left))

    def _call(self, command: str, case: Case, *options: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "autocompress", command, "--task", f"benchmarks.cases.{case.factory}", "--json"]
        limit = _OVERTIME * parse_duration(self._timeout) + _SPARE_S
        try:
            return subprocess.run(
                [*argv, *options], capture_output=True, text=True, env=self._environment, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired as late:
            return subprocess.CompletedProcess(argv, -1, "", f"still running after {late.timeout:.0f} s")


def _judged(case: Case, engine: str, row: Row, stdout: str, stderr: str) -> Iterable[str]:
    """Yield what is wrong with what a search said and delivered; note its figures in `row`."""
    if row.exit_code not in case.exits_of(engine):
        yield f"exit code {row.exit_code}"
    if "Traceback (most recent call last)" in stderr:
        yield "a traceback"
    if row.exit_code not in WORKS:
        yield from (f"stderr does not match {p!r}" for p in case.says if not _any(p, [stderr]))
        return
    try:
        summary: dict[str, Any] = json.loads(stdout, parse_constant=_refuse)
    except ValueError as error:
        yield f"stdout is no JSON: {error}"
        return
    best = summary["best"]
    row.drop_pp, row.stage = round(best["accuracy_drop_pp"], 2), best["stage"]
    row.n_failed = summary["n_failed"]
    if not row.drop_pp <= case.most_drop_pp:
        yield f"what is delivered loses {row.drop_pp} points"
    if summary["lowest_ratio"] is None:
        yield "no candidate was measured"
    if row.n_failed > case.most_failed:
        yield f"{row.n_failed} trials failed: {summary['last_error']}"


def _chosen(case: Case, folder: Path) -> Iterable[str]:
    """Yield which layers of what is delivered are int8 and must not be."""
    try:
        policy = CompressionPolicy.from_dict(read_json(RunDirectory(folder).best / "policy.json"))
    except AutoCompressError as error:
        yield str(error)
        return
    yield from (f"{layer} is int8" for layer in case.never_int8 if layer in policy.int8_layers)


def _refuse(constant: str) -> float:
    raise ValueError(f"it holds {constant}")


def _any(pattern: str, lines: Iterable[str]) -> bool:
    return any(re.search(pattern, " ".join(line.split())) for line in lines)


def _rows(names: Sequence[str], runner: Runner, lanes: int) -> Iterable[Row]:
    with ThreadPoolExecutor(lanes) as pool:
        yield from pool.map(runner.run, names)


def main() -> None:
    """Run the cases, write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(CASES), help="; ".join(CASES))
    parser.add_argument("--timeout", default="60s", help="of every search")
    parser.add_argument("--lanes", type=int, default=1, help="searches at a time")
    parser.add_argument("--cache", type=Path, default=environment.cache_directory(), help="folder of trained weights")
    parser.add_argument("--runs", type=Path, help="folder that keeps the runs; none keeps none")
    parser.add_argument("--resume", action="store_true", help="leave out what is in the table")
    options = parser.parse_args()
    path = HERE / f"{options.engine}.csv"
    rows = read_table(path) if path.exists() and (options.resume or options.only) else {}
    names = options.only or [name for name in CASES if name not in rows]
    with tempfile.TemporaryDirectory() as scratch:
        runner = Runner(options.engine, options.timeout, options.cache.resolve(), options.runs or Path(scratch))
        for row in _rows(names, runner, options.lanes):
            rows[row.case] = asdict(row)
            ordered = [rows[name] for name in CASES if name in rows]
            pd.DataFrame(ordered).to_csv(path, index=False)
            mark = "right" if row.right else f"WRONG: {row.wrong}"
            print(f"{row.case:32} exit {row.exit_code} {row.drop_pp:6} pp {row.seconds:6.1f} s  {mark}", flush=True)
    write_readme()


if __name__ == "__main__":
    main()
