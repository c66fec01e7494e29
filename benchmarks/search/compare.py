"""Samplers on the compression of a real network: the front they reach, by trials.

    python benchmarks/search/compare.py resnet20 --data cifar10-jpeg.tar --weights DIR [--samplers knapsack,tpe]

Every sampler proposes for the same space and is told the same two figures: accuracy of the compressed network on
validation data, reconstructed, not fine-tuned, and the latency that the shipped table of OpenVINO predicts
(nothing is timed, so that all samplers see the same figures and a busy machine changes none). The hypervolume is
counted from chance level and the uncompressed latency. Seconds are those of the processor, in one thread: what the
sampler knows beforehand, its proposals, and the evaluations. Writes benchmarks/search/results/compare-MODEL.json; what
was evaluated is kept in --cache with its seconds, and never evaluated twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

from autocompress import environment
from autocompress.compress import rewrite
from autocompress.compress.task_evidence import channel_scores
from autocompress.config import TaskConfig
from autocompress.errors import CompressionError
from autocompress.exploration.additive_costs import fitted_costs
from autocompress.exploration.initial_policies import seed_choices
from autocompress.exploration.samplers import SamplerPrior, make_sampler
from autocompress.exploration.sensitivity import SAMPLES, SensitivityPass
from autocompress.files import read_json, write_json
from autocompress.graph.builder import GraphBuilder
from autocompress.measurement.fingerprint import device_fingerprint
from autocompress.model.inventory import take_inventory
from autocompress.policy import CompressionPolicy
from autocompress.prediction.profile import predictor_from
from autocompress.prediction.table import LatencyTable
from autocompress.recovery import TrainingFreeCompressor, fast_dtype
from autocompress.space.search_space import SearchSpace, load_space
from autocompress.tasks import load_task

HERE = Path(__file__).parent
FLOOR = 0.1
_BATCH = 125
WEIGHTS = {"resnet20": "resnet20-cifar10.safetensors", "vgg11_bn": "vgg11bn-cifar10.safetensors"}


class Evaluator:
    """Scores policies of one model, and remembers them.

    Args:
        model: Of `WEIGHTS`.
        arguments: Of the command line.
        space: What may be chosen.
    """

    def __init__(self, model: str, arguments: argparse.Namespace, space: str = "default") -> None:
        weights = str(Path(arguments.weights) / WEIGHTS[model])
        self.task = load_task(TaskConfig(name="cifar10", model=model, data=arguments.data, weights=weights))
        self.base = rewrite(self.task.model()).to(memory_format=torch.channels_last)
        inputs = self.task.example_inputs(2)
        self.inventory = take_inventory(self.base, inputs)
        layout = GraphBuilder(self.base, self.task.example_inputs(1), self.inventory, "openvino").layout
        table = LatencyTable.load(arguments.table)
        dense = table.of_network(layout.hash).networks[-1].policy.dense_dtype
        self.predictor = predictor_from(table, layout, dense)
        file = load_space(space)
        self.space = SearchSpace(file, self.inventory, dense, int8=True)
        self.scores = channel_scores(self.task, self.base, self.inventory, file.importance)
        calibration = next(iter(self.task.calibration(SAMPLES)))
        self._oneshot = TrainingFreeCompressor(self.base, self.inventory, self.scores, inputs, [calibration])
        batches = list(self.task.validation(arguments.images))
        self.images, self.targets = batches[0]
        self._cache = Path(arguments.cache) / f"{model}.jsonl"
        self._known: dict[str, tuple[float, float]] = {}
        if self._cache.exists():
            rows = [json.loads(line) for line in self._cache.read_text().splitlines()]
            self._known = {row["policy"]: (row["accuracy"], row["seconds"]) for row in rows if "seconds" in row}

    def __call__(self, policy: CompressionPolicy) -> tuple[float, float]:
        """Return accuracy and predicted ratio."""
        if policy.hash not in self._known:
            begun = time.process_time()
            accuracy = self._accuracy(policy)
            self._known[policy.hash] = found = accuracy, round(time.process_time() - begun, 3)
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            with self._cache.open("a") as file:
                file.write(json.dumps({"policy": policy.hash, "accuracy": found[0], "seconds": found[1]}) + "\n")
        ratio = (
            1.0 if policy.is_structural_identity and not policy.int8_layers else self.predictor.predict(policy).ratio
        )
        return self._known[policy.hash][0], ratio

    def seconds(self, policy: CompressionPolicy) -> float:
        """Return the processor's seconds that evaluating a policy took."""
        return self._known[policy.hash][1]

    def _accuracy(self, policy: CompressionPolicy) -> float:
        dtype = fast_dtype()
        try:
            model = self._oneshot.model(policy)
            with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                # Tensors that large come from the system anew each time: in parts it is faster.
                outputs = torch.cat([model(part).float() for part in torch.split(self.images, _BATCH)])
        except CompressionError:
            return FLOOR
        return self.task.metric(outputs, self.targets)


