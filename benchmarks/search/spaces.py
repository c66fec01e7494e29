"""Everything jointly against one kind of compression alone, on equal seconds of processor time.

    python benchmarks/search/spaces.py resnet20 --data cifar10-jpeg.tar --weights DIR [--seconds 60]

The knapsack sampler searches each space that is shipped, evaluated as in `compare.py`. Seconds are those of the
processor in one thread, of sensitivities, costs, proposals and evaluations together, so that other programs on the
machine change nothing. Writes benchmarks/search/results/spaces-MODEL.json.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import numpy as np
import optuna
import torch
from compare import HERE, Evaluator, arguments_of, hypervolumes, knowledge_of

from autocompress import environment
from autocompress.exploration.samplers import make_sampler
from autocompress.files import read_json, write_json

SPACES = ("default", "prune-only", "quantize-only", "lowrank-only", "uniform")


def searched(evaluator: Evaluator, seed: int, seconds: float) -> dict[str, Any]:
    """Search until `seconds` of processor time are over; return the points and when each was known."""
    begun = time.process_time()
    knowledge, _ = knowledge_of(evaluator)
    sampler = make_sampler("knapsack", seed, 1000, knowledge)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    known_s = time.process_time() - begun
    points: list[tuple[float, float]] = []
    times: list[float] = []
    seen: set[str] = set()
    while time.process_time() - begun < seconds and len(points) < 1000:
        trial = study.ask()
        choices = {n: trial.suggest_categorical(n, offered) for n, offered in evaluator.space.parameters.items()}
        policy = evaluator.space.policy(choices)
        found = evaluator(policy)
        study.tell(trial, list(found))
        points.append(found)
        times.append(round(time.process_time() - begun, 2))
        seen.add(policy.hash)
        # A small space is exhausted before its time is up.
        if len(points) > 2 * len(seen) + 20:
            break
    return {
        "seed": seed, "trials": len(points), "networks": len(seen), "known_s": known_s, "times_s": times,
        "hypervolume": hypervolumes(points)[-1], "points": [[round(a, 4), round(r, 4)] for a, r in points],
    }  # fmt: skip


def main() -> None:
    """Search every space with every seed."""
    parser = arguments_of(__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = HERE / "results" / f"spaces-{arguments.model}.json"
    document: dict[str, Any] = read_json(path) if path.exists() else {"runs": []}
    document |= {"model": arguments.model, "environment": environment.describe(), "seconds": arguments.seconds}
    for seed in range(arguments.seeds):
        for space in SPACES:
            if any((r["space"], r["seed"]) == (space, seed) for r in document["runs"]):
                continue
            environment.seed_everything(seed)
            # Nothing is known beforehand: neither evaluations nor sensitivities.
            with tempfile.TemporaryDirectory() as folder:
                arguments.cache = folder
                os.environ["AUTOCOMPRESS_CACHE"] = folder
                found = searched(Evaluator(arguments.model, arguments, space), seed, arguments.seconds)
            document["runs"].append({"space": space, **found})
            write_json(path, document)
            print(f"{space:14} seed {seed}  {found['trials']:4} trials  {found['hypervolume']:.4f}", flush=True)
    means = {s: float(np.mean([r["hypervolume"] for r in document["runs"] if r["space"] == s])) for s in SPACES}
    single = max(value for space, value in means.items() if space != "default")
    document["summary"] = {"hypervolume": means, "joint_over_best_single": means["default"] / single - 1}
    write_json(path, document)
    print(document["summary"])


if __name__ == "__main__":
    main()
