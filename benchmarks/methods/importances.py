"""Importances on real networks: what is left of the accuracy when the same share of channels goes by each of them.

    python benchmarks/methods/importances.py resnet20 --data cifar10-jpeg.tar --weights DIR [--epochs 2]
    python benchmarks/methods/importances.py --table

Half of the multiply-accumulates go. *Same ratios*: every group loses the same share of its channels, and importances
only choose which. *Own ratios*: one global threshold over the importance's scores, which says also how much each group
loses. Both are scored on test data after batch-norm recalibration, before fine-tuning; with --epochs, networks of
same ratios are then fine-tuned by distillation, all alike, and scored again. Nothing is chosen by these figures.

`random` is the mean of three seeds before fine-tuning, and the first after it. Writes
benchmarks/methods/results/importances-MODEL.json after every step; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autocompress import environment
from autocompress.compress import IMPORTANCES, CompressionContext, apply_policy, rewrite
from autocompress.compress.shapes import network_macs
from autocompress.compress.task_evidence import channel_scores
from autocompress.compress.thresholds import policy_at_macs, threshold_policy
from autocompress.config import RecoveryConfig, TaskConfig
from autocompress.files import read_json, write_json
from autocompress.model.inventory import take_inventory
from autocompress.policy import CompressionPolicy
from autocompress.recovery import fast_dtype, recalibrate
from autocompress.recovery.budget import Budget
from autocompress.recovery.distillation import Teacher
from autocompress.recovery.finetune import finetune
from autocompress.tasks import load_task
from autocompress.tasks.base import Task

RESULTS = Path(__file__).parent / "results"
WEIGHTS = {"resnet20": "resnet20-cifar10.safetensors", "vgg11_bn": "vgg11bn-cifar10.safetensors"}
SHARE, SEEDS = 0.5, (0, 1, 2)
NAMES = [*(name for name in IMPORTANCES if name != "random"), "random"]
# Within a group these order channels as `magnitude` (or `magnitude_l1`) does: at the same ratios they are the same.
SAME_ORDER = {"lamp": "magnitude", "magnitude_global": "magnitude", "magnitude_l1_global": "magnitude_l1"}


def accuracy(model: nn.Module, task: Task) -> float:
    """Return the accuracy on test data."""
    dtype = fast_dtype()
    outputs, targets = [], []
    for inputs, target in task.test(512):
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            outputs.append(model(inputs.contiguous(memory_format=torch.channels_last)).float())
        targets.append(target)
    return task.metric(torch.cat(outputs), torch.cat(targets))


class Bench:
    """One network, and what is known of it.

    Args:
        model: Of `WEIGHTS`.
        arguments: Of the command line.
    """

    def __init__(self, model: str, arguments: argparse.Namespace) -> None:
        weights = str(Path(arguments.weights) / WEIGHTS[model])
        self.task = load_task(TaskConfig(name="cifar10", model=model, data=arguments.data, weights=weights))
        self.base = rewrite(self.task.model()).to(memory_format=torch.channels_last)
        self.inputs = self.task.example_inputs(2)
        self.inventory = take_inventory(self.base, self.inputs)
        self.uniform = policy_at_macs(
            self.inventory, SHARE, lambda ratio: threshold_policy({}, self.inventory, ratio, scope="layer")
        )
        # One for all: they train on the same epochs, and its answers are kept.
        self.teacher = Teacher(self.task.model(), fast_dtype())
        self.path = RESULTS / f"importances-{model}.json"
        self.found: dict[str, Any] = read_json(self.path) if self.path.exists() else {"rows": {}}
        self.found |= {
            "model": model,
            "share_of_macs": SHARE,
            "macs": network_macs(self.inventory, self.uniform),
            "macs_uncompressed": self.inventory.macs,
            "pruning": dict(self.uniform.pruning),
            "environment": environment.describe(),
        }
        self.rows: dict[str, dict[str, Any]] = self.found["rows"]

    def once(self, name: str, key: str, measure: Callable[[], Any]) -> None:
        """Measure what is not yet known, and write everything down."""
        row = self.rows.setdefault(name, {})
        if key not in row:
            started = time.perf_counter()
            row[key] = measure()
            print(f"{name} {key} {row[key]} ({time.perf_counter() - started:.0f} s)", flush=True)
            write_json(self.path, self.found)

    def scores(self, name: str, seed: int = 0) -> dict[str, Tensor]:
        """Return the scores of one importance."""
        torch.manual_seed(seed)
        return channel_scores(self.task, self.base, self.inventory, name)

    def pruned(self, policy: CompressionPolicy, scores: dict[str, Tensor]) -> nn.Module:
        """Return a recalibrated network."""
        model = apply_policy(self.base, policy, CompressionContext(self.inputs, scores))
        recalibrate(model, self.task.calibration(256))
        return model

    def same_ratios(self, name: str) -> float:
        """Return the accuracy at the same ratios for all, before fine-tuning."""
        seeds = SEEDS if name == "random" else SEEDS[:1]
        return statistics.mean(accuracy(self.pruned(self.uniform, self.scores(name, s)), self.task) for s in seeds)

    def own_ratios(self, name: str) -> float:
        """Return the accuracy at a global threshold, before fine-tuning."""
        found = []
        for seed in SEEDS if name == "random" else SEEDS[:1]:
            scores = self.scores(name, seed)
            policy = policy_at_macs(self.inventory, SHARE, partial(threshold_policy, scores, self.inventory))
            found.append(accuracy(self.pruned(policy, scores), self.task))
        return statistics.mean(found)

    def tuned(self, name: str, epochs: float) -> float:
        """Return the accuracy at the same ratios after fine-tuning."""
        environment.seed_everything(0)
        model = self.pruned(self.uniform, self.scores(name))
        finetune(model, self.teacher, self.task, RecoveryConfig(), Budget(epochs, float("inf")))
        return accuracy(model, self.task)


def table() -> str:
    """Return the results as Markdown tables; a column that nothing was measured of is left out."""
    lines = []
    for path in sorted(RESULTS.glob("importances-*.json")):
        found = read_json(path)
        rows = found["rows"]
        measured = {key for name in NAMES for key in rows.get(name, {})}
        tuned = sorted(key for key in measured if key.startswith("tuned_"))
        titles = {"same_ratios": "same ratios", "own_ratios": "own ratios"}
        titles |= {key: f"same ratios, {key.removeprefix('tuned_')} epochs" for key in tuned}
        lines += [
            f"**{found['model']}**, {found['macs'] / found['macs_uncompressed']:.3f}x the MACs (same ratios), "
            f"uncompressed {rows['uncompressed']['accuracy']:.2%}",
            "",
            f"| importance | {' | '.join(titles.values())} |",
            "|---" * (1 + len(titles)) + "|",
        ]
        for name in NAMES:
            row = rows.get(name, {})
            cells = {key: f"{row[key]:.2%}" if key in row else "not measured" for key in titles}
            if name in SAME_ORDER:
                cells |= {key: f"as {SAME_ORDER[name]}" for key in titles if key != "own_ratios"}
            lines.append(f"| {name} | {' | '.join(cells.values())} |")
        lines.append("")
    return "\n".join(lines)


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """Return a parser of what every comparison of methods on a network is told."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=WEIGHTS)
    parser.add_argument("--table", action="store_true", help="print the committed results as Markdown, run nothing")
    parser.add_argument("--data", help="CIFAR-10: a directory or .tar with train/ and test/")
    parser.add_argument("--weights", help="directory with the two safetensors files")
    return parser


def main() -> None:
    """Read the options and measure."""
    parser = parser_of(__doc__)
    parser.add_argument("--epochs", type=float, default=0.0, help="of distillation; 0, the default, leaves it out")
    parser.add_argument("--importance", action="append", choices=NAMES, help="to fine-tune; all by default")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    if None in (arguments.model, arguments.data, arguments.weights):
        parser.error("a model, --data and --weights are needed")
    bench = Bench(arguments.model, arguments)
    bench.once("uncompressed", "accuracy", lambda: accuracy(bench.base, bench.task))
    for name in NAMES:
        if name not in SAME_ORDER:
            bench.once(name, "same_ratios", partial(bench.same_ratios, name))
        bench.once(name, "own_ratios", partial(bench.own_ratios, name))
    for name in (arguments.importance or NAMES) if arguments.epochs else ():
        if name not in SAME_ORDER:
            bench.once(name, f"tuned_{arguments.epochs:g}", partial(bench.tuned, name, arguments.epochs))
    print(table())


if __name__ == "__main__":
    main()
