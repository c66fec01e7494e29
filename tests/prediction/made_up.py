"""A network and a machine to run it on, both made up: what every layer costs is known, as no real machine's is."""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass

import numpy as np

from autocompress.evaluation.profiler import random_choices
from autocompress.graph.layout import Layout, Unit
from autocompress.graph.tensor_dtypes import OUTPUT, TensorDtypes
from autocompress.model.inventory import Block, ChannelGroup, Inventory, Layer
from autocompress.policy import CompressionPolicy
from autocompress.prediction.layer_times import LayerTime
from autocompress.prediction.predictor import LatencyPredictor, Observation
from autocompress.space.search_space import SearchSpace, SpaceFile

WIDTHS = (32, 32, 64, 64, 64, 96, 96)


def make_layout() -> Layout:
    """Return a chain of convolutions with a block to remove and a head."""
    layers: dict[str, Layer] = {}
    groups: dict[str, ChannelGroup] = {}
    before = 3
    for index, width in enumerate(WIDTHS):
        name, kernel = f"c{index}", (1, 1) if index == 4 else (3, 3)
        area, positions = kernel[0] * kernel[1], 256 if width < 64 else 64
        macs = positions * before * width * area
        kind = "pointwise" if area == 1 else "conv"
        layers[name] = Layer(name, kind, before, width, kernel, macs, before * width * area, True, True)
        consumer = f"c{index + 1}" if index + 1 < len(WIDTHS) else "fc"
        groups[name] = ChannelGroup(name, width, (name,), (consumer,), {consumer: 1})
        before = width
    layers["fc"] = Layer("fc", "linear", before, 10, (), 10 * before, 10 * before + 10, True, True)
    names = list(layers)
    reads = {name: (before,) for name, before in zip([*names, OUTPUT], ["", *names], strict=True)}
    wiring = TensorDtypes(reads, {"b": ("c3", "c2", frozenset({"c3"}))}, frozenset(names))
    blocks = {"b": Block("b", ("c3",))}
    macs = sum(layer.macs for layer in layers.values())
    return Layout(Inventory(layers, groups, blocks, {}, macs, 1), wiring)


LAYOUT = make_layout()
SPACE = SearchSpace(
    SpaceFile.model_validate(
        {
            "pruning": {"ratios": [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75]},
            "rank": {"ratios": [1.0, 0.5, 0.25]},
            "dtype": {"choices": ["dense", "int8"]},
            "blocks": {"remove": True},
        }
    ),
    LAYOUT.inventory,
    "bf16",
    int8=True,
)


def unit_cost(unit: Unit, *, uneven: bool = False) -> float:
    """Return what a layer costs in ms: stairs of 16 channels, kernels started, conversions to and from int8.

    When `uneven`, the machine is up to four times as fast at some layers as at others, for no reason that shows.
    """
    cost = 0.0
    for ins, outs, area, scale in unit.chain:
        work = scale * unit.positions * math.ceil(ins / 16) * math.ceil(outs / 16) * 256 * area
        cost += 0.004 + work * (1.2e-9 if unit.int8 else 3e-9) + 1.5e-7 * unit.positions * outs
    if unit.int8:
        cost += 4e-7 * unit.positions * unit.in_channels * (1 - unit.context.siblings_int8)
    return cost * (0.5 + zlib.crc32(unit.layer.encode()) % 1000 / 666) if uneven else cost


def latency_ms(policy: CompressionPolicy, *, uneven: bool = False) -> float:
    return 0.02 + sum(unit_cost(unit, uneven=uneven) for unit in LAYOUT.units(policy))


BASE_MS = latency_ms(CompressionPolicy("bf16"))


@dataclass(frozen=True)
class Measured:
    """Networks drawn at random, measured with an error."""

    observations: list[Observation]
    layers: list[list[LayerTime]]


def measure(count: int, seed: int, noise: float = 0.005, *, uneven: bool = False) -> Measured:
    """Measure `count` different networks; the layers' times are in whole microseconds, as profilers tell them."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    policies: dict[CompressionPolicy, None] = {}
    while len(policies) < count:
        policies[SPACE.policy(random_choices(SPACE, rng))] = None
    observations, layers = [], []
    base_ms = latency_ms(CompressionPolicy("bf16"), uneven=uneven)
    for policy in policies:
        ratio = latency_ms(policy, uneven=uneven) / base_ms * (1 + noise * numbers.standard_normal())
        observations.append(Observation(policy, float(ratio), noise * ratio / 2))
        times = [(unit, round(unit_cost(unit, uneven=uneven), 3)) for unit in LAYOUT.units(policy)]
        layers.append([LayerTime(unit, time / base_ms, time, policy.hash) for unit, time in times if time > 0])
    return Measured(observations, layers)


def predictor(known: Measured) -> LatencyPredictor:
    """Return a predictor that learned networks and the times of their layers."""
    made = LatencyPredictor(LAYOUT)
    made.observe(known.observations)
    made.observe_layers([time for network in known.layers for time in network])
    return made
