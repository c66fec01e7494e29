"""What may be chosen: a YAML search space, bound to one model and engine, as named categorical parameters.

Parameters are ``block/<block>`` (keep, remove), ``prune/<group>`` (pruning_ratio), ``rank/<layer>`` (rank_ratio),
``dtype/<layer>`` (dense, int8) and ``sparsity/<layer>`` (none, 2:4); in a uniform space ``*`` stands for all of them.
Ratios are moved to the steps that hardware likes, and choices that then coincide, or cannot pay, are not offered. What
a latency table knows not to pay is left out by `allowed_choices`, which `staircase.drop_dominated_choices` finds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator
from torch import nn

from autocompress.compress.importance import DEFAULT_IMPORTANCE, IMPORTANCES, check_importance
from autocompress.compress.sparsity import LEAST_CHANNELS
from autocompress.config import RunConfig
from autocompress.documents import parse_yaml, read_bytes
from autocompress.errors import ConfigError, nearest
from autocompress.model.inventory import ChannelGroup, Inventory, Layer
from autocompress.policy import FACTORIZATIONS, SPARSITIES, CompressionPolicy, LayerPolicy
from autocompress.space import rank_choices
from autocompress.space.parameter import Parameter

Choice = str | float


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def covers(self, name: str) -> bool:
        """Whether a name matches `include` and not `exclude` (shell patterns)."""
        return any(fnmatchcase(name, p) for p in self.include) and not any(fnmatchcase(name, p) for p in self.exclude)


class PruningSpace(_Part):
    """Pruning ratios offered to every group; `heads`: to attention heads, too, of which any number may stay."""

    ratios: tuple[float, ...] = (0.0,)
    round_to: Literal["auto"] | PositiveInt = "auto"
    heads: bool = True

    @field_validator("ratios")
    @classmethod
    def _in_range(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or any(not 0 <= v < 1 for v in values):
            raise ValueError("pruning ratios are fractions of channels removed, in [0, 1)")
        return values


class DtypeSpace(_Part):
    """Dtypes offered to every layer."""

    choices: tuple[Literal["dense", "int8"], ...] = Field(default=("dense",), min_length=1)


class SparsitySpace(_Part):
    """Sparsity of weights offered to every layer, where the engine's device skips the zeros."""

    choices: tuple[Literal["none", "2:4"], ...] = Field(default=("none",), min_length=1)