def hypervolumes(points: Sequence[tuple[float, float]]) -> list[float]:
    """Return the area above chance and left of the uncompressed latency that the first n points dominate, for all n."""
    found = []
    front: list[tuple[float, float]] = []
    for accuracy, ratio in points:
        if accuracy > FLOOR and ratio < 1:
            front = [(a, r) for a, r in front if not (accuracy >= a and ratio <= r)]
            if not any(a >= accuracy and r <= ratio for a, r in front):
                front.append((accuracy, ratio))
        area, right = 0.0, 1.0
        for a, r in sorted(front, key=lambda point: -point[0]):
            if r < right:
                area += (right - r) * (a - FLOOR)
                right = r
        found.append(area / (1 - FLOOR))
    return found


def run(name: str, seed: int, trials: int, evaluator: Evaluator, known: tuple[SamplerPrior, float]) -> dict[str, Any]:
    """Run one sampler and return what it reached; `known` is what `knapsack` is told, and the seconds that took."""
    knowledge, known_s = known
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler_name, _, extra = name.partition("+")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = make_sampler(sampler_name, seed, trials, knowledge)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    if extra == "seeds":
        for choices in seed_choices(evaluator.space, list(evaluator.inventory.blocks)):
            study.enqueue_trial(choices, skip_if_exists=True)
    points, asking, times = [], [], []
    spent = known_s if sampler_name == "knapsack" else 0.0
    for _ in range(trials):
        begun = time.process_time()
        trial = study.ask()
        choices = {n: trial.suggest_categorical(n, offered) for n, offered in evaluator.space.parameters.items()}
        policy = evaluator.space.policy(choices)
        asking.append(time.process_time() - begun)
        found = evaluator(policy)
        begun = time.process_time()
        study.tell(trial, list(found))
        asking[-1] += time.process_time() - begun
        spent += asking[-1] + evaluator.seconds(policy)
        points.append(found)
        times.append(round(spent, 2))
    return {
        "sampler": name, "seed": seed, "trials": trials, "hypervolume": hypervolumes(points),
        "proposal_s": {"median": float(np.median(asking)), "last": float(np.median(asking[-10:])),
                       "total": float(sum(asking))},
        "points": [[round(a, 4), round(r, 4)] for a, r in points], "times_s": times,
    }  # fmt: skip


def knowledge_of(evaluator: Evaluator) -> tuple[SamplerPrior, dict[str, Any]]:
    """Return what the knapsack sampler is told, and what that took."""
    begun = time.process_time()
    sensing = SensitivityPass(evaluator.base, evaluator.inventory, evaluator.scores, evaluator.task, evaluator.space)
    sensitivity = sensing.run()
    assert sensitivity.note is None, sensitivity.note
    known_s = time.process_time() - begun
    begun = time.process_time()
    costs = fitted_costs(evaluator.space, lambda policy: evaluator.predictor.predict(policy).ratio)
    costs_s = time.process_time() - begun
    dense = evaluator(evaluator.space.policy({}))[0]
    losses: Any = sensitivity.losses
    error = (dense * (1 - dense) / len(evaluator.targets)) ** 0.5
    space, predictor = evaluator.space, evaluator.predictor
    return SamplerPrior(
        costs, losses, floor=FLOOR, reference=dense, error=error,
        predict=lambda choices: predictor.predict(space.policy(choices)).ratio,
    ), {
        "dense_accuracy": dense, "costs_seconds": costs_s,
        "reference_seconds": evaluator.seconds(space.policy({})),
        "sensitivity": {"seconds": known_s, "measured": sensitivity.measured, "choices": sensitivity.choices},
    }  # fmt: skip


