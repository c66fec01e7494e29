"""A/A: the same engine file against itself. How far from 1 is the ratio, and how often is the verdict wrong?

    python benchmarks/latency/aa.py [--pairs 30] [--engine openvino …] [--load quiet …]

A CIFAR ResNet-20, and a VGG-11 whose weights do not stay in a cache (random weights, batch 1, one thread), are built
once for each engine and measured against themselves with the standard protocol, every pair in a fresh process, on a
quiet machine and beside a busy loop on another processor. Any verdict of faster or slower is false. --instances 1 opens
each engine once, where the protocol takes several in turns. Writes ``benchmarks/latency/results/DEVICE/aa.json``, cases
of earlier calls kept, and prints a table.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autocompress.engines import EngineFile, EngineOptions
from autocompress.engines.export import save_onnx, to_onnx
from autocompress.latency import Protocol, device_fingerprint
from autocompress.results import EQUAL, SAME_FILE, Measurement, read_json, write_json
from autocompress.tasks.cifar_models import CIFAR_MODELS
from autocompress.worker import EngineWorker

RESULTS = Path(__file__).parent / "results" / str(device_fingerprint()["slug"])
ENGINES = ("openvino", "onnxruntime")
LOADS = ("quiet", "busy")
NETWORKS = ("resnet20", "vgg11_bn")
INPUT = (1, 3, 32, 32)
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


def build(folder: Path, engine: str, network: str) -> tuple[EngineFile, str]:
    """Build the network and return its engine file and the engine's version."""
    torch.manual_seed(0)
    graph = folder / f"{network}.onnx"
    if not graph.exists():
        save_onnx(to_onnx(CIFAR_MODELS[network]().eval(), torch.zeros(INPUT)), graph)
    with EngineWorker() as worker:
        version = worker.describe(engine)["version"]
        return worker.build(engine, graph, EngineOptions(), folder / f"{network}-{engine}"), version


def pairs(file: EngineFile, count: int, label: str, protocol: Protocol) -> list[Measurement]:
    """Measure a file against itself, each time in a fresh process."""
    inputs = np.random.default_rng(0).standard_normal(INPUT, np.float32)
    found = []
    for number in range(1, count + 1):
        with EngineWorker() as worker:
            found.append(worker.measure([file, file], inputs, protocol)[1])
        said = f"{found[-1].ratio:.4f} {found[-1].verdict}{' noisy' if found[-1].noisy else ''}"
        print(f"{label} {number}/{count}: {said}", file=sys.stderr, flush=True)
    return found


def summarize(found: list[Measurement], seconds: float) -> dict[str, Any]:
    """Return what a set of pairs says, with the raw ratios."""
    ratios = np.array([m.ratio for m in found])
    verdicts = Counter(m.verdict for m in found)
    false = verdicts["faster"] + verdicts["slower"]
    outside = sum(not m.ratio_low <= 1 <= m.ratio_high for m in found)
    return {
        "n": len(found),
        "median_ratio": float(np.median(ratios)),
        "ratio_standard_deviation": float(ratios.std(ddof=1)) if len(ratios) > 1 else None,
        "ratio_range": [float(ratios.min()), float(ratios.max())],
        "false_verdicts": false,
        "false_verdict_share": false / len(found),
        "verdicts": dict(verdicts),
        # What the plain 95 % interval of the ratio, not widened, would have called faster or slower.
        "plain_intervals_without_1": outside,
        "noisy": sum(m.noisy for m in found),
        "noise": dict(Counter(re.sub(r"[+-]?\d[\d.]*", "N", reason) for m in found for reason in m.noise)),
        "median_latency_ms": float(np.median([m.latency_ms for m in found])),
        "seconds": round(seconds, 1),
        "pairs": [m.to_dict() for m in found],
    }


def table(document: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| network | engine | open | load | n | latency | median ratio | deviation | range | false verdicts | noisy |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in document["cases"]:
        low, high = case["ratio_range"]
        spread = case["ratio_standard_deviation"]
        lines.append(
            f"| {case['network']} | {case['engine']} {case['engine_version']} | {case['instances']}x | {case['load']} "
            f"| {case['n']} "
            f"| {case['median_latency_ms']:.3f} ms | {case['median_ratio']:.4f} "
            f"| {'' if spread is None else f'{spread:.2%}'} | {low:.4f} to {high:.4f} "
            f"| {case['false_verdicts']} ({case['false_verdict_share']:.0%}) | {case['noisy']} |"
        )
    return "\n".join(lines)


def _key(case: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(case[name] for name in ("network", "engine", "load", "instances"))


def main() -> None:
    """Read the options, measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--network", action="append", choices=NETWORKS, help="both by default")
    parser.add_argument("--instances", type=int, default=Protocol().instances, help="of each engine, in turns")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="both by default")
    parser.add_argument("--load", action="append", choices=LOADS, help="both by default")
    parser.add_argument("--out", type=Path, default=RESULTS / "aa.json")
    options = parser.parse_args()
    if options.pairs < 1:
        parser.error("--pairs must be at least 1")
    loads = options.load or LOADS
    if "busy" in loads and len(os.sched_getaffinity(0)) < 2:
        parser.error("a busy loop beside the engine needs two processors; this process may use one. Use --load quiet")
    protocol = Protocol(instances=options.instances, baseline_instances=options.instances)
    document: dict[str, Any] = read_json(options.out) if options.out.exists() else {}
    cases = {_key(case): case for case in document.get("cases", []) if "network" in case}
    with tempfile.TemporaryDirectory() as folder:
        for network, engine in itertools.product(options.network or NETWORKS, options.engine or ENGINES):
            file, version = build(Path(folder), engine, network)
            for kind in loads:
                with load(kind):
                    begin = time.monotonic()
                    found = pairs(file, options.pairs, f"{network} {engine} {kind}", protocol)
                    seconds = time.monotonic() - begin
                case = {
                    "network": network, "engine": engine, "engine_version": version, "load": kind,
                    "instances": options.instances, **summarize(found, seconds),
                }  # fmt: skip
                cases[_key(case)] = case
    document = {
        "what": "one engine file against itself, every pair in a fresh process",
        "networks": "for CIFAR, random weights, fp32",
        "device": device_fingerprint(),
        "threads": 1,
        "batch_size": 1,
        "protocol": Protocol().to_dict(),
        "verdict": {"same_file": SAME_FILE, "equal": EQUAL},
        "cases": list(cases.values()),
    }
    write_json(options.out, document)
    print(table(document))


if __name__ == "__main__":
    main()
