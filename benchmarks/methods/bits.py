"""Bits and ranks on real networks: what is left of the accuracy at each, by every method.

    python benchmarks/methods/bits.py resnet20 --data cifar10-jpeg.tar --weights DIR [--epochs 0.5]
    python benchmarks/methods/bits.py --table

*Bits*: all weights of two or more axes in 8, 6, 4, 3 and 2 bits by every quantizer for storage, one table of levels for
each tensor, or integers with a scale for each channel or 64 weights, batch-norm recalibrated; with --epochs also after
so much distillation with the weights seen quantized. *Ranks*: every convolution of 3 x 3 but the first in its low-rank
form, of weights alone, and fitted to the calibration data as a search fits it; with --epochs also distilled. Accuracies
are of the test data; nothing is chosen by them. Writes benchmarks/methods/results/bits-MODEL.json after every figure; a
run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from importances import RESULTS, WEIGHTS, accuracy, parser_of
from torch import nn

from autocompress import environment
from autocompress.compress import rewrite
from autocompress.compress.shapes import factorized_macs_ratio
from autocompress.config import RecoveryConfig, TaskConfig
from autocompress.files import read_json, write_json
from autocompress.graph.layout import Layout
from autocompress.model.inventory import take_inventory
from autocompress.policy import FACTORIZATIONS, CompressionPolicy, LayerPolicy
from autocompress.recovery import TrainingFreeCompressor, fast_dtype, recalibrate
from autocompress.recovery.budget import Budget
from autocompress.recovery.distillation import Teacher
from autocompress.recovery.finetune import finetune
from autocompress.storage.granularity import quantized
from autocompress.storage.quantizers import QUANTIZERS
from autocompress.storage.sharing import share_weights
from autocompress.storage.sparsity import bake
from autocompress.storage.straight_through import quantize_through
from autocompress.tasks import load_task

BITS = (8, 6, 4, 3, 2, 1)
SCALED = ("uniform", "asymmetric")
SCALES: dict[str, str | int] = {"channel": "channel", "64 weights": 64}
RANKS = {"tucker2": (0.5, 0.25), "spatial_svd": (0.25, 0.17), "cp": (0.17, 0.125)}


class Bench:
    """One network, and what is known of it.

    Args:
        model: Of `WEIGHTS`.
        arguments: Of the command line.
    """

    def __init__(self, model: str, arguments: argparse.Namespace) -> None:
        weights = str(Path(arguments.weights) / WEIGHTS[model])
        self.task = load_task(TaskConfig(name="cifar10", model=model, data=arguments.data, weights=weights))
        self.base = rewrite(self.task.model())
        self.inventory = take_inventory(self.base, self.task.example_inputs(2))
        self.path = RESULTS / f"bits-{model}.json"
        self.found: dict[str, Any] = read_json(self.path) if self.path.exists() else {"bits": {}, "ranks": {}}
        self.found |= {"model": model, "environment": environment.describe()}
        # Trained networks see the same epochs; the teacher's answers are kept.
        self.teacher = Teacher(self.task.model(), fast_dtype())

    def once(self, kind: str, key: str, measure: Callable[[], Any]) -> None:
        """Measure what is not yet known, and write everything down."""
        if key not in self.found.setdefault(kind, {}):
            started = time.perf_counter()
            self.found[kind][key] = measure()
            print(f"{kind} {key} {self.found[kind][key]} ({time.perf_counter() - started:.0f} s)", flush=True)
            write_json(self.path, self.found)

    def bits(self, name: str, weight_bits: int) -> float:
        """Return the accuracy with all weights in so many bits."""
        model = copy.deepcopy(self.base)
        share_weights(model, weight_bits, QUANTIZERS[name]())
        bake(model)
        recalibrate(model, self.task.calibration(256))
        return accuracy(model, self.task)

    def scaled_bits(self, name: str, weight_bits: int, granularity: str | int) -> float:
        """Return the accuracy with scales for every channel or group."""
        model = copy.deepcopy(self.base)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.data = quantized(parameter.data, weight_bits, QUANTIZERS[name](), granularity)
        recalibrate(model, self.task.calibration(256))
        return accuracy(model, self.task)

    def trained_bits(self, name: str, weight_bits: int, epochs: float) -> float:
        """Return the accuracy with all weights in so many bits after training."""
        model = copy.deepcopy(self.base)
        # Codebooks too: the gradients of a level are summed, and at this learning rate levels of their own diverge.
        quantize_through(model, weight_bits, QUANTIZERS[name]())
        self._train(model, epochs)
        bake(model)
        return accuracy(model, self.task)

    def trained_ranks(self, name: str, ratio: float, epochs: float) -> float:
        """Return the accuracy of the fitted low-rank network after training."""
        model = self._factorized(name, ratio, fitted=True)[1]
        self._train(model, epochs)
        return accuracy(model, self.task)

    def train_all(self, epochs: float) -> None:
        """Train every form of the table, the fewest bits first."""
        if self.found.setdefault("epochs", epochs) != epochs:
            raise SystemExit(
                f"{self.path} has figures after {self.found['epochs']:g} epochs; remove it, or train alike."
            )
        for bits, (name, kind) in itertools.product(reversed(BITS), QUANTIZERS.items()):
            if bits in kind.BITS:
                self.once("trained_bits", f"{name} {bits}", partial(self.trained_bits, name, bits, epochs))
        for name in FACTORIZATIONS:
            for ratio in RANKS[name]:
                self.once("trained_ranks", f"{name} {ratio}", partial(self.trained_ranks, name, ratio, epochs))

    def _train(self, model: nn.Module, epochs: float) -> None:
        environment.seed_everything(0)
        finetune(model, self.teacher, self.task, RecoveryConfig(), Budget(epochs, float("inf")))

    def ranks(self, name: str, ratio: float) -> dict[str, float]:
        """Return share of the MACs and accuracies: of weights alone, and fitted."""
        row: dict[str, float] = {}
        for way in ("weights", "fitted"):
            policy, model = self._factorized(name, ratio, fitted=way == "fitted")
            row["macs"] = Layout(self.inventory).macs(policy) / self.inventory.macs
            row[way] = accuracy(model, self.task)
        return row

    def _factorized(self, name: str, ratio: float, *, fitted: bool) -> tuple[CompressionPolicy, nn.Module]:
        layers = {
            layer.name: LayerPolicy(rank_ratio=ratio, factorization=name)
            for layer in self.inventory.layers.values()
            if layer.factorizable and layer.kind == "conv" and layer.in_channels > 3
            and factorized_macs_ratio(layer, name, ratio) < 1
        }  # fmt: skip
        policy = CompressionPolicy(layers=layers)
        made = TrainingFreeCompressor(
            self.base, self.inventory, {}, self.task.example_inputs(2), self.task.calibration(256), reconstruct=fitted
        )
        return policy, made.model(policy)


def table() -> str:
    """Return the results as Markdown tables."""
    lines = []
    for path in sorted(RESULTS.glob("bits-*.json")):
        found = read_json(path)
        whole = found["bits"]["uncompressed"]
        lines += [
            f"**{found['model']}**, uncompressed {whole:.2%}",
            "",
            f"| quantizer | {' | '.join(f'{b} bit' for b in BITS)} |",
            "|---" * (1 + len(BITS)) + "|",
        ]
        epochs = found.get("epochs")
        ways = [("bits", ""), *((f"bits of {g}", f", a scale per {g}") for g in SCALES)]
        ways += [("trained_bits", f", trained {epochs:g} epochs")] if epochs else []
        for name, (way, told) in itertools.product(QUANTIZERS, ways):
            cells = [found[way].get(f"{name} {b}") for b in BITS] if way in found else []
            if any(cell is not None for cell in cells):
                lines.append(f"| {name}{told} | {' | '.join('' if c is None else f'{c:.2%}' for c in cells)} |")
        titles = ["low rank", "ratio", "MACs", "weights alone", "fitted"]
        titles += [f"fitted, trained {epochs:g} epochs"] if found.get("trained_ranks") else []
        lines += ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for key, row in found["ranks"].items():
            name, ratio = key.split()
            cells = [row["weights"], row["fitted"], *([found["trained_ranks"].get(key)] if len(titles) > 5 else [])]
            shown = " | ".join("" if cell is None else f"{cell:.2%}" for cell in cells)
            lines.append(f"| {name} | {ratio} | {row['macs']:.2f}x | {shown} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Read the options and measure."""
    parser = parser_of(__doc__)
    parser.add_argument("--epochs", type=float, default=0.0, help="of distillation; 0, the default, leaves it out")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    if None in (arguments.model, arguments.data, arguments.weights):
        parser.error("a model, --data and --weights are needed")
    environment.seed_everything(0)
    bench = Bench(arguments.model, arguments)
    bench.once("bits", "uncompressed", lambda: accuracy(bench.base, bench.task))
    for name, kind in QUANTIZERS.items():
        for bits in BITS:
            if bits in kind.BITS:
                bench.once("bits", f"{name} {bits}", partial(bench.bits, name, bits))
                for what, granularity in SCALES.items() if name in SCALED else ():
                    measure = partial(bench.scaled_bits, name, bits, granularity)
                    bench.once(f"bits of {what}", f"{name} {bits}", measure)
    for name in FACTORIZATIONS:
        for ratio in RANKS[name]:
            bench.once("ranks", f"{name} {ratio}", partial(bench.ranks, name, ratio))
    if arguments.epochs:
        bench.train_all(arguments.epochs)
    print(table())


if __name__ == "__main__":
    main()
