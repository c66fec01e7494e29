"""Draws what the samplers reached and how a proposal's time grows, from the committed results.

    pip install matplotlib
    python benchmarks/search/plot.py

Reads compare-MODEL.json and scale.json in benchmarks/search/results; writes compare-MODEL.svg and scale.svg beside
them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from autocompress.files import read_json

RESULTS = Path(__file__).parent / "results"
COLOURS = {"knapsack": "#d1495b", "tpe": "#00798c", "nsga2": "#edae49", "gp": "#66518f", "random": "#8d8d8d"}
# Dates and random names in a file would make every redrawn picture another one.
plt.rcParams.update({"svg.hashsalt": "autocompress", "font.size": 9, "axes.spines.top": False,
                     "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})  # fmt: skip


def save(figure: Any, path: Path) -> None:
    """Write a figure."""
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


def samplers(path: Path) -> None:
    """Draw hypervolume against trials and against seconds: the mean over seeds, and between which they lie."""
    document = read_json(path)
    figure, (by_trials, by_seconds) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for name, colour in COLOURS.items():
        runs = [r for r in document["runs"] if r["sampler"] == name]
        if not runs:
            continue
        least = min(len(r["hypervolume"]) for r in runs)
        volumes = np.array([r["hypervolume"][:least] for r in runs])
        seconds = np.linspace(0, min(r["times_s"][-1] for r in runs), 400)
        timed = np.array([
            [0.0, *r["hypervolume"]][done]
            for r in runs for done in np.searchsorted(r["times_s"], seconds, side="right")
        ]).reshape(len(runs), -1)  # fmt: skip
        label = f"{name} ({len(runs)} seed{'s' * (len(runs) > 1)})"
        for axes, x, y in ((by_trials, np.arange(1, least + 1), volumes), (by_seconds, seconds, timed)):
            axes.plot(x, y.mean(0), color=colour, label=label, linewidth=1.6)
            axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)
    by_trials.set(xlabel="trials", ylabel="hypervolume", xlim=(0, None), ylim=(0, None))
    by_seconds.set(xlabel="seconds of one processor, sensitivities included", xlim=(0, None))
    by_seconds.legend(frameon=False)
    figure.suptitle(f"{document['model']}, {document['images']} validation images, latency predicted", fontsize=10)
    save(figure, path.with_suffix(".svg"))


def scale(path: Path) -> None:
    """Draw a proposal's time against finished trials."""
    figure, axes = plt.subplots(figsize=(5.4, 3.4))
    rows = read_json(path)["rows"]
    kinds = sorted({(r["parameters"], r["choices"], r["pairs"]) for r in rows})
    for kind, colour in zip(kinds, COLOURS.values(), strict=False):
        own = [r for r in rows if (r["parameters"], r["choices"], r["pairs"]) == kind]
        own.sort(key=lambda r: r["finished_trials"])
        held = [max(r["finished_trials"], 10) for r in own]
        label = f"{kind[0]} parameters of {kind[1]} choices{', costs of pairs' if kind[2] else ''}"
        axes.plot(held, [r["median_cpu_s"] for r in own], "o-", color=colour, label=label)
        axes.plot(held, [r["worst_later_cpu_s"] for r in own], "v:", color=colour, markersize=4)
    axes.axhline(2, color="#8d8d8d", linewidth=0.8)
    axes.set(xscale="log", xlabel="finished trials in the study", ylabel="seconds a proposal", ylim=(0, None))
    axes.set_title("median, and the worst of eleven (dotted)", fontsize=9)
    axes.legend(frameon=False)
    save(figure, path.with_suffix(".svg"))


def main() -> None:
    """Draw all that there is."""
    for path in sorted(RESULTS.glob("compare-*.json")):
        samplers(path)
    scale(RESULTS / "scale.json")


if __name__ == "__main__":
    main()
