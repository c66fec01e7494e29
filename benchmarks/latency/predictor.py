"""How well a latency table predicts: build one, then compare predictions with networks that it never saw.

    python benchmarks/latency/predictor.py resnet20 openvino --budget 240 --held-out 100

For a model and an engine: profile for the budget (what `autocompress profile` does), then draw random networks that
mix block removal, pruning, dtype and rank, build and measure each, and compare with what the table predicts. Networks
beside which the uncompressed one took over 1.5 times as long as usual are not compared with; what disturbed it spoiled
them too. Weights are random: latency does not depend on them. The table goes to --tables, by default the ones that
ship; the networks to compare with go to benchmarks/latency/held_out. Both are continued when called again; with
--budget 0 and as many networks as are there, nothing is measured and the figures are made anew from both files.
--repeat builds and measures so many of these networks a second time: how well one measurement predicts another of the
same network is what no prediction can do better than. Writes
benchmarks/latency/results/DEVICE/predictor-MODEL-ENGINE.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from autocompress import ClassificationTask, environment
from autocompress.compress import rewrite
from autocompress.config import RunConfig, load_config
from autocompress.evaluation.profiler import Profiler, known_profile, profile, random_choices
from autocompress.files import read_json, write_json
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.fingerprint import device_fingerprint
from autocompress.measurement.protocol import Protocol
from autocompress.measurement.statistics import quiet_latency
from autocompress.model.inventory import take_inventory
from autocompress.prediction.predictor import LatencyPredictor, Prediction, PredictionError
from autocompress.prediction.profile import SPOILED, Profile, predictor_from
from autocompress.prediction.table import LatencyTable, table_path
from autocompress.prediction.table_rows import NetworkRow
from autocompress.report.live import LiveObserver
from autocompress.runs.observer import Observer
from autocompress.space.search_space import SearchSpace, load_space

HERE = Path(__file__).parent
RESULTS = HERE / "results"
# What predictions are compared with is timed twice as long as what they are learned from, and opened five times.
_CAREFUL = Protocol.quick(min_seconds=0.4, max_seconds=0.8, instances=5)
# Two networks further apart were measured by two calls.
_PAUSE_S = 60


def vit_tiny() -> nn.Module:
    """Return a ViT-Ti/16 for 224 pixels, random weights."""
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(image_size=224, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768)


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    """Return what makes a torchvision model with random weights."""

    def make() -> nn.Module:
        import torchvision

        model: nn.Module = torchvision.models.get_model(name)
        return model

    return make


def cifar_model(name: str) -> Callable[[], nn.Module]:
    """Return what makes one of our CIFAR models with random weights."""

    def make() -> nn.Module:
        from autocompress.tasks.cifar_models import CIFAR_MODELS

        return CIFAR_MODELS[name]()

    return make


ENGINES = ("openvino", "onnxruntime")
# Model to how it is made and the side of its input.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (cifar_model("resnet20"), 32),
    "vgg11_bn": (cifar_model("vgg11_bn"), 32),
    "resnet18": (torchvision_model("resnet18"), 224),
    "mobilenet_v2": (torchvision_model("mobilenet_v2"), 224),
    "vit_tiny": (vit_tiny, 224),
}


def task_of(name: str) -> ClassificationTask:
    """Return a task that carries the model and inputs of its size; its data is never used."""
    torch.manual_seed(0)
    make, side = MODELS[name]
    images, targets = torch.rand(4, 3, side, side), torch.zeros(4, dtype=torch.long)
    return ClassificationTask(make().eval(), (images, targets), (images, targets), name=name)


def main() -> None:
    """Run one model on one engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS, nargs="?")
    parser.add_argument("engine", choices=ENGINES, nargs="?")
    parser.add_argument("--table", action="store_true", help="print what is committed as Markdown, measure nothing")
    parser.add_argument("--budget", type=float, default=300, help="seconds for the table")
    parser.add_argument("--held-out", type=int, default=100, help="networks to compare on")
    parser.add_argument("--repeat", type=int, default=0, help="networks to measure a second time")
    parser.add_argument("--limit", type=float, default=600, help="seconds for these, at most")
    parser.add_argument("--tables", type=Path, default=HERE.parents[1] / "latency_tables")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    if None in (arguments.model, arguments.engine):
        parser.error("a model and an engine are needed")

    from rich.console import Console

    observer = LiveObserver(Console(stderr=True))
    config = load_config(None, {"engine": arguments.engine, "seed": arguments.seed})
    task = task_of(arguments.model)
    again: list[tuple[NetworkRow, NetworkRow]] = []
    with observer:
        if arguments.budget > 0:
            profile(
                task, config, seconds=arguments.budget, folder=arguments.tables, observer=observer, name=arguments.model
            )
        known = known_profile(task, config, arguments.tables)
        held = held_out(task, config, known, arguments, observer)
        if arguments.repeat:
            observer.stage("Measuring networks a second time")
            again = measured_twice(task, config, held, arguments, observer)
    dense_dtype = held[0].policy.dense_dtype
    layout = known.predictor.layout
    # As a search does, it knows the whole table; what it is compared with is in another file.
    predictor = predictor_from(known.table, layout, dense_dtype)
    predictions = [predictor.predict(row.policy) for row in held]
    error = PredictionError.of(predictions, [row.ratio for row in held])
    ratios = sorted(row.ratio for row in held)
    result = {
        "model": arguments.model,
        "engine": arguments.engine,
        "engine_version": known.table.engine_version,
        "device": device_fingerprint(),
        "environment": environment.describe(),
        "baseline": {"dtype": dense_dtype, "latency_ms": known.table.baseline_ms(known.network)},
        "threads": config.threads,
        "batch_size": config.batch_size,
        "table": {
            "networks": known.networks,
            "seconds": seconds_of(known),
            "own_held_out_error": known.to_dict()["held_out_error"],
        },
        "held_out": {**error.to_dict(), "noisy": sum(row.noisy for row in held)},
        "measured_ratio": {"least": ratios[0], "median": statistics.median(ratios), "most": ratios[-1]},
        "median_half_interval_of_measurements": statistics.median(
            (row.ratio_high - row.ratio_low) / (2 * row.ratio) for row in held
        ),
        "prediction_ms": time_predictions(predictor, space_of(task, config, dense_dtype), arguments.seed),
        "networks": [
            {"policy": row.policy.hash, "predicted": p.ratio, "low": p.low, "high": p.high, "measured": row.ratio,
             "measured_low": row.ratio_low, "measured_high": row.ratio_high, "noisy": row.noisy}
            for row, p in zip(held, predictions, strict=True)
        ],
    }  # fmt: skip
    path = RESULTS / str(device_fingerprint()["slug"]) / f"predictor-{arguments.model}-{arguments.engine}.json"
    before = read_json(path) if path.exists() else {}
    if again:
        first, second = ([pair[i].ratio for pair in again] for i in (0, 1))
        alike = PredictionError.of([Prediction(ratio, ratio, ratio) for ratio in first], second)
        result["measured_twice"] = {"n": alike.n, "mape": alike.mape, "within_10": alike.within_10, "tau": alike.tau}
    elif "measured_twice" in before:
        result["measured_twice"] = before["measured_twice"]
    write_json(path, result)
    shown = ("model", "engine", "table", "held_out", "measured_twice", "prediction_ms")
    print(json.dumps({k: result[k] for k in shown if k in result}, indent=1))


