"""The main job on real networks: search, deploy, and measure the deployed directory again in a fresh process.

    python benchmarks/main_job/run.py --data cifar10-jpeg.tar --weights DIR [--case vgg11-openvino …] [--timeout 25m]

`DIR` holds ``resnet20-cifar10.safetensors`` and ``vgg11bn-cifar10.safetensors``. Every case writes one JSON document to
``benchmarks/main_job/results``: the document of ``search --json``, the exit code, and what ``benchmark`` measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# Case to run file, weights, engine, target.
CASES = {
    "vgg11-openvino": ("vgg11-cifar10.yaml", "vgg11bn-cifar10.safetensors", "openvino", "0.3x"),
    "vgg11-openvino-fifth": ("vgg11-cifar10.yaml", "vgg11bn-cifar10.safetensors", "openvino", "0.2x"),
    "resnet20-openvino": ("resnet20-cifar10.yaml", "resnet20-cifar10.safetensors", "openvino", "0.65x"),
    "resnet20-openvino-half": ("resnet20-cifar10.yaml", "resnet20-cifar10.safetensors", "openvino", "0.55x"),
    "resnet20-openvino-third": ("resnet20-cifar10.yaml", "resnet20-cifar10.safetensors", "openvino", "0.33x"),
    "resnet20-openvino-lowest": ("resnet20-cifar10.yaml", "resnet20-cifar10.safetensors", "openvino", "0.3x"),
    "vgg11-onnxruntime": ("vgg11-cifar10.yaml", "vgg11bn-cifar10.safetensors", "onnxruntime", "0.3x"),
    "resnet20-onnxruntime": ("resnet20-cifar10.yaml", "resnet20-cifar10.safetensors", "onnxruntime", "0.65x"),
}


def call(*arguments: str) -> tuple[int, str]:
    """Run the command line in a fresh process; return its exit code and what it printed on stdout."""
    command = [sys.executable, "-m", "autocompress", *arguments]
    print("$", " ".join(["autocompress", *arguments]), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stdout


def run(case: str, data: str, weights: Path, timeout: str, runs: Path) -> None:
    """Run one case and write its result."""
    run_file, file, engine, target = CASES[case]
    out, deployed = runs / case, runs / f"{case}-deployed"
    for folder in (out, deployed):
        shutil.rmtree(folder, ignore_errors=True)
    code, document = call(
        "search", str(ROOT / "examples" / run_file), "--set", f"task.data={data}", "--set",
        f"task.weights={weights / file}", "--engine", engine, "--target-latency", target, "--max-drop", "1pp",
        "--timeout", timeout, "--out", str(out), "--json",
    )  # fmt: skip
    result = {"case": case, "target_latency": target, "timeout": timeout, "exit_code": code}
    if document:
        result["search"] = json.loads(document)
        call("deploy", str(out), "--to", str(deployed))
        found = [call("benchmark", str(out / "baseline"), str(deployed), "--json") for _ in range(5)]
        result["benchmark"] = [json.loads(text) for status, text in found if status == 0]
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / f"{case}.json").write_text(json.dumps(result, indent=2).replace(f"{runs}/", "") + "\n")


def table() -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| network, engine | asked | latency | ratio | re-measured (median of 5) | test accuracy | drop | size |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        path = HERE / "results" / f"{case}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        if "search" not in result:
            lines.append(f"| {result['case']} | {result['target_latency']} | exit code {result['exit_code']} |")
            continue
        base, best = result["search"]["baseline"], result["search"]["best"]
        again = sorted(rows[1]["ratio"] for rows in result["benchmark"])
        lines.append(
            f"| {result['case']} | {result['target_latency']}, 1 pp "
            f"| {base['latency_ms']:.3f} ms ({base['dtype']}) → {best['latency_ms']:.3f} ms "
            f"| **{best['latency_ratio']:.3f}x** | {again[len(again) // 2]:.3f}x "
            f"| {base['accuracy']:.2%} → {best['accuracy']:.2%} | **{best['accuracy_drop_pp']:.2f} pp** "
            f"| {base['size_bytes'] / 1e6:.2f} → {best['size_bytes'] / 1e6:.2f} MB |"
        )
    return "\n".join(lines)


def main() -> None:
    """Read the options and run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the committed results as Markdown, run nothing")
    parser.add_argument("--data", help="CIFAR-10: a directory or .tar with train/ and test/")
    parser.add_argument("--weights", type=Path, help="directory with the two safetensors files")
    parser.add_argument("--case", action="append", choices=CASES, help="all by default")
    parser.add_argument("--timeout", default="25m")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    if options.data is None or options.weights is None:
        parser.error("--data and --weights are needed")
    for case in options.case or CASES:
        run(case, options.data, options.weights, options.timeout, options.runs)


if __name__ == "__main__":
    main()
