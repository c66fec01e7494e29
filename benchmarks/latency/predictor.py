"""How well a latency table predicts: build one, then compare predictions with networks that it never saw.

    python benchmarks/latency/predictor.py resnet20 openvino --budget 240 --held-out 100

For a model and an engine: profile for the budget (what `autocompress profile` does), then draw random networks that
mix block removal, pruning, dtype and rank, predict each, build and measure it, and compare. Weights are random: latency
does not depend on them. Writes benchmarks/latency/results/predictor-MODEL-ENGINE.json; the table goes to --tables, by
default the ones that ship.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from autocompress import ClassificationTask, environment
from autocompress.config import load_config
from autocompress.latency.fingerprint import device_fingerprint
from autocompress.latency.predictor import PredictionError
from autocompress.latency.protocol import Protocol
from autocompress.report.live import LiveObserver
from autocompress.results import write_json
from autocompress.search.profiling import Profiler, random_choices
from autocompress.worker import EngineWorker

HERE = Path(__file__).parent
# What predictions are compared with is timed twice as long as what they are learned from.
_CAREFUL = Protocol.quick(min_seconds=0.4, max_seconds=0.8)


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
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("engine", choices=("openvino", "onnxruntime"))
    parser.add_argument("--budget", type=float, default=300, help="seconds for the table")
    parser.add_argument("--held-out", type=int, default=100, help="networks to compare on")
    parser.add_argument("--limit", type=float, default=600, help="seconds for these, at most")
    parser.add_argument("--tables", type=Path, default=HERE.parents[1] / "latency_tables")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    from rich.console import Console

    observer = LiveObserver(Console(stderr=True))
    config = load_config(None, {"engine": arguments.engine, "seed": arguments.seed})
    with EngineWorker() as worker, observer:
        profiler = Profiler(
            task_of(arguments.model), config, worker, folder=arguments.tables, observer=observer, name=arguments.model
        )
        try:
            table = profiler.run(arguments.budget)
            print(
                f"{arguments.model} {arguments.engine}: table of {table.networks} in {table.seconds:.0f} s", table.error
            )
            rows = compare(profiler, arguments.held_out, arguments.limit, arguments.seed)
            engine = worker.describe(arguments.engine)
        finally:
            profiler.close()
    error = PredictionError.of([p for _, p, _ in rows], [m.ratio for _, _, m in rows])
    predict_ms = time_predictions(profiler, arguments.seed)
    ratios = sorted(m.ratio for _, _, m in rows)
    result = {
        "model": arguments.model,
        "engine": arguments.engine,
        "engine_version": engine["version"],
        "device": device_fingerprint(),
        "environment": environment.describe(),
        "baseline": {"dtype": profiler.dense_dtype, "latency_ms": table.table.baseline_ms(table.network)},
        "threads": config.threads,
        "batch_size": config.batch_size,
        "table": {
            "networks": table.networks,
            "seconds": table.seconds,
            "own_held_out_error": table.to_dict()["held_out_error"],
        },
        "held_out": {**error.to_dict(), "noisy": sum(m.noisy for _, _, m in rows)},
        "measured_ratio": {"least": ratios[0], "median": statistics.median(ratios), "most": ratios[-1]},
        "median_half_interval_of_measurements": statistics.median(
            (m.ratio_high - m.ratio_low) / (2 * m.ratio) for _, _, m in rows
        ),
        "prediction_ms": predict_ms,
        "networks": [
            {"policy": policy.hash, "predicted": p.ratio, "low": p.low, "high": p.high, "measured": m.ratio,
             "measured_low": m.ratio_low, "measured_high": m.ratio_high, "noisy": m.noisy}
            for policy, p, m in rows
        ],
    }  # fmt: skip
    write_json(HERE / "results" / f"predictor-{arguments.model}-{arguments.engine}.json", result)
    print(json.dumps({k: result[k] for k in ("model", "engine", "table", "held_out", "prediction_ms")}, indent=1))


def compare(profiler: Profiler, count: int, limit: float, seed: int) -> list:
    """Predict and then measure `count` random networks, all different and none in the table."""
    rng = random.Random(f"held out {seed}")
    seen = set(profiler.known)
    rows = []
    started = time.monotonic()
    while len(rows) < count and time.monotonic() - started < limit:
        policy = profiler.space.policy(random_choices(profiler.space, rng))
        if policy in seen:
            continue
        seen.add(policy)
        prediction = profiler.predictor.predict(policy)
        measured = profiler.measure(policy, _CAREFUL)
        if measured is not None:
            rows.append((policy, prediction, measured))
    return rows


def time_predictions(profiler: Profiler, seed: int, count: int = 200) -> dict[str, float]:
    """Return the median and the 95th percentile of the milliseconds that one prediction of a new network takes."""
    rng = random.Random(f"timing {seed}")
    policies = [profiler.space.policy(random_choices(profiler.space, rng)) for _ in range(count)]
    took = []
    for policy in policies:
        begun = time.perf_counter()
        profiler.predictor.predict(policy)
        took.append(1e3 * (time.perf_counter() - begun))
    took.sort()
    return {"median": took[count // 2], "p95": took[int(0.95 * count)]}


if __name__ == "__main__":
    main()