def table() -> str:
    """Return all results as Markdown tables, one for each device."""
    lines = []
    for folder in sorted(RESULTS.iterdir()):
        lines += [
            f"**{folder.name}**",
            "",
            "| predictions | table | compared with | mean error | within ±10 % | tau | a prediction |",
            "|---|---|---|---|---|---|---|",
        ]
        found = {(r["engine"], r["model"]): r for r in map(read_json, folder.glob("predictor-*.json"))}
        for model, engine in itertools.product(MODELS, ENGINES):
            if (engine, model) not in found:
                continue
            result = found[engine, model]
            held, known = result["held_out"], result["table"]
            lines.append(
                f"| {model}, {engine} | {known['networks']} networks in {known['seconds']:.0f} s | {held['n']} "
                f"| {held['mape']:.1%} | {held['within_10']:.0%} | {held['tau']:.3f} "
                f"| {result['prediction_ms']['median']:.2f} ms |"
            )
        lines.append("")
    return "\n".join(lines)


def held_out(
    task: ClassificationTask, config: RunConfig, known: Profile, arguments: argparse.Namespace, observer: Observer
) -> list[NetworkRow]:
    """Return networks that the table does not hold, as many as asked for; those not measured before are measured."""
    device, version = known.table.device, known.table.engine_version
    path = table_path(config.engine, device, HERE / "held_out", threads=config.threads, batch_size=config.batch_size)
    table, _ = LatencyTable.resume(
        path, device, config.engine, version, threads=config.threads, batch_size=config.batch_size
    )
    taken = {row.policy for row in known.table.of_network(known.network).networks}

    def rows() -> list[NetworkRow]:
        found = [row for row in table.of_network(known.network).networks if row.ok and row.policy not in taken]
        quiet = quiet_latency([row.baseline_ms for row in found]) if found else 0.0
        return [row for row in found if row.baseline_ms <= SPOILED * quiet]

    if len(rows()) >= arguments.held_out:
        return rows()
    observer.stage("Measuring networks to compare with")
    started = time.monotonic()
    with EngineWorker() as worker:
        profiler = Profiler(task, config, worker, folder=arguments.tables, observer=observer, name=arguments.model)
        rng = random.Random(f"held out {arguments.seed} {len(table.networks)}")
        try:
            while len(rows()) < arguments.held_out and time.monotonic() - started < arguments.limit:
                policy = profiler.space.policy(random_choices(profiler.space, rng))
                if policy not in taken | {row.policy for row in table.networks}:
                    table.append(profiler.measure(policy, _CAREFUL))
                observer.progress(len(rows()) / arguments.held_out, f"{len(rows())} networks")
        finally:
            profiler.close()
    return rows()


