"""Made-up compression problems with a known truth: quality and latency of every choice of every parameter.

The sampler is told an approximation (`costs`, `prior`); the truth holds what it is not told: interactions, saturation,
noise, and costs that are off by a tenth. No network is trained, so hundreds of trials take seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from autocompress.exploration.knapsack.choice_graph import Graph
from autocompress.exploration.knapsack.problem import Choice, Costs, Pair, Switch
from autocompress.space.parameter import Parameter

FLOOR, TOP = 0.1, 0.93
# What a choice leaves of a layer's time.
_FACTOR: dict[Choice, float] = {"dense": 1.0, "int8": 0.55, 1.0: 1.0, 0.5: 0.8, 0.25: 0.55, 0.125: 0.4}


@dataclass
class MadeUp:
    """One problem.

    Attributes:
        costs: What a sampler may know of latency.
        prior: What it may know of the losses, or None.
        noise: Standard deviation of a measured quality.
    """

    costs: Costs
    prior: dict[str, dict[Choice, float]] | None
    noise: float
    rank_correlation: float

    def __init__(
        self, seed: int, *, layers: int = 10, choices: int = 6, prior: str = "rough", kind: str = "network",
        noise: float = 0.003, steep: float = 1.6, clashes: float = 0.3,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        self.noise, self._steep, self.kind = noise, steep, kind
        self._work = rng.lognormal(0, 0.7, layers)
        self._work /= self._work.sum()
        ratios = [round(float(r), 4) for r in np.linspace(0, 0.875, choices)]
        losses: dict[str, dict[Choice, float]] = {}
        depth = rng.lognormal(0, 0.9, layers)
        for i in range(layers):
            bend = rng.uniform(1.3, 3.0)
            losses[f"prune/{i}"] = {r: float(depth[i] * 2.5 * r**bend) for r in ratios}
            if kind == "network":
                losses[f"dtype/{i}"] = {"dense": 0.0, "int8": float(depth[i] * rng.lognormal(-2.0, 1.0))}
                if i % 2:
                    ranks = (1.0, 0.5, 0.25, 0.125)
                    losses[f"rank/{i}"] = {r: float(rng.lognormal(0, 0.8) * 1.2 * (1 - r) ** 2) for r in ranks}
        if kind == "network":
            for b in range(layers // 4):
                losses[f"block/{b}"] = {"keep": 0.0, "remove": float(rng.lognormal(0.6, 0.6))}
        # Uniform half-way compression ruins the network about half.
        half = sum(np.median(list(v.values())) for v in losses.values())
        self.losses = {n: {c: v / half for c, v in row.items()} for n, row in losses.items()}
        names = list(losses)
        self._clashes = [
            (*rng.choice(names, 2, replace=False), float(rng.normal(0, clashes) / np.sqrt(layers)))
            for _ in range(layers)
        ]
        self._worst = {n: max(row.values()) for n, row in self.losses.items()}
        # What the true costs are off by: one factor per choice.
        self._off = {n: {c: float(rng.lognormal(0, 0.1)) for c in row} for n, row in losses.items()}
        self._rng = np.random.default_rng(seed + 1000)
        self.costs = self._told()
        self.prior, self.rank_correlation = self._guess(rng, prior)
        self.graph = Graph(self.costs)
        self.reference = {n: next(iter(row)) for n, row in self.losses.items()}
        self.reference_ms = self.latency(self.reference)

    def _told(self) -> Costs:
        """Return additive costs with pair terms; of a network's products of four factors only an approximation."""
        ms: dict[str, dict[Choice, float]] = {}
        pairs = []
        for name, row in self.losses.items():
            kind, target = Parameter.of(name)
            first = kind == "prune" and target == "0"
            ms[name] = {c: float(self._work[0] * (1 - float(c or 0))) if first else 0.0 for c in row}
        for i in range(len(self._work)):
            work, keep = self._work[i], 1 - np.array(list(self.losses[f"prune/{i}"]), float)
            if i:
                pairs.append(Pair(f"prune/{i - 1}", f"prune/{i}", work * np.outer(keep, keep)))
            if self.kind == "network":
                for name in (f"dtype/{i}", f"rank/{i}"):
                    if name in self.losses:
                        saved = np.array([1 - _FACTOR[c] for c in self.losses[name]])
                        pairs.append(Pair(f"prune/{i}", name, -0.5 * work * np.outer(keep, saved)))
                if i:
                    convert = 0.03 * float(np.median(self._work)) * np.array([[0, 1], [1, 0]])
                    pairs.append(Pair(f"dtype/{i - 1}", f"dtype/{i}", convert))
        free = [
            Switch(
                f"block/{b}", "remove", tuple(n for n in self.losses if n.endswith(f"/{4 * b + 2}") and n[0] in "pdr")
            )
            for b in range(len(self._work) // 4)
            if self.kind == "network"
        ]
        return Costs(ms, pairs, free=free, fixed_ms=0.05)

    def _guess(self, rng: np.random.Generator, prior: str) -> tuple[dict[str, dict[Choice, float]] | None, float]:
        if prior == "flat":
            return None, 0.0
        truth = [v for row in self.losses.values() for v in list(row.values())[1:]]
        off = {n: rng.standard_normal() for n in self.losses}
        own = {n: {c: rng.standard_normal() for c in row} for n, row in self.losses.items()}
        # Ever worse, until the ranks agree no better than is asked for.
        for error in np.arange(0.3, 12, 0.1):
            found: dict[str, dict[Choice, float]] = {
                n: {c: v and float(v * np.exp(error * (off[n] + 0.5 * own[n][c]))) for c, v in row.items()}
                for n, row in self.losses.items()
            }
            guess = [v for row in found.values() for v in list(row.values())[1:]]
            agreement = float(spearmanr(truth, guess)[0])
            if agreement <= {"good": 0.95, "rough": 0.5}[prior]:
                break
        return found, agreement

    def _active(self, choices: dict[str, Choice]) -> set[str]:
        gone = {n for f in self.costs.free if choices[f.parameter] == f.choice for n in f.parameters}
        return set(choices) - gone

    def quality(self, choices: dict[str, Choice]) -> float:
        """Return the true quality, without noise."""
        active = self._active(choices)
        total = sum(self.losses[n][choices[n]] for n in active)
        for a, b, size in self._clashes:
            if a in active and b in active:
                both = self.losses[a][choices[a]] / self._worst[a] * self.losses[b][choices[b]] / self._worst[b]
                total += size * both
        total = max(total, 0.0)
        return FLOOR + (TOP - FLOOR) / (1 + total**self._steep)

    def latency(self, choices: dict[str, Choice]) -> float:
        """Return the true latency, without noise, in ms: every layer's work times what its four choices leave of it."""
        active = self._active(choices)
        total, before = self.costs.fixed_ms, 1.0
        for i, work in enumerate(self._work):
            name = f"prune/{i}"
            if name not in active:
                continue
            factor = before * (1 - float(choices[name] or 0)) * self._off[name][choices[name]]
            for other in (f"dtype/{i}", f"rank/{i}"):
                if other in active:
                    factor *= _FACTOR[choices[other]] * self._off[other][choices[other]]
            total += float(work) * factor
            before = 1 - float(choices[name] or 0)
            if i and {f"dtype/{i}", f"dtype/{i - 1}"} <= active:
                differ = choices[f"dtype/{i}"] != choices[f"dtype/{i - 1}"]
                total += 0.03 * float(np.median(self._work)) * differ
        return total

    def measure(self, choices: dict[str, Choice]) -> tuple[float, float]:
        """Return quality and latency as an experiment would: with noise."""
        return (
            self.quality(choices) + self._rng.normal(0, self.noise),
            self.latency(choices) * float(self._rng.lognormal(0, 0.01)),
        )


def hypervolume(points: list[tuple[float, float]], reference_ms: float) -> float:
    """Return the share of the box [floor, top] x [0, reference] that (quality, ms) points dominate."""
    total, height = 0.0, FLOOR
    right = reference_ms
    best: list[tuple[float, float]] = []
    for quality, ms in sorted(points, key=lambda p: (p[1], -p[0])):
        if ms < right and quality > height:
            best.append((quality, ms))
            height = quality
    for i, (quality, ms) in enumerate(best):
        end = best[i + 1][1] if i + 1 < len(best) else right
        total += (quality - FLOOR) * (end - ms)
    return total / ((TOP - FLOOR) * reference_ms)
