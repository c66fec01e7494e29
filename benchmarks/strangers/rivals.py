"""The rivals on one network, measured as autocompress measures, beside its own result.

    python -m benchmarks.strangers.rivals NETWORK --out FILE.json [--images DIR] [--cache DIR] [--run DIR]

NNCF's files run in OpenVINO against the uncompressed network at the fastest dense dtype, what stays in floating point
at whichever dense dtype is faster; ONNX Runtime's run in ONNX Runtime against fp32. A file's metric is of what its own
runtime gives for the test data, its drop against the uncompressed network in that runtime. What autocompress found
(``--run``) is timed in the same interleaved rounds. ``--accuracy-only`` times nothing, for a busy machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autocompress.config import TaskConfig
from autocompress.deploy.artifacts import resolve
from autocompress.engines.base import EngineFile, EngineOptions
from autocompress.errors import AutoCompressError
from autocompress.files import write_json
from autocompress.graph.export import save_onnx, to_onnx
from autocompress.measurement.client import EngineWorker
from autocompress.runs.records import Measurement
from autocompress.tasks import Task, load_task
from benchmarks.strangers.networks import MAX_DROP, NETWORKS
from benchmarks.strangers.prepare import task_config

# Rival to the runtime of its files, and their suffix.
RUNTIMES = {
    "nncf": ("openvino", ".xml"),
    "nncf-accuracy-control": ("openvino", ".xml"),
    "onnxruntime-static": ("onnxruntime", ".onnx"),
    "onnxruntime-dynamic": ("onnxruntime", ".onnx"),
}
_SAMPLES = 300
_SECONDS = 600
_LIMIT_PP = float(MAX_DROP.removesuffix("pp"))
_LINES = 3


class Contest:
    """One network's uncompressed engine files, its rivals' and autocompress's.

    Args:
        name: Of the network.
        config: Its task.
        worker: Builds, runs and times.
        folder: For files.
        timed: Whether latencies are measured.
    """

    def __init__(self, name: str, config: TaskConfig, worker: EngineWorker, folder: Path, *, timed: bool) -> None:
        self.name, self._config, self._worker, self._folder, self._timed = name, config, worker, folder, timed
        self.task: Task = load_task(config)
        self._onnx = folder / "dense.onnx"
        save_onnx(to_onnx(self.task.model(), self.task.example_inputs(1)), self._onnx)
        samples = torch.cat(list(self.task.calibration(_SAMPLES)))[:_SAMPLES].numpy()
        np.save(folder / "samples.npy", samples)
        self._input = samples[:1]
        self.dense = {engine: self._fastest_dense(engine) for engine in ("openvino", "onnxruntime")}
        self.metrics = {engine: self.metric(file) for engine, file in self.dense.items()}

    def metric(self, file: EngineFile) -> float:
        """Return the task's metric of an engine file's outputs for the test data."""
        outputs, targets = [], []
        for inputs, target in self.task.test(256):
            outputs.append(torch.from_numpy(self._worker.infer(file, inputs.numpy())))
            targets.append(target)
        return self.task.metric(torch.cat(outputs), torch.cat(targets))

    def drop_pp(self, file: EngineFile, metric: float) -> float:
        """Return what a file loses of the uncompressed network's metric in the same runtime, in points."""
        return 100 * (self.metrics[file.engine] - metric)

    def measure(self, files: list[EngineFile]) -> list[Measurement]:
        """Time files against the first one, interleaved."""
        return self._worker.measure(files, self._input)

    def rival(self, rival: str) -> tuple[dict[str, Any], EngineFile | None]:
        """Return one rival's row, without its latency, and its file; the row says why where there is none."""
        engine, suffix = RUNTIMES[rival]
        path = self._folder / f"{rival}{suffix}"
        row: dict[str, Any] = {"rival": rival, "engine": engine}
        started = time.monotonic()
        error = self._quantize(rival, path)
        row["seconds"] = round(time.monotonic() - started, 1)
        if error is not None:
            return {**row, "error": error}, None
        try:
            file = self._fastest([EngineFile(engine, path, EngineOptions(dtype)) for dtype in self._dtypes(engine)])
            metric = self.metric(file)
        except AutoCompressError as caught:
            return {**row, "error": f"{type(caught).__name__}: {caught}"}, None
        row |= {"dtype": file.options.dtype, "metric": metric, "drop_pp": self.drop_pp(file, metric)}
        return {**row, "size_bytes": file.size_bytes}, file

    def _quantize(self, rival: str, path: Path) -> str | None:
        """Let a rival write its file in a process of its own; return what it said when it could not."""
        command = [
            sys.executable, "-m", "benchmarks.strangers.quantizers", rival, self.name, "--onnx", str(self._onnx),
            "--samples", str(self._folder / "samples.npy"), "--to", str(path),
        ]  # fmt: skip
        for option, value in (("--images", self._config.data), ("--cache", self._config.weights)):
            command += [option, value] if value else []
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            return f"not done after {_SECONDS} s"
        if done.returncode == 0 and path.exists():
            return None
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return f"exit code {done.returncode}: {' '.join(lines[-_LINES:])[-400:]}"

    def _fastest_dense(self, engine: str) -> EngineFile:
        """Return the uncompressed network at the fastest dense dtype that works."""
        built = []
        for dtype in self._dtypes(engine):
            target = self._folder / f"dense-{engine}-{dtype}"
            try:
                built.append(self._worker.build(engine, self._onnx, EngineOptions(dtype), target))
            except AutoCompressError as error:
                print(f"{self.name}: {engine} in {dtype}: {error}", file=sys.stderr)
        return self._fastest(built)

    def _dtypes(self, engine: str) -> list[str]:
        # On the CPUs that have fp16, OpenVINO's own choice is bf16 or fp16; what is measured decides.
        return [dtype for dtype in self._worker.describe(engine)["capabilities"] if dtype in ("fp32", "bf16", "fp16")]

    def _fastest(self, files: list[EngineFile]) -> EngineFile:
        if len(files) == 1:
            return files[0]
        if not self._timed:
            # What OpenVINO chooses by itself.
            return next((file for file in files if file.options.dtype == "bf16"), files[0])
        measured = self.measure(files)
        return min(zip(files, measured, strict=True), key=lambda pair: pair[1].ratio)[0]