class RankSpace(_Part):
    """Rank ratios, and ranks by the energy they keep, offered to every layer that has a low-rank form."""

    ratios: tuple[float, ...] = (1.0,)
    energy: tuple[float, ...] = ()
    methods: tuple[str, ...] = Field(default=(rank_choices.DEFAULT,), min_length=1)

    @field_validator("ratios")
    @classmethod
    def _in_range(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or any(not 0 < v <= 1 for v in values):
            raise ValueError("rank ratios are fractions of the rank kept, in (0, 1]; no rank is above the full one")
        return values

    @field_validator("energy")
    @classmethod
    def _shares(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < v <= 1 for v in values):
            raise ValueError("energies are shares of the squared singular values kept, in (0, 1]")
        return values

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if value not in FACTORIZATIONS:
                raise ValueError(f"unknown factorization {value!r}.{nearest(value, FACTORIZATIONS)}")
        return values


class BlockSpace(_Part):
    """Whether residual blocks may be removed."""

    remove: bool = False


class SpaceFile(BaseModel):
    """A search space as written in YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    description: str = ""
    pruning: PruningSpace = PruningSpace()
    dtype: DtypeSpace = DtypeSpace()
    rank: RankSpace = RankSpace()
    sparsity: SparsitySpace = SparsitySpace()
    blocks: BlockSpace = BlockSpace()
    uniform: bool = False
    importance: str = DEFAULT_IMPORTANCE

    @field_validator("importance")
    @classmethod
    def _known_importance(cls, value: str) -> str:
        if value not in IMPORTANCES:
            raise ValueError(f"unknown importance {value!r}.{nearest(value, IMPORTANCES)}")
        return value

    @model_validator(mode="after")
    def _energies_are_of_layers(self) -> SpaceFile:
        if self.uniform and self.rank.energy:
            raise ValueError("rank.energy gives every layer its own ranks; a uniform space has one ratio for all")
        return self


_KEYS = ("include", "exclude", "ratios", "choices", "round_to", "heads", "remove", "energy", "methods")


def shipped_spaces() -> dict[str, Path]:
    """Return the spaces that come with the package, by name."""
    installed = Path(str(resources.files("autocompress"))) / "_search_spaces"
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "search_spaces"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def configured_space(config: RunConfig) -> SpaceFile:
    """Return the space of a run, with what the run file says instead of it.

    Raises:
        ConfigError: As `load_space`, or the run's importance is unknown.
    """
    file = load_space(config.space)
    if config.importance is None:
        return file
    return file.model_copy(update={"importance": check_importance(config.importance)})


def load_space(name: str) -> SpaceFile:
    """Read a shipped space by name, or a YAML file by path.

    Raises:
        ConfigError: Unknown name, missing file, unknown key or value out of range.
    """
    shipped = shipped_spaces()
    path = shipped.get(name, Path(name))
    if name not in shipped and path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"Unknown search space {name!r}.{nearest(name, shipped)} A path to a .yaml file works too.")
    if not path.exists():
        raise ConfigError(f"Search space {path} does not exist. Shipped: {', '.join(shipped)}.")
    data = parse_yaml(read_bytes(path), f"Search space {path}") or {}
    try:
        return SpaceFile.model_validate(data)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(p) for p in item["loc"])
            if item["type"] == "extra_forbidden":
                known = SpaceFile.model_fields if len(item["loc"]) == 1 else _KEYS
                lines.append(f"unknown key {key!r}.{nearest(key.rpartition('.')[2], known)}")
            else:
                lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')}")
        raise ConfigError(f"In search space {path}: {'; '.join(lines)}") from error


def channel_step(channels: int) -> int:
    """Return the multiple of channels offered for an axis of this length.

    Vector units work on 8 to 64 channels at once; a width in between costs as much as the next step, or more.
    """
    if channels < 64:
        return 8
    return 16 if channels < 256 else 32


def bind(
    file: SpaceFile, model: nn.Module, inventory: Inventory, dense_dtype: str, capabilities: Collection[str]
) -> SearchSpace:
    """Return a space bound to a model ``rewrite`` returned, its inventory, and what an engine can run.

    Raises:
        ConfigError: Nothing is left to choose.
    """
    found = rank_choices.ratios_by_energy(model, inventory, file.rank.energy, file.rank.methods)
    return SearchSpace(
        file, inventory, dense_dtype, int8="int8" in capabilities, sparse="2:4" in capabilities, energy_ratios=found
    )


class SearchSpace:
    """A space bound to a model and an engine.

    Args:
        file: What may be chosen.
        inventory: Of the model.
        dense_dtype: What layers that are not int8 run in.
        int8: Whether the engine computes in int8 on this device.
        sparse: Whether it skips the zeros of 2:4 sparse weights.
        energy_ratios: What `ranks.ratios_by_energy` finds for the energies of `file`.
        offered: Parameters of the model to the choices of theirs that are left, for those that are narrowed. Names and
            choices that the space does not have are passed over.

    Attributes:
        parameters: Parameter name to its choices, the one that does nothing first. A parameter whose only
            choice does nothing is left out.
        every: The same for every group, layer and block by name, in a uniform space too.
        skipped: What was asked for and is not offered, as ``"rank/conv1 (cp)"``, with the reason.

    Raises:
        ConfigError: Nothing is left to choose.
    """

    def __init__(
        self,
        file: SpaceFile,
        inventory: Inventory,
        dense_dtype: str,
        *,
        int8: bool,
        sparse: bool = False,
        energy_ratios: rank_choices.Found | None = None,
        allowed_choices: Mapping[str, Sequence[Choice]] | None = None,
    ) -> None:
        self.file = file
        self.dense_dtype = dense_dtype
        self._inventory, self._int8, self._sparse = inventory, int8, sparse
        self._energy_ratios = energy_ratios or {}
        self.skipped: dict[str, str] = {}
        every: dict[str, tuple[Choice, ...]] = {}
        for block in inventory.blocks:
            if file.blocks.remove and file.blocks.covers(block):
                every[f"block/{block}"] = ("keep", "remove")
        for name, group in inventory.groups.items():
            if file.pruning.covers(name) and (file.pruning.heads or not group.heads):
                every[f"prune/{name}"] = _ratios(file.pruning, group)
        for name, layer in inventory.layers.items():
            if file.rank.covers(name):
                every[f"rank/{name}"] = self._ranks(layer)
        for name, layer in inventory.layers.items():
            if int8 and layer.quantizable and file.dtype.covers(name):
                every[f"dtype/{name}"] = tuple(sorted(set(file.dtype.choices), key=("dense", "int8").index))
        for name, layer in inventory.layers.items():
            wide = layer.factorizable and layer.in_channels >= LEAST_CHANNELS
            if sparse and wide and file.sparsity.covers(name):
                every[f"sparsity/{name}"] = tuple(sorted(set(file.sparsity.choices), key=SPARSITIES.index))
        full = {name: choices for name, choices in every.items() if _matters(choices)}
        narrowed = {name: _kept(choices, (allowed_choices or {}).get(name, choices)) for name, choices in full.items()}
        self._dropped = {name: choices for name, choices in narrowed.items() if choices != full[name]}
        self.every = {name: choices for name, choices in narrowed.items() if _matters(choices)}
        self.parameters = self._uniform() if file.uniform else dict(self.every)
        if not self.parameters:
            raise ConfigError(
                "The search space leaves nothing to choose for this model on this engine: no group, layer or block "
                "matches, or the engine does not run int8. `autocompress inspect` lists what can be compressed."
            )

    def _ranks(self, layer: Layer) -> tuple[Choice, ...]:
        file, parameter = self.file.rank, f"rank/{layer.name}"
        if not layer.factorizable:
            self.skipped |= {f"{parameter} ({m})": f"a {layer.kind} layer has no low-rank form" for m in file.methods}
            return (1.0,)
        found = rank_choices.offered(layer, file.ratios, file.methods, self._energy_ratios.get(layer.name, {}))
        there = {read[0] for choice in found if (read := rank_choices.read(choice)) is not None}
        if layer.kind == "conv":
            reason = "no rank that was asked for cuts its multiply-accumulates"
            self.skipped |= {f"{parameter} ({m})": reason for m in file.methods if m not in there}
        return (1.0, *found) if 1 in file.ratios or not found else found

    def _uniform(self) -> dict[str, tuple[Choice, ...]]:
        kinds: dict[str, set[Choice]] = {}
        allowed_choices: Mapping[str, Sequence[Choice]] = {
            "prune": self.file.pruning.ratios,
            "rank": self._uniform_ranks(),
            "dtype": sorted(self.file.dtype.choices),
            "sparsity": sorted(self.file.sparsity.choices, reverse=True),
        }
        for name in self.every:
            kinds.setdefault(Parameter.of(name).kind, set())
        return {
            f"{kind}/*": tuple(allowed_choices[kind])
            for kind in kinds
            if kind in allowed_choices and len(allowed_choices[kind]) > 1
        }

    def _uniform_ranks(self) -> tuple[Choice, ...]:
        ratios = sorted(self.file.rank.ratios, reverse=True)
        left = [rank_choices.written(m, r) for m in self.file.rank.methods for r in ratios if r < 1]
        return (1.0, *left) if 1 in ratios else tuple(left)

    @property
    def hash(self) -> str:
        """Identity of the bound space, for `StudyMismatchError`."""
        # Without anything narrowed, as it was before spaces could be.
        parts = [self.dense_dtype, self.parameters, *([self._dropped] if self._dropped else [])]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def narrowed(self, allowed_choices: Mapping[str, Sequence[Choice]]) -> SearchSpace:
        """Return this space with only the choices of `allowed_choices` left for the parameters it names.

        Raises:
            ConfigError: Nothing is left to choose.
        """
        return SearchSpace(
            self.file, self._inventory, self.dense_dtype, int8=self._int8, sparse=self._sparse,
            energy_ratios=self._energy_ratios, allowed_choices=allowed_choices,
        )  # fmt: skip

    def policy(self, choices: Mapping[str, Choice]) -> CompressionPolicy:
        """Return the policy of one choice per parameter; parameters that are missing do nothing.

        What is said of layers inside removed blocks is dropped, so that equal networks have equal policies.
        """
        full = dict(self._spread(choices))
        removed = tuple(Parameter.of(n).target for n, c in full.items() if n.startswith("block/") and c == "remove")
        gone = {layer for block in removed for layer in self._inventory.blocks[block].layers}
        pruning: dict[str, float] = {}
        layers: dict[str, dict[str, Any]] = {}
        for name, choice in full.items():
            kind, target = Parameter.of(name)
            if target in gone:
                continue
            if kind == "prune":
                pruning[target] = float(choice)
            elif kind == "rank":
                factorization, ratio = rank_choices.read(choice) or (rank_choices.DEFAULT, 1.0)
                layers.setdefault(target, {}).update(rank_ratio=ratio, factorization=factorization)
            elif kind in ("dtype", "sparsity"):
                layers.setdefault(target, {})[kind] = str(choice)
        made = {name: LayerPolicy(**values) for name, values in layers.items()}
        return CompressionPolicy(self.dense_dtype, pruning, made, removed)

    @property
    def int8_layers(self) -> tuple[str, ...]:
        """Names of the layers to which int8 is offered."""
        offered = ((Parameter.of(name), choices) for name, choices in self.every.items())
        return tuple(
            parameter.target for parameter, choices in offered if parameter.kind == "dtype" and "int8" in choices
        )

    def within(self, parameter: str, block: str) -> bool:
        """Return whether a parameter's layer goes when a block is removed."""
        return Parameter.of(parameter).target in self._inventory.blocks[block].layers

    def _spread(self, choices: Mapping[str, Choice]) -> Iterator[tuple[str, Choice]]:
        """Yield one choice for every parameter of the model; ``kind/*`` goes to the nearest choice of each."""
        for name, allowed_choices in self.every.items():
            kind = Parameter.of(name).kind
            wanted = choices.get(name, choices.get(f"{kind}/*", allowed_choices[0]))
            yield name, rank_choices.nearest_choice(allowed_choices, wanted)

    def everywhere(self, **wanted: Choice) -> dict[str, Choice]:
        """Return choices that set every parameter of a kind to the nearest of: ``prune=0.5, dtype="int8"``."""
        found = {}
        for name, allowed_choices in self.parameters.items():
            kind = Parameter.of(name).kind
            found[name] = (
                rank_choices.nearest_choice(allowed_choices, wanted[kind]) if kind in wanted else allowed_choices[0]
            )
        return found


def _matters(choices: Sequence[Choice]) -> bool:
    return len(choices) > 1 or choices[0] not in ("dense", "keep", "none", 0.0, 1.0)


def _kept(choices: tuple[Choice, ...], allowed_choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Return the choices that are offered, or all where none is."""
    return tuple(choice for choice in choices if choice in allowed_choices) or choices


def _ratios(space: PruningSpace, group: ChannelGroup) -> tuple[Choice, ...]:
    channels = group.channels
    step = channel_step(channels) if space.round_to == "auto" else space.round_to
    if group.heads:
        step = 1
    kept = set()
    for ratio in space.ratios:
        wanted = channels * (1 - ratio)
        kept.add(channels if ratio == 0 else min(channels, max(min(step, channels), round(wanted / step) * step)))
    return tuple((channels - k) / channels for k in sorted(kept, reverse=True))