def measured_twice(
    task: ClassificationTask, config: RunConfig, held: Sequence[NetworkRow], arguments: argparse.Namespace,
    observer: Observer,
) -> list[tuple[NetworkRow, NetworkRow]]:  # fmt: skip
    """Build and measure some networks anew; return both rows of each."""
    chosen = random.Random(arguments.seed).sample(list(held), min(arguments.repeat, len(held)))
    found = []
    with EngineWorker() as worker:
        profiler = Profiler(task, config, worker, folder=arguments.tables, observer=observer, name=arguments.model)
        try:
            for row in chosen:
                found.append((row, profiler.measure(row.policy, _CAREFUL)))
                observer.progress(len(found) / len(chosen), f"{len(found)} networks")
        finally:
            profiler.close()
    quiet = quiet_latency([second.baseline_ms for _, second in found])
    return [(first, second) for first, second in found if second.ok and second.baseline_ms <= SPOILED * quiet]


def seconds_of(known: Profile) -> float:
    """Return how long the table of this model took to measure, by its rows' dates; pauses between calls left out."""
    rows = known.table.of_network(known.network).networks
    dates = sorted(datetime.fromisoformat(row.measured_at) for row in rows)
    return sum(gap for one, other in pairwise(dates) if (gap := (other - one).total_seconds()) < _PAUSE_S)


def space_of(task: ClassificationTask, config: RunConfig, dense_dtype: str) -> SearchSpace:
    """Return the space that networks were drawn from."""
    inventory = take_inventory(rewrite(task.model()), task.example_inputs(2))
    return SearchSpace(load_space(config.space), inventory, dense_dtype, int8=True)


def time_predictions(predictor: LatencyPredictor, space: SearchSpace, seed: int, count: int = 200) -> dict[str, float]:
    """Return the median and the 95th percentile of the milliseconds that one prediction of a new network takes."""
    rng = random.Random(f"timing {seed}")
    policies = [space.policy(random_choices(space, rng)) for _ in range(count)]
    took = []
    for policy in policies:
        begun = time.perf_counter()
        predictor.predict(policy)
        took.append(1e3 * (time.perf_counter() - begun))
    took.sort()
    return {"median": took[count // 2], "p95": took[int(0.95 * count)]}


if __name__ == "__main__":
    main()
