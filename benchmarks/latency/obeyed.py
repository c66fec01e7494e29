"""Is the target obeyed? Search, deploy, and measure the deployed file again in fresh processes.

    python benchmarks/latency/obeyed.py --data cifar10-jpeg.tar --weights DIR [--case resnet20-openvino-0.6x]

Three models, two engines, targets of 0.8x, 0.6x and 0.5x of the uncompressed model's latency. Fine-tuning is off, as
it changes weights, not latency. A run obeys when the ratio measured anew is at or below the target; slack is how far
below. Writes benchmarks/latency/results/DEVICE/obeyed.json, one entry for each case, those of earlier calls kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from autocompress.files import read_json, write_json
from autocompress.measurement.fingerprint import device_fingerprint

HERE = Path(__file__).parent
RESULTS = HERE / "results" / str(device_fingerprint()["slug"]) / "obeyed.json"
ENGINES = ("openvino", "onnxruntime")
TARGETS = ("0.8x", "0.6x", "0.5x")
AGAIN = 5


def models(data: str | None, weights: str | None) -> dict[str, list[str]]:
    """Return each model's options of ``autocompress search``."""

    def cifar(model: str, file: str) -> list[str]:
        options = {"task.model": model, "task.data": data, "task.weights": f"{weights}/{file}"}
        return ["--task", "cifar10", *(part for k, v in options.items() for part in ("--set", f"{k}={v}"))]

    return {
        "digits": ["--task", "digits"],
        "resnet20": cifar("resnet20", "resnet20-cifar10.safetensors"),
        "vgg11_bn": cifar("vgg11_bn", "vgg11bn-cifar10.safetensors"),
    }


def call(*words: str, allowed: tuple[int, ...] = (0,)) -> str:
    """Run the command line in a process of its own and return its stdout."""
    answer = subprocess.run([sys.executable, "-m", "autocompress", *words], capture_output=True, text=True, check=False)
    if answer.returncode not in allowed or not answer.stdout:
        raise SystemExit(f"{' '.join(words)} ended with {answer.returncode}:\n{answer.stderr[-2000:]}")
    return answer.stdout


def run(options: list[str], engine: str, target: str, trials: int, timeout: str) -> dict[str, object]:
    """Search once, deploy, measure the deployed file anew."""
    with tempfile.TemporaryDirectory() as folder:
        out, deployed = f"{folder}/run", f"{folder}/deployed"
        begun = time.monotonic()
        words = ["--engine", engine, "--target-latency", target, "--n-trials", str(trials), "--timeout", timeout]
        words += ["--set", "recovery.enabled=false", "--set", "validation_limit=1000", "--out", out, "--json"]
        summary = json.loads(call("search", *options, *words, allowed=(0, 3)))
        took = time.monotonic() - begun
        call("deploy", out, "--to", deployed, "--json")
        measured = [json.loads(call("benchmark", f"{out}/baseline", deployed, "--json"))[1] for _ in range(AGAIN)]
    limit = float(target.removesuffix("x"))
    ratios = [m["ratio"] for m in measured]
    seconds = summary["seconds"]
    return {
        "engine": engine,
        "target": limit,
        "feasible": summary["best"]["feasible"],
        "ratio_in_search": summary["best"]["latency_ratio"],
        "ratios_again": ratios,
        "inside": [ratio <= limit for ratio in ratios],
        "slack": 1 - statistics.median(ratios) / limit,
        "n_trials": summary["n_trials"],
        "prediction": summary.get("prediction"),
        "seconds": took,
        "share_measuring": seconds["measure"] / seconds["total"],
        "seconds_by_activity": seconds,
        "device": summary["device"],
    }


def known() -> dict[str, dict[str, object]]:
    """Return the results that are there."""
    found: dict[str, dict[str, object]] = read_json(RESULTS) if RESULTS.exists() else {}
    return found


def table(results: dict[str, dict[str, object]]) -> str:
    """Return the results as lines, and what they come to."""
    lines = []
    for name, found in sorted(results.items()):
        again = " ".join(f"{ratio:.3f}" for ratio in found["ratios_again"])  # type: ignore[attr-defined]
        lines.append(f"{name:32} again {again}  slack {found['slack']:6.1%}  measuring {found['share_measuring']:.0%}")
    inside = [one for found in results.values() for one in found["inside"]]  # type: ignore[attr-defined]
    slack = statistics.median(float(str(found["slack"])) for found in results.values())
    lines.append(f"{len(results)} cases: inside in {sum(inside)} of {len(inside)}, median slack {slack:.1%}")
    return "\n".join(lines)


def main() -> None:
    """Run the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="CIFAR-10, a folder per class or a .tar of one")
    parser.add_argument("--weights", help="folder of the .safetensors files")
    parser.add_argument("--case", action="append", help="MODEL-ENGINE-TARGET; all of them by default")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--timeout", default="120s")
    parser.add_argument("--table", action="store_true", help="print what is committed")
    arguments = parser.parse_args()
    if not arguments.table:
        for model, options in models(arguments.data, arguments.weights).items():
            for engine in ENGINES:
                for target in TARGETS:
                    case = f"{model}-{engine}-{target}"
                    if arguments.case is None or case in arguments.case:
                        found = run(options, engine, target, arguments.trials, arguments.timeout)
                        # Another call may have added its cases meanwhile.
                        write_json(RESULTS, known() | {case: found})
                        print(case, found["ratios_again"], flush=True)
    print(table(known()))


if __name__ == "__main__":
    main()
