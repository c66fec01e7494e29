"""Run directories as the search leaves them: finished, interrupted, empty, and with nothing but failures."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autocompress.config import RunConfig
from autocompress.files import write_json
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.runs.directory import RunDirectory
from autocompress.runs.records import Measurement, TrialRecord

BASE_MS, BASE_ACCURACY, BASE_BYTES, BASE_MACS = 0.468, 0.9162, 1_120_000, 40_810_000
LAYERS = [f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in range(3) for c in (1, 2)]


def measurement(latency_ms: float, ratio: float, spread: float = 0.012) -> Measurement:
    return Measurement(
        latency_ms, latency_ms * 1.05, latency_ms * 1.09, latency_ms * 1.3, latency_ms * 0.01, 4000,
        latency_ms * 0.995, latency_ms * 1.005, ratio, ratio * (1 - spread), ratio * (1 + spread),
        latency_ms / ratio, False, 1, 1,
    )  # fmt: skip


def baseline_record() -> TrialRecord:
    return TrialRecord(
        0, CompressionPolicy("bf16"), "complete", "baseline", BASE_ACCURACY, measurement(BASE_MS, 1.0), BASE_BYTES,
        BASE_MACS, 272_474, {}, None, "baseline",
    )  # fmt: skip


def random_record(number: int, rng: random.Random) -> TrialRecord:
    if rng.random() < 0.06:
        error = "BuildError: the runtime said <Unsupported & 'quoted'> [bold]node[/bold]"
        return TrialRecord(number, CompressionPolicy("bf16"), "failed", error=error, seconds={"apply": 0.2})
    hardness = rng.random()
    pruning = {n: rng.choice((0.125, 0.25, 0.375, 0.5)) for n in LAYERS[::2] if rng.random() < hardness}
    layers = {n: LayerPolicy("int8") for n in LAYERS if rng.random() < hardness}
    for name in LAYERS[1::2]:
        if rng.random() < hardness / 4:
            layers[name] = LayerPolicy("dense", rng.choice((0.25, 0.5)))
    blocks = ("layer2.1",) if rng.random() < hardness / 3 else ()
    policy = CompressionPolicy("bf16", pruning, layers, blocks)
    left = 1 - sum(pruning.values()) / 14
    ratio = max(0.3, left * (1 - 0.018 * len(policy.int8_layers)) - 0.06 * len(blocks)) * rng.uniform(0.97, 1.04)
    stage = "recovered" if rng.random() < 0.16 else "proxy"
    loss = (1 - left) ** 1.6 * 0.5 + 0.05 * len(blocks) + rng.random() * 0.01
    accuracy = BASE_ACCURACY - (loss * 0.12 if stage == "recovered" else loss)
    return TrialRecord(
        number, policy, "complete", stage, accuracy, measurement(BASE_MS * ratio, ratio), int(BASE_BYTES * left * 0.55),
        int(BASE_MACS * left**1.5), int(272_474 * left), {"proxy": 1.1, "build": 2.2, "measure": 2.5, "apply": 0.3},
        None, f"artifacts/trial-{number:05d}" + ("/recovered" if stage == "recovered" else ""),
    )  # fmt: skip


def fill(run: RunDirectory, count: int = 90, *, finished: bool = True) -> RunDirectory:
    """Write a run of `count` random candidates; without `finished`, as an interrupted one leaves it."""
    rng = random.Random(7)
    run.path.mkdir(parents=True, exist_ok=True)
    run.write_config(RunConfig(target_latency="0.62x", max_drop="1pp", max_size="0.6x", n_trials=count, timeout="25m"))
    run.write(
        "env.json",
        {
            "python": "3.11.9",
            "packages": {"openvino": "2026.4.1", "torch": "2.9.1"},
            "os": "Linux-6.1-x86_64",
            "cpu": {"model": "Intel Xeon Platinum 8370C", "logical": 2, "features": ["avx512_vnni", "amx_bf16"]},
            "memory_bytes": 16_777_216_000,
            "gpus": [{"name": "NVIDIA L4", "driver": "580.1"}],
        },
    )
    write_json(run.baseline / "record.json", baseline_record().to_dict())
    records = [random_record(n, rng) for n in range(1, count + 1)]
    for record in records:
        run.append(record)
    measured = [r for r in records if r.measurement is not None and r.accuracy is not None]
    limit = 0.62 * BASE_MS
    best = max(
        (r for r in measured if r.measurement and r.measurement.latency_ms <= limit and r.stage == "recovered"),
        key=lambda r: r.accuracy or 0,
    )
    write_json(run.best / "record.json", best.to_dict())
    if finished:
        assert best.measurement and best.accuracy and best.size_bytes and best.macs
        front = [r for r in measured if not any(_beats(o, r) for o in measured)]
        run.write(
            "pareto.json",
            {
                "axes": ["latency_ms", "accuracy"],
                "front": [r.number for r in front],
                "records": [r.to_dict() for r in front],
            },
        )
        run.write("summary.json", summary(run, best, len(records), len(records) - len(measured)))
    return run


def _beats(a: TrialRecord, b: TrialRecord) -> bool:
    assert a.measurement and b.measurement and a.accuracy and b.accuracy
    better = (a.measurement.latency_ms <= b.measurement.latency_ms, a.accuracy >= b.accuracy)
    return (
        a is not b and all(better) and (a.measurement.latency_ms, a.accuracy) != (b.measurement.latency_ms, b.accuracy)
    )


def summary(run: RunDirectory, best: TrialRecord, trials: int, failed: int) -> dict[str, Any]:
    assert best.measurement and best.accuracy and best.size_bytes and best.macs
    return {
        "schema_version": 1, "run_dir": str(run.path), "engine": "openvino", "device": "Intel Xeon Platinum 8370C",
        "threads": 1, "batch_size": 1, "task": "cifar10", "model": "resnet20",
        "baseline": {
            "accuracy": 0.9149, "latency_ms": BASE_MS, "size_bytes": BASE_BYTES, "dtype": "bf16", "macs": BASE_MACS,
            "params": 272_474, "validation_accuracy": BASE_ACCURACY,
        },
        "best": {
            "trial": best.number, "accuracy": 0.9112, "accuracy_drop_pp": 0.37,
            "latency_ms": best.measurement.latency_ms, "latency_ratio": best.measurement.ratio,
            "size_bytes": best.size_bytes, "macs_ratio": best.macs / BASE_MACS, "feasible": True, "verified": True,
            "path": str(run.best / "model.xml"), "stage": best.stage, "validation_accuracy": best.accuracy,
        },
        "n_trials": trials, "n_failed": failed,
        "seconds": {
            "total": 1450.0, "profile": 140.0, "proxy": 95.0, "build": 190.0, "measure": 260.0, "recovery": 720.0,
            "overhead": 45.0,
        },
        "constraints": {"latency_ms": 0.62 * BASE_MS, "max_drop": 0.01, "size_bytes": 0.6 * BASE_BYTES},
    }  # fmt: skip


@pytest.fixture
def finished(tmp_path: Path) -> RunDirectory:
    return fill(RunDirectory(tmp_path / "run"))


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunDirectory]:
    return lambda **options: fill(RunDirectory(tmp_path / "run"), **options)


@pytest.fixture
def make_measurement() -> Callable[..., Measurement]:
    return measurement