def arguments_of(text: str | None) -> argparse.ArgumentParser:
    """Return a parser of what every comparison on a network is told."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=WEIGHTS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True, help="folder of the .safetensors files")
    parser.add_argument("--images", type=int, default=1000, help="of validation data")
    tables = HERE.parents[1] / "latency_tables"
    shipped = [tables / str(device_fingerprint()["slug"]) / "openvino.csv", *sorted(tables.glob("*/openvino.csv"))]
    own = next(path for path in shipped if path.exists())
    parser.add_argument("--table", type=Path, default=own, help="of latencies; by default this device's, if it ships")
    parser.add_argument("--cache", default="/tmp/autocompress-compare")
    return parser


def main() -> None:
    """Run the samplers asked for."""
    parser = arguments_of(__doc__)
    parser.add_argument("--samplers", default="knapsack,tpe+seeds,tpe,nsga2,random,gp")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    environment.seed_everything(0)
    random.seed(0)
    torch.set_num_threads(1)
    evaluator = Evaluator(arguments.model, arguments)
    # Sensitivities are measured anew, so that their seconds count.
    os.environ["AUTOCOMPRESS_CACHE"] = tempfile.mkdtemp()
    knowledge, found = knowledge_of(evaluator)
    path = HERE / "results" / f"compare-{arguments.model}.json"
    document: dict[str, Any] = read_json(path) if path.exists() else {"runs": []}
    document["runs"] = [r for r in document["runs"] if "times_s" in r]
    document |= {
        "model": arguments.model, "environment": environment.describe(),
        "table": "/".join(arguments.table.parts[-2:]), "images": arguments.images,
        "parameters": len(evaluator.space.parameters), **found,
    }  # fmt: skip
    known_s = document["costs_seconds"] + document["sensitivity"]["seconds"] + document["reference_seconds"]
    for seed in arguments.seeds:
        for name in arguments.samplers.split(","):
            found = run(name, seed, arguments.trials, evaluator, (knowledge, known_s))
            same = [r for r in document["runs"] if (r["sampler"], r["seed"]) != (name, seed)]
            document["runs"] = [*same, found]
            write_json(path, document)
            volumes = found["hypervolume"]
            shown = " ".join(f"{n}:{volumes[n - 1]:.4f}" for n in (10, 25, 50, 100, 200) if n <= len(volumes))
            print(f"{name:12} seed {seed}  {shown}  {found['proposal_s']['median']:.3f} s a proposal", flush=True)
    print(table(document))


TRIALS, SECONDS = (10, 25, 50, 100, 200), (60, 120, 300, 600, 1200)


def after(run: dict[str, Any], seconds: float) -> float:
    """Return the hypervolume that a run had reached after so many seconds of the processor; NaN once it had ended."""
    done = sum(time_s <= seconds for time_s in run["times_s"])
    if done == len(run["times_s"]):
        return float("nan")
    return run["hypervolume"][done - 1] if done else 0.0


def table(document: dict[str, Any]) -> str:
    """Return the mean hypervolume by sampler, by trials and by seconds."""
    lines = [f"mean hypervolume after {TRIALS} trials | after {SECONDS} s"]
    for name in dict.fromkeys(r["sampler"] for r in document["runs"]):
        runs = [r for r in document["runs"] if r["sampler"] == name]
        least = min(len(r["hypervolume"]) for r in runs)
        means = np.mean([r["hypervolume"][:least] for r in runs], axis=0)
        trials = "  ".join(f"{means[n - 1]:.4f}" if n <= least else "      " for n in TRIALS)
        timed = "  ".join(f"{np.mean([after(r, s) for r in runs]):.4f}" for s in SECONDS if "times_s" in runs[0])
        lines.append(f"{name:12} {trials} | {timed}  ({len(runs)} seeds)")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
