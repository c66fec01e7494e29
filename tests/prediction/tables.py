"""Made-up tables: a device whose convolutions cost whole blocks of 16 output channels, and networks of such layers."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.prediction.table import LatencyTable
from autocompress.prediction.table_rows import LayerRow, NetworkRow

DEVICE: dict[str, Any] = {
    "cpu": "Intel(R) Xeon(R) Gold 6338N CPU @ 2.20GHz", "vendor": "GenuineIntel", "family": "6", "model": "106",
    "stepping": "6", "cores": 8, "features": ["avx2", "avx512f", "avx512_vnni"], "machine": "x86_64",
    "system": "Linux", "governor": None, "gpu": None, "hash": "0123456789abcdef",
    "slug": "intel-xeon-gold-6338n-8c-012345",
}  # fmt: skip
# Name, op, kernel, positions, channels in and out.
RESNET = [
    ("conv1", "conv", "3x3", 1024, 3, 16),
    *[(f"layer{s}.{b}.conv{c}", "conv", "3x3", 1024 >> 2 * s, 16 << s, 16 << s) for s in range(3) for b in range(3)
      for c in (1, 2)],
    ("fc", "linear", "", 1, 64, 10),
]  # fmt: skip
MOBILE = [
    part
    for s, width in enumerate((24, 32, 64, 96, 160))
    for part in (
        (f"features.{s}.expand", "pointwise", "1x1", 3136 >> 2 * s or 1, width, 6 * width),
        (f"features.{s}.depthwise", "depthwise", "3x3", 3136 >> 2 * s or 1, 6 * width, 6 * width),
        (f"features.{s}.project", "pointwise", "1x1", 3136 >> 2 * s or 1, 6 * width, width),
    )
]
NETWORKS = {"aaaa000000000001": ("cifar10 resnet20", RESNET), "bbbb000000000002": ("imagenet mobilenet_v2", MOBILE)}


def network_row(**changes: Any) -> NetworkRow:
    values: dict[str, Any] = {
        "network": "aaaa000000000001", "name": "cifar10 resnet20",
        "policy": CompressionPolicy("bf16", {"conv1": 0.25}, {"fc": LayerPolicy("int8", 0.5)}, ("layer1.0",)),
        "ratio": 0.61234567891, "ratio_low": 0.6, "ratio_high": 0.62, "latency_ms": 0.3, "baseline_ms": 0.49,
        "mad_ms": 0.004, "n": 812, "noisy": False, "macs": 21_000_000, "held_out": False, "status": "ok", "error": "",
    }  # fmt: skip
    return NetworkRow(**{**values, **changes})


def layer_row(**changes: Any) -> LayerRow:
    values: dict[str, Any] = {
        "network": "aaaa000000000001", "name": "cifar10 resnet20", "layer": "layer1.0.conv1", "op": "conv",
        "in_channels": 16, "out_channels": 24, "kernel": "3x3", "positions": 256, "ranks": (8, 12), "dtype": "int8",
        "inputs_int8": 1.0, "outputs_int8": 0.5, "macs": 884_736, "time_ms": 0.0123, "baseline_ms": 0.02,
        "spread_ms": 0.0004, "n": 2000, "policy": "0123456789abcdef", "dense_dtype": "bf16",
    }  # fmt: skip
    return LayerRow(**{**values, **changes})


def table(*rows: NetworkRow | LayerRow, path: Path | None = None, **changes: Any) -> LatencyTable:
    made = LatencyTable(**{"device": DEVICE, "engine": "openvino", "engine_version": "2026.4.1-22982", **changes})
    if path is not None:
        made.save(path)
    made.append(*rows)
    return made


def profiled(policies: int = 60, seed: int = 0) -> LatencyTable:
    """Return what profiling `NETWORKS` could give, a few unsupported and noisy rows included."""
    rng = random.Random(seed)
    made = table()
    for network, (name, layers) in NETWORKS.items():
        dense_ms = sum(_time_ms(op, kernel, at, (ins, outs), "bf16") for _, op, kernel, at, ins, outs in layers) + 0.05
        for number in range(policies):
            made.append(*_measured(rng, network, name, layers, dense_ms, held_out=number % 4 == 0))
        broken = CompressionPolicy("bf16", layers={layers[1][0]: LayerPolicy(rank_ratio=0.25)})
        made.append(NetworkRow.unsupported(network, name, broken, "could not create <a primitive>", 10**7))
    return made


def _measured(
    rng: random.Random, network: str, name: str, layers: list[Any], dense_ms: float, *, held_out: bool
) -> list[NetworkRow | LayerRow]:
    rows: list[NetworkRow | LayerRow] = []
    total = 0.05
    amount = rng.random()
    for layer, op, kernel, positions, ins, outs in layers:
        kept = max(8, round(outs * (1 - 0.7 * amount * rng.random()) / 4) * 4) if outs > 10 else outs
        into = max(8, round(ins * (1 - 0.7 * amount * rng.random()) / 8) * 8) if ins > 3 and rng.random() < 0.6 else ins
        into = kept if op == "depthwise" else into
        dtype = rng.choice(("bf16", "int8"))
        ranks = (max(1, into // 2), max(1, kept // 2)) if op == "conv" and rng.random() < 0.15 else ()
        time_ms = _time_ms(op, kernel, positions, (into, kept), dtype) * rng.gauss(1, 0.02) * (0.7 if ranks else 1)
        total += time_ms
        rows.append(
            layer_row(
                network=network, name=name, layer=layer, op=op, in_channels=into, out_channels=kept, kernel=kernel,
                positions=positions, ranks=ranks, dtype=dtype, inputs_int8=1.0, outputs_int8=0.0, time_ms=time_ms,
                baseline_ms=time_ms * 1.3, macs=positions * into * kept,
            )
        )  # fmt: skip
    ratio = total / dense_ms
    policy = CompressionPolicy("bf16", {layers[0][0]: round(0.9 * amount, 3)}, {layers[1][0]: LayerPolicy("int8")})
    rows.append(
        network_row(
            network=network, name=name, policy=policy, ratio=ratio, ratio_low=ratio * 0.985, ratio_high=ratio * 1.015,
            latency_ms=total, baseline_ms=dense_ms * rng.gauss(1, 0.01), held_out=held_out, noisy=rng.random() < 0.05,
        )
    )  # fmt: skip
    return rows


def _time_ms(op: str, kernel: str, positions: int, channels: tuple[int, int], dtype: str) -> float:
    ins, outs = channels
    area = 9 if kernel == "3x3" else 1
    blocks = math.ceil(outs / 16) * 16
    work = positions * area * blocks * (1 if op == "depthwise" else math.ceil(ins / 4) * 4)
    speed = {"bf16": 1.5e8, "int8": 3.2e8}[dtype] * (0.05 if op == "depthwise" else 1)
    return 0.0015 + work / speed
