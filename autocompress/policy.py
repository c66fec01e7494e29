"""`CompressionPolicy`: what is done to every part of a model. The currency of the house.

Frozen, versioned, JSON-round-tripping, with a canonical hash that keys every cache. It names groups, layers and
blocks; it knows nothing of tensors, engines or search.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from typing_extensions import TypedDict

from autocompress.documents import reading, validated
from autocompress.errors import ConfigError, nearest

POLICY_VERSION = 1
DENSE_DTYPES = ("fp32", "bf16", "fp16")
LAYER_DTYPES = ("dense", "int8")
SPARSITIES = ("none", "2:4")
FACTORIZATIONS = ("tucker2", "spatial_svd", "cp")


@dataclass(frozen=True)
class LayerPolicy:
    """What is done to one layer's weights and arithmetic.

    Attributes:
        dtype: ``"dense"`` (the policy's `dense_dtype`) or ``"int8"`` (weights per output channel, symmetric;
            activations per tensor).
        rank_ratio: Fraction of the full rank that is kept, in (0, 1]. 1 leaves the layer unfactorized.
        sparsity: ``"none"``, or ``"2:4"``: of every four weights along the input channels two are zero.
        factorization: What k x k convolutions become where `rank_ratio` is below 1: ``"tucker2"``, ``"spatial_svd"`` or
            ``"cp"``. Linear and 1x1 layers are matrices, of which all of these are the truncated SVD.
    """

    dtype: str = "dense"
    rank_ratio: float = 1.0
    sparsity: str = "none"
    factorization: str = "tucker2"

    def __post_init__(self) -> None:
        if self.dtype not in LAYER_DTYPES:
            raise ConfigError(f"Unknown layer dtype {self.dtype!r}.{nearest(self.dtype, LAYER_DTYPES)}")
        if self.sparsity not in SPARSITIES:
            raise ConfigError(f"Unknown sparsity {self.sparsity!r}.{nearest(self.sparsity, SPARSITIES)}")
        if self.factorization not in FACTORIZATIONS:
            raise ConfigError(
                f"Unknown factorization {self.factorization!r}.{nearest(self.factorization, FACTORIZATIONS)}"
            )
        if not 0 < self.rank_ratio <= 1:
            raise ConfigError(f"rank_ratio is {self.rank_ratio}; it is the fraction of the rank kept, in (0, 1].")
        # 1 and 1.0 are equal and must hash equal, though JSON writes them differently.
        object.__setattr__(self, "rank_ratio", float(self.rank_ratio))
        if self.rank_ratio == 1:
            # A layer that is not factorized is so in no way.
            object.__setattr__(self, "factorization", LayerPolicy.factorization)

    @property
    def is_identity(self) -> bool:
        """Whether the layer is left as it is."""
        return self == _UNTOUCHED

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        # Omit defaults, so that older policies keep their hash.
        said = {"sparsity": self.sparsity, "factorization": self.factorization}
        own = {key: value for key, value in said.items() if value != getattr(LayerPolicy, key)}
        return {"dtype": self.dtype, "rank_ratio": self.rank_ratio, **own}


_UNTOUCHED = LayerPolicy()


class _Document(TypedDict, total=False):
    """The JSON form of a policy."""

    version: int
    dense_dtype: str
    pruning: dict[str, float]
    layers: dict[str, LayerPolicy]
    removed_blocks: list[str]


@dataclass(frozen=True)
class CompressionPolicy:
    """What is done to a model; the empty policy leaves it untouched.

    Attributes:
        dense_dtype: What every layer that is not int8 runs in: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        pruning: Group name to `pruning_ratio`, the fraction of its coupled channels REMOVED, in [0, 1).
        layers: Layer name to `LayerPolicy`.
        removed_blocks: Names of residual blocks replaced by their identity shortcut.

    Entries that do nothing are dropped on construction, so equal policies compare and hash equal.
    """

    dense_dtype: str = "fp32"
    pruning: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, LayerPolicy] = field(default_factory=dict)
    removed_blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dense_dtype not in DENSE_DTYPES:
            raise ConfigError(f"Unknown dense_dtype {self.dense_dtype!r}.{nearest(self.dense_dtype, DENSE_DTYPES)}")
        for name, ratio in self.pruning.items():
            if not 0 <= ratio < 1:
                raise ConfigError(
                    f"pruning_ratio of group {name!r} is {ratio}; it is the fraction of channels removed, in [0, 1)."
                )
        pruning = {name: float(r) for name, r in sorted(self.pruning.items()) if r > 0}
        layers = {name: p for name, p in sorted(self.layers.items()) if not p.is_identity}
        object.__setattr__(self, "pruning", MappingProxyType(pruning))
        object.__setattr__(self, "layers", MappingProxyType(layers))
        object.__setattr__(self, "removed_blocks", tuple(sorted(set(self.removed_blocks))))

    def __hash__(self) -> int:
        return hash(self.hash)

    def __reduce__(self) -> tuple[Any, ...]:
        # A read-only mapping can be neither copied nor sent to another process as it is.
        return type(self).from_dict, (self.to_dict(),)

    def layer(self, name: str) -> LayerPolicy:
        """Return the policy of one layer; the identity when nothing is said of it."""
        return self.layers.get(name, _UNTOUCHED)

    @property
    def is_structural_identity(self) -> bool:
        """Whether the network keeps its layers and shapes (dtypes may still differ)."""
        return not (self.pruning or self.removed_blocks or any(p.rank_ratio < 1 for p in self.layers.values()))

    @property
    def int8_layers(self) -> tuple[str, ...]:
        """Names of the layers that run in int8."""
        return tuple(name for name, p in self.layers.items() if p.dtype == "int8")

    @property
    def sparse_layers(self) -> tuple[str, ...]:
        """Names of the layers whose weights are 2:4 sparse."""
        return tuple(name for name, p in self.layers.items() if p.sparsity == "2:4")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; `from_dict` reads it back."""
        return {
            "version": POLICY_VERSION,
            "dense_dtype": self.dense_dtype,
            "pruning": dict(self.pruning),
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
            "removed_blocks": list(self.removed_blocks),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompressionPolicy:
        """Read the JSON form.

        Raises:
            ConfigError: Unknown version or keys, or a value out of range.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"A policy is a mapping of keys, found {type(data).__name__}.")
        version = data.get("version")
        if version != POLICY_VERSION:
            raise ConfigError(f"Policy version {version!r} cannot be read; this release reads {POLICY_VERSION}.")
        known = {"version", "dense_dtype", "pruning", "layers", "removed_blocks"}
        for key in data:
            if key not in known:
                raise ConfigError(f"Unknown key {key!r} in a policy.{nearest(str(key), known)}")
        if isinstance(data.get("removed_blocks"), str):
            raise ConfigError(f"removed_blocks of a policy is {data['removed_blocks']!r}; it is a list of names.")
        # Before pydantic, which would ignore it.
        for name, layer in (data["layers"] if isinstance(data.get("layers"), Mapping) else {}).items():
            for key in layer if isinstance(layer, Mapping) else ():
                if key not in LayerPolicy.__dataclass_fields__:
                    raise ConfigError(f"A policy cannot be read: layer {name!r} has the unknown key {key!r}.")
        with reading("A policy"):
            found = validated(_Document, dict(data), "A policy")
            return cls(
                dense_dtype=found.get("dense_dtype", "fp32"),
                pruning=found.get("pruning", {}),
                layers=found.get("layers", {}),
                removed_blocks=tuple(found.get("removed_blocks", ())),
            )

    @property
    def hash(self) -> str:
        """Return the canonical hash: 16 hex digits, the same in every process and release of this version."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def describe(self) -> str:
        """Return one line for a table: how much is pruned, factorized, removed and quantized."""
        parts = []
        if self.removed_blocks:
            parts.append(f"-{len(self.removed_blocks)} blocks")
        if self.pruning:
            ratios = list(self.pruning.values())
            parts.append(f"prune {len(ratios)}g ~{sum(ratios) / len(ratios):.0%}")
        ranks = [p.rank_ratio for p in self.layers.values() if p.rank_ratio < 1]
        if ranks:
            parts.append(f"rank {len(ranks)}l ~{sum(ranks) / len(ranks):.0%}")
        if self.int8_layers:
            parts.append(f"int8 {len(self.int8_layers)}l")
        if self.sparse_layers:
            parts.append(f"2:4 {len(self.sparse_layers)}l")
        return f"{self.dense_dtype}" + (", " + ", ".join(parts) if parts else "")
