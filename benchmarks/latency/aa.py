"""A/A: a file against a copy of itself. How far from 1 is the ratio, does its interval hold 1, is a verdict ever wrong?

    python benchmarks/latency/aa.py --runs runs/coverage [--pairs 10] [--load quiet …]

Takes the baselines that `coverage.py` left in ``--runs`` and measures each against a copy of its own files with the
standard protocol, on a quiet machine and beside a busy loop on another processor. Any verdict of faster or slower is
false. Writes ``benchmarks/latency/results/DEVICE/aa.json``, cases of earlier calls kept, and prints a table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.deploy.verify import read_reference
from autocompress.engines import EngineFile
from autocompress.engines.artifact import read_artifact
from autocompress.files import read_json, write_json
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.fingerprint import device_fingerprint
from autocompress.measurement.protocol import Protocol
from autocompress.runs.records import Measurement

RESULTS = Path(__file__).parent / "results" / str(device_fingerprint()["slug"])
LOADS = ("quiet", "busy")
_LOOP = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


@contextmanager
def load(kind: str) -> Iterator[None]:
    """Keep the lowest processor that may be used busy; engines are timed on the highest."""
    if kind == "quiet":
        yield
        return
    loop = subprocess.Popen([sys.executable, "-c", _LOOP, str(min(os.sched_getaffinity(0)))])
    try:
        time.sleep(0.5)
        yield
    finally:
        loop.kill()
        loop.wait()


def pairs(baseline: Path, count: int, label: str) -> list[Measurement]:
    """Measure a run's baseline against a copy of it."""
    file = read_artifact(baseline)
    inputs = read_reference(baseline / "reference.safetensors")[0]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        other = _copied(file, Path(folder))
        for number in range(1, count + 1):
            with EngineWorker() as worker:
                found.append(worker.measure([file, other], inputs, Protocol.standard())[1])
            one = found[-1]
            said = f"{one.ratio:.4f} ({one.ratio_low:.3f} to {one.ratio_high:.3f}) {one.verdict}"
            print(f"{label} {number}/{count}: {said}", file=sys.stderr, flush=True)
    return found


def _copied(file: EngineFile, folder: Path) -> EngineFile:
    for path in file.files():
        shutil.copyfile(path, folder / path.name)
    return replace(file, path=folder / file.path.name)


def summarize(found: list[Measurement], seconds: float) -> dict[str, Any]:
    """Return what a set of pairs says, with the raw ratios."""
    ratios = np.array([m.ratio for m in found])
    verdicts = Counter(m.verdict for m in found)
    return {
        "n": len(found),
        "median_ratio": float(np.median(ratios)),
        "ratio_range": [float(ratios.min()), float(ratios.max())],
        "intervals_with_1": sum(m.ratio_low <= 1 <= m.ratio_high for m in found),
        "median_half_width": float(np.median([(m.ratio_high - m.ratio_low) / 2 / m.ratio for m in found])),
        "false_verdicts": verdicts["faster"] + verdicts["slower"],
        "verdicts": dict(verdicts),
        "median_latency_ms": float(np.median([m.latency_ms for m in found])),
        "seconds": round(seconds, 1),
        "pairs": [m.to_dict() for m in found],
    }


def table(document: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| network, engine | load | n | latency | median ratio | range | hold 1 | half-width | false verdicts |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for case in document["cases"]:
        low, high = case["ratio_range"]
        lines.append(
            f"| {case['name']} | {case['load']} | {case['n']} | {case['median_latency_ms']:.3g} ms "
            f"| {case['median_ratio']:.4f} | {low:.4f} to {high:.4f} | {case['intervals_with_1']} of {case['n']} "
            f"| ±{case['median_half_width']:.1%} | {case['false_verdicts']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Read the options, measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/coverage"), help="what coverage.py searched")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--only", nargs="+", metavar="NETWORK-ENGINE")
    parser.add_argument("--load", action="append", choices=LOADS, help="both by default")
    parser.add_argument("--out", type=Path, default=RESULTS / "aa.json")
    options = parser.parse_args()
    if options.pairs < 1:
        parser.error("--pairs must be at least 1")
    loads = options.load or LOADS
    if "busy" in loads and len(os.sched_getaffinity(0)) < 2:
        parser.error("a busy loop beside the engine needs two processors; this process may use one. Use --load quiet")
    document: dict[str, Any] = read_json(options.out) if options.out.exists() else {}
    cases = {(case["name"], case["load"]): case for case in document.get("cases", []) if "intervals_with_1" in case}
    names = options.only or sorted(path.parent.name for path in options.runs.glob("*/baseline"))
    for name in names:
        for kind in loads:
            with load(kind):
                begin = time.monotonic()
                found = pairs(options.runs / name / "baseline", options.pairs, f"{name} {kind}")
            cases[name, kind] = {"name": name, "load": kind, **summarize(found, time.monotonic() - begin)}
            write_json(
                options.out,
                {
                    "what": "one engine file against a copy of itself",
                    "device": device_fingerprint(),
                    "protocol": Protocol.standard().to_dict(),
                    "cases": list(cases.values()),
                },
            )
    print(table({"cases": list(cases.values())}))


if __name__ == "__main__":
    main()