def _figures(measured: Measurement) -> dict[str, Any]:
    return {
        "latency_ms": measured.latency_ms,
        "ratio": measured.ratio,
        "ratio_interval": [measured.ratio_low, measured.ratio_high],
        "noisy": measured.noisy,
    }


def _time(contest: Contest, engine: str, rows: list[tuple[dict[str, Any], EngineFile]]) -> dict[str, Any]:
    """Add latencies to rows: against the dense network in the same runtime, and against that in the search's."""
    dense: dict[str, Any] = {}
    for runtime, baseline in contest.dense.items():
        own = [pair for pair in rows if pair[1].engine == runtime]
        measured = contest.measure([baseline, *(file for _, file in own)])
        dense[runtime] = {"latency_ms": measured[0].latency_ms, "noisy": measured[0].noisy}
        for (row, _), one in zip(own, measured[1:], strict=True):
            row.update(_figures(one), ratio_to_dense=one.ratio)
    others = [pair for pair in rows if pair[1].engine != engine]
    if others:
        measured = contest.measure([contest.dense[engine], *(file for _, file in others)])
        for (row, _), one in zip(others, measured[1:], strict=True):
            row["ratio_to_dense"] = one.ratio
    return dense


def compare(contest: Contest, engine: str, run: Path | None, *, timed: bool) -> dict[str, Any]:
    """Return the rows of all rivals, and of autocompress's result where `run` has one."""
    rows: list[dict[str, Any]] = []
    files: list[tuple[dict[str, Any], EngineFile]] = []
    for rival in RUNTIMES:
        plain = rows[0] if rows else {}
        if rival == "nncf-accuracy-control" and plain.get("drop_pp", _LIMIT_PP + 1) <= _LIMIT_PP:
            # The same call ends where plain quantization stays within the limit.
            continue
        print(f"{contest.name}: {rival}", file=sys.stderr, flush=True)
        row, file = contest.rival(rival)
        rows.append(row)
        files += [(row, file)] if file is not None else []
    ours: dict[str, Any] | None = None
    if run is not None:
        file = resolve(run, None, EngineOptions())
        metric = contest.metric(file)
        ours = {"metric": metric, "drop_pp": contest.drop_pp(file, metric), "dtype": file.options.dtype}
        files.append((ours, file))
    dense = {
        name: {"dtype": file.options.dtype, "metric": contest.metrics[name], "size_bytes": file.size_bytes}
        for name, file in contest.dense.items()
    }
    if timed:
        for name, figures in _time(contest, engine, files).items():
            dense[name] |= figures
    return {"timed": timed, "engine": engine, "dense": dense, "rows": rows, "ours": ours}


def main() -> None:
    """Let the rivals try one network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images")
    parser.add_argument("--cache")
    parser.add_argument("--run", type=Path, help="a finished run of autocompress")
    parser.add_argument("--engine", default="openvino", help="of the run")
    parser.add_argument("--accuracy-only", action="store_true")
    options = parser.parse_args()
    config = task_config(NETWORKS[options.network], options.images, options.cache)
    timed = not options.accuracy_only
    with tempfile.TemporaryDirectory() as folder, EngineWorker() as worker:
        contest = Contest(options.network, config, worker, Path(folder), timed=timed)
        write_json(options.out, compare(contest, options.engine, options.run, timed=timed))


if __name__ == "__main__":
    main()
