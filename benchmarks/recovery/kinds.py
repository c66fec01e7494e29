"""What fine-tuning gains for every kind of output: small trained networks, three of five channels pruned.

    python benchmarks/recovery/kinds.py [--seconds 20] [--ratio 0.6]
    python benchmarks/recovery/kinds.py --table

Each network of `networks.KINDS` is trained, 60 % of the channels of every group are removed with the repair that a
search makes, and what is left is fine-tuned with the defaults of the `recovery` section for so many seconds at most.
Figures are the task's own metric on test data, which nothing is chosen by. Writes results/kinds.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from networks import KINDS

from autocompress import environment
from autocompress.compress import rewrite
from autocompress.compress.task_evidence import channel_scores
from autocompress.config import RecoveryConfig
from autocompress.files import read_json, write_json
from autocompress.model.inventory import take_inventory
from autocompress.policy import CompressionPolicy
from autocompress.recovery import TrainingFreeCompressor, fast_dtype
from autocompress.recovery.budget import Budget
from autocompress.recovery.distillation import Teacher
from autocompress.recovery.finetune import finetune
from autocompress.tasks import Task
from autocompress.tasks.validation import metric_of

RESULT = Path(__file__).with_name("results") / "kinds.json"


def quality(model: torch.nn.Module, task: Task) -> float:
    """Return the task's metric on test data."""
    return metric_of(model.eval(), task, task.test(256), torch.float32)


def gained(task: Task, ratio: float, seconds: float) -> dict[str, Any]:
    """Return the figures of one network: whole, pruned, fine-tuned."""
    base = rewrite(task.model())
    inputs = task.example_inputs(2)
    inventory = take_inventory(base, inputs)
    scores = channel_scores(task, base, inventory, "magnitude")
    made = TrainingFreeCompressor(base, inventory, scores, inputs, task.calibration(256))
    model = made.model(CompressionPolicy(pruning=dict.fromkeys(inventory.groups, ratio)))
    before = quality(model, task)
    started = time.monotonic()
    report = finetune(model, Teacher(task.model(), fast_dtype()), task, RecoveryConfig(), Budget(24, seconds))
    took = time.monotonic() - started
    return {
        "kind": task.name,
        "steered_by": task.divergence_name,
        "metric": task.metric_name,
        "whole": quality(task.model(), task),
        "pruned": before,
        "finetuned": quality(model, task),
        "optimizer": report.optimizer,
        "learning_rate": report.learning_rate,
        "seconds": round(took, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as Markdown."""
    lines = [
        "| outputs | steered by | metric | whole | pruned | fine-tuned | optimizer |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = " | ".join(f"{row[key]:.4f}" for key in ("whole", "pruned", "finetuned"))
        optimizer = f"{row['optimizer']}, {row['learning_rate']:.1g}"
        lines.append(f"| {row['kind']} | {row['steered_by']} | {row['metric']} | {figures} | {optimizer} |")
    return "\n".join(lines)


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one fine-tuning at most")
    parser.add_argument("--ratio", type=float, default=0.6, help="of the channels of every group, removed")
    parser.add_argument("--only", default="", help="kinds whose name holds this; nothing is written")
    parser.add_argument("--table", action="store_true", help="print what was written")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read_json(RESULT)["kinds"]))
        return
    rows = []
    for make in KINDS:
        torch.manual_seed(0)
        task = make()
        if arguments.only in task.name:
            rows.append(gained(task, arguments.ratio, arguments.seconds))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    if not arguments.only:
        settings = {"ratio": arguments.ratio, "seconds": arguments.seconds}
        write_json(RESULT, {"environment": environment.describe(), "settings": settings, "kinds": rows})


if __name__ == "__main__":
    main()
