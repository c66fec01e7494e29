"""Does the proxy order candidates as fine-tuning does?

    python benchmarks/search/fidelity.py resnet20 --data cifar10-jpeg.tar --weights DIR

Random candidates of the search space, from mild to severe, get an accuracy before fine-tuning, with and without
reconstruction, and one after the same short distillation each. All on validation images. Reports Kendall's tau between
the proxies and the fine-tuned accuracy, over all candidates and over those that keep half of the accuracy. Writes
benchmarks/search/results/fidelity-MODEL.json after every candidate, and goes on from it.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from compare import HERE, Evaluator, arguments_of
from scipy.stats import kendalltau
from torch import nn

from autocompress import environment
from autocompress.config import RecoveryConfig
from autocompress.errors import CompressionError
from autocompress.files import read_json, write_json
from autocompress.policy import CompressionPolicy
from autocompress.recovery import TrainingFreeCompressor, fast_dtype
from autocompress.recovery.budget import Budget
from autocompress.recovery.distillation import Teacher
from autocompress.recovery.finetune import finetune


def candidates(evaluator: Evaluator, count: int) -> list[CompressionPolicy]:
    """Return random policies; the first ones mild, the last ones severe."""
    rng = random.Random(0)
    found = []
    for place in range(count):
        strength = 0.1 + 0.8 * place / (count - 1)
        choices: dict[str, Any] = {}
        for name, offered in evaluator.space.parameters.items():
            steps = sum(rng.random() < strength for _ in range(len(offered) - 1))
            # Removing a block or a rank is a whole step at once: rarer.
            rare = not name.startswith("prune") and rng.random() > strength / 2
            choices[name] = offered[0] if rare else offered[steps]
        found.append(evaluator.space.policy(choices))
    return found


def accuracy(evaluator: Evaluator, model: nn.Module) -> float:
    """Return the metric on the evaluator's validation images."""
    dtype = fast_dtype()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return evaluator.task.metric(model(evaluator.images).float(), evaluator.targets)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return Kendall's tau of both proxies."""
    best = max((row["fine_tuned"] for row in rows), default=0.0)
    kept = [row for row in rows if row["fine_tuned"] >= best / 2]
    found: dict[str, Any] = {"n": len(rows), "n_kept": len(kept)}
    for name in ("reconstructed", "recalibrated"):
        for label, chosen in (("", rows), ("_kept", kept)):
            if len(chosen) > 2:
                tau = kendalltau([r[name] for r in chosen], [r["fine_tuned"] for r in chosen]).statistic
                found[f"tau_{name}{label}"] = round(float(tau), 3)
    return found


def main() -> None:
    """Run the candidates that are not known yet."""
    parser = arguments_of(__doc__)
    parser.add_argument("--candidates", type=int, default=24)
    parser.add_argument("--epochs", type=float, default=0.25)
    arguments = parser.parse_args()
    environment.seed_everything(0)
    evaluator = Evaluator(arguments.model, arguments)
    task, inputs = evaluator.task, evaluator.task.example_inputs(2)
    shots = {
        name: TrainingFreeCompressor(
            evaluator.base, evaluator.inventory, evaluator.scores, inputs, task.calibration(256), reconstruct=fit
        )
        for name, fit in (("recalibrated", False), ("reconstructed", True))
    }
    teacher = Teacher(task.model(), fast_dtype())
    path = HERE / "results" / f"fidelity-{arguments.model}.json"
    document: dict[str, Any] = read_json(path) if path.exists() else {"rows": []}
    document |= {
        "model": arguments.model, "environment": environment.describe(), "images": arguments.images,
        "epochs": arguments.epochs,
    }  # fmt: skip
    known = {row["policy"] for row in document["rows"]}
    for policy in candidates(evaluator, arguments.candidates):
        if policy.hash in known:
            continue
        begun = time.perf_counter()
        row: dict[str, Any] = {"policy": policy.hash, "what": policy.describe()}
        try:
            for name, shot in shots.items():
                model = shot.model(policy)
                row[name] = round(accuracy(evaluator, model), 4)
        except CompressionError as error:
            print(f"{policy.describe()}: {error}", flush=True)
            continue
        finetune(model, teacher, task, RecoveryConfig(), Budget(arguments.epochs, float("inf")))
        row["fine_tuned"] = round(accuracy(evaluator, model), 4)
        row["seconds"] = round(time.perf_counter() - begun, 1)
        document["rows"].append(row)
        document["summary"] = summary(document["rows"])
        write_json(path, document)
        print(row, flush=True)
    print(document["summary"])


if __name__ == "__main__":
    main()
