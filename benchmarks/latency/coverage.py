"""Is a stated ratio still true in an hour? Deployed results timed again by a runner that shares no code with ours.

    python benchmarks/latency/coverage.py --data cifar10-jpeg.tar --weights DIR --images imagenet-samples --runs runs

Five networks on two engines are searched for three minutes each (``--stage search``) and deployed; what is stated then
stands. After that `single.py` times the deployed file and the run's baseline in fresh processes, in the order A B B A,
twelve times over at least an hour (``--stage later --rounds 12 --minutes 65``), every fourth time beside a busy loop on
the other processor. Rounds may be taken one by one by repeating the command. Packages of
``benchmarks/strangers/requirements.txt`` hold MobileNetV2's and MiniLM's weights. Writes
``results/DEVICE/coverage.json`` and ``coverage.html``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from aa import RESULTS, load

from autocompress.files import read_json, write_json

ROOT = Path(__file__).parents[2]
RESULT = RESULTS / "coverage.json"
ENGINES = ("openvino", "onnxruntime")
PUBLISHED = "benchmarks.strangers.tasks.published"
BUSY_EVERY = 4


def cases(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the networks and the arguments of their searches."""

    def cifar(run_file: str, weights: str) -> list[str]:
        sets = ("--set", f"task.data={options.data}", "--set", f"task.weights={options.weights / weights}")
        return [str(ROOT / "examples" / run_file), *sets]

    return {
        "vgg11": cifar("vgg11-cifar10.yaml", "vgg11bn-cifar10.safetensors"),
        "resnet20": cifar("resnet20-cifar10.yaml", "resnet20-cifar10.safetensors"),
        "mobilenetv2": ["--task", f"{PUBLISHED}:mobilenetv2", "--set", f"task.data={options.images}"],
        "minilm": ["--task", f"{PUBLISHED}:minilm", "--metric", "cosine"],
        "resnet18": ["--task", "benchmarks.latency.large:task", "--metric", "agreement"],
    }  # fmt: skip


def call(*arguments: str, cwd: Path = ROOT) -> str:
    """Run the command line in a fresh process; return what it printed."""
    command = [sys.executable, "-m", "autocompress", *arguments]
    print("$", " ".join(["autocompress", *arguments]), flush=True)
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=cwd).stdout


def search(options: argparse.Namespace, document: dict[str, Any]) -> None:
    """Search and deploy what has not been yet."""
    for network, arguments in cases(options).items():
        for engine in ENGINES:
            name = f"{network}-{engine}"
            if name in document or (options.only and name not in options.only):
                continue
            out, deployed = options.runs / name, options.runs / f"{name}-deployed"
            for folder in (out, deployed):
                shutil.rmtree(folder, ignore_errors=True)
            said = call(
                "search", *arguments, "--engine", engine, "--target-latency", "0.6x", "--max-drop", "20pp", "--timeout",
                options.timeout, "--set", "recovery.enabled=false", "--out", str(out), "--json",
            )  # fmt: skip
            if not said:
                print(f"{name}: nothing was found", flush=True)
                continue
            best = json.loads(said)["best"]
            call("deploy", str(out), "--to", str(deployed), "--force")
            kept = (
                "latency_ratio", "latency_ratio_interval", "latency_ratio_judged", "latency_states",
                "latency_occasions", "latency_span_s", "feasible", "stage",
            )  # fmt: skip
            document[name] = {**{key: best[key] for key in kept}, "at": time.time(), "later": []}
            write_json(RESULT, document)


def later(options: argparse.Namespace, document: dict[str, Any]) -> None:
    """Time every deployed result once more; every fourth round beside a busy loop."""
    for name, one in document.items():
        baseline, deployed = options.runs / name / "baseline", options.runs / f"{name}-deployed"
        if not deployed.exists():
            continue
        kind = "busy" if len(one["later"]) % BUSY_EVERY == BUSY_EVERY - 1 else "quiet"
        with load(kind):
            dense, own, own_again, dense_again = (single(folder) for folder in (baseline, deployed, deployed, baseline))
        ratio = ((own * own_again) / (dense * dense_again)) ** 0.5
        one["later"].append(
            {
                "at": time.time(),
                "load": kind,
                "ratio": ratio,
                "ms": [own, own_again],
                "baseline_ms": [dense, dense_again],
            }
        )
        low, high = one["latency_ratio_interval"]
        print(f"{name} {kind}: {ratio:.4f} in [{low:.4f}, {high:.4f}]: {low <= ratio <= high}", flush=True)
        write_json(RESULT, document)


def single(folder: Path) -> float:
    """Return the median of a fresh process."""
    command = [sys.executable, str(Path(__file__).with_name("single.py")), str(folder)]
    return float(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)["median"])


def table(document: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| result | stated | quiet | beside a busy core | occasions over | later, quiet | later, busy | inside |",
        "|---|---|---|---|---|---|---|---|",
    ]
    inside: list[bool] = []
    for name, one in document.items():
        low, high = one["latency_ratio_interval"]
        own = [low <= entry["ratio"] <= high for entry in one["later"]]
        inside += own
        found = {
            kind: sorted(entry["ratio"] for entry in one["later"] if entry["load"] == kind)
            for kind in ("quiet", "busy")
        }
        cells = [
            name, f"{one['latency_ratio']:.3f}x ({low:.3f} to {high:.3f})",
            *(_state(one["latency_states"].get(state)) for state in ("quiet", "busy")),
            f"{one['latency_occasions']}, {one['latency_span_s'] / 60:.1f} min",
            *(f"{values[0]:.3f} to {values[-1]:.3f}" if values else "" for values in found.values()),
            f"{sum(own)} of {len(own)}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    widths = [_half(one["latency_states"]["quiet"]) for one in document.values() if "quiet" in one["latency_states"]]
    share = sum(inside) / max(1, len(inside))
    lines.append("")
    lines.append(
        f"{sum(inside)} of {len(inside)} later measurements ({share:.0%}) lie inside; the median half-width on the "
        f"quiet machine is ±{statistics.median(widths):.1%}."
    )
    return "\n".join(lines)


def _state(interval: list[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f}x ±{_half(interval):.1%}"


def _half(interval: list[float]) -> float:
    return (interval[2] - interval[1]) / (2 * interval[0])


def plot(document: dict[str, Any], path: Path) -> None:
    """Draw every result's interval and what came later, relative to what was stated."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for row, one in enumerate(document.values()):
        middle = one["latency_ratio"]
        low, high = (end / middle for end in one["latency_ratio_interval"])
        figure.add_shape(
            type="rect", x0=low, x1=high, y0=row - 0.3, y1=row + 0.3, fillcolor="#dbe7f3", line_width=0, layer="below"
        )
        for kind, color in (("quiet", "#1f6f43"), ("busy", "#c2410c")):
            ratios = [entry["ratio"] / middle for entry in one["later"] if entry["load"] == kind]
            heights = [row + 0.4 * (index / max(1, len(ratios) - 1) - 0.5) for index in range(len(ratios))]
            figure.add_scatter(
                x=ratios, y=heights, mode="markers", marker={"color": color, "size": 7}, name=f"later, {kind}",
                legendgroup=kind, showlegend=row == 0,
            )  # fmt: skip
    figure.update_yaxes(tickvals=list(range(len(document))), ticktext=list(document), autorange="reversed")
    figure.update_xaxes(title="ratio over what was stated; the bar is the stated interval")
    figure.update_layout(template="plotly_white", height=90 + 48 * len(document), margin={"l": 10, "r": 10, "t": 30})
    figure.write_html(path, include_plotlyjs="cdn")


def main() -> None:
    """Read the options and do what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="cifar10-jpeg.tar or a folder like it")
    parser.add_argument("--weights", type=Path, help="folder of vgg11bn-cifar10 and resnet20-cifar10.safetensors")
    parser.add_argument("--images", type=Path, help="1,000 photographs named NNNN_*.jpg")
    parser.add_argument("--runs", type=Path, default=Path("runs/coverage"))
    parser.add_argument("--stage", choices=("search", "later", "table", "all"), default="all")
    parser.add_argument("--only", nargs="+", metavar="NETWORK-ENGINE")
    parser.add_argument("--timeout", default="3m")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=65.0, help="that the rounds are spread over")
    options = parser.parse_args()
    options.runs = options.runs.resolve()
    document: dict[str, Any] = read_json(RESULT) if RESULT.exists() else {}
    if options.stage in ("search", "all"):
        search(options, document)
    if options.stage in ("later", "all"):
        for number in range(options.rounds):
            begun = time.monotonic()
            later(options, document)
            if number + 1 < options.rounds:
                time.sleep(max(0.0, 60 * options.minutes / (options.rounds - 1) - (time.monotonic() - begun)))
    plot(document, RESULT.with_suffix(".html"))
    print(table(document))


if __name__ == "__main__":
    main()
