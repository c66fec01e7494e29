"""A sentence-transformers folder as one network: what ``modules.json`` puts behind the transformer belongs to it.

Read without the package: pooling, dense layers and normalisation are a few lines, and their settings are plain JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import TypedDict

from autocompress.documents import RelativeFolder, validated
from autocompress.errors import ConfigError
from autocompress.files import read_json
from autocompress.tasks.weights import apply_weights, read_weights

_MODULES = "modules.json"
_SETTINGS = "sentence_bert_config.json"
_POOLINGS = ("cls", "mean", "max")
# What older files call them.
_MODES = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens"}
_ACTIVATIONS = {"Tanh": nn.Tanh, "Identity": nn.Identity, "ReLU": nn.ReLU, "GELU": nn.GELU}


class SentenceEncoder(nn.Module):
    """Token numbers and mask ``(N, length)`` to one embedding each ``(N, width)``.

    Args:
        transformer: Gives hidden states ``(N, length, hidden)`` first.
        poolings: Of ``"cls"``, ``"mean"``, ``"max"``; several are put behind each other.
        head: What comes after.
    """

    def __init__(self, transformer: nn.Module, poolings: tuple[str, ...], head: nn.Sequential) -> None:
        super().__init__()
        self.transformer, self.poolings, self.head = transformer, poolings, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return embeddings ``(N, width)``."""
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask[..., None].to(hidden.dtype)
        pooled = {
            "cls": lambda: hidden[:, 0],
            "mean": lambda: (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9),
            "max": lambda: (hidden - (1 - mask) * 1e9).amax(1),
        }
        found: Tensor = self.head(torch.cat([pooled[name]() for name in self.poolings], 1))
        return found


class Normalize(nn.Module):
    """Vectors of length 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, width)`` to the same shape."""
        return nn.functional.normalize(x, dim=-1)


class _Lengths(TypedDict):
    max_seq_length: NotRequired[Annotated[int, Field(ge=1, le=2**20)] | None]


class _Module(TypedDict, total=False):
    type: str
    path: RelativeFolder | Literal[""]


class _Dense(TypedDict):
    in_features: Annotated[int, Field(ge=1, le=2**16)]
    out_features: Annotated[int, Field(ge=1, le=2**16)]
    bias: NotRequired[bool]
    activation_function: NotRequired[str]


# Every form of pooling has a key of its own.
_Pooling = dict[str, bool | int | str | list[str] | None]


def is_sentence_encoder(folder: Path) -> bool:
    """Return whether a folder is one of sentence-transformers."""
    return (folder / _MODULES).exists()


def longest_text(folder: Path) -> int | None:
    """Return the most tokens that a folder's texts are cut to, or None where it does not say."""
    path = folder / _SETTINGS
    return validated(_Lengths, read_json(path), path).get("max_seq_length") if path.exists() else None


def sentence_encoder(where: str, folder: Path, transformer: nn.Module) -> SentenceEncoder:
    """Put a folder's modules behind its transformer.

    Raises:
        ConfigError: One of them is of a kind that is not known here, or cannot be read.
    """
    poolings: tuple[str, ...] = ()
    head: list[nn.Module] = []
    modules = folder / _MODULES
    for module in validated(list[_Module], read_json(modules), modules)[1:]:
        kind, place = module.get("type", "").rpartition(".")[2], folder / module.get("path", "")
        if kind == "Pooling":
            config = place / "config.json"
            poolings = _poolings(where, validated(_Pooling, read_json(config), config))
        elif kind == "Dense":
            head += _dense(where, place)
        elif kind == "Normalize":
            head.append(Normalize())
        elif kind != "Dropout":
            raise ConfigError(
                f"{where}: {folder / _MODULES} has a {kind or module}; Pooling, Dense and Normalize are known. Write a "
                "factory that returns an UnlabelledTask (docs/tasks.md)."
            )
    if not poolings:
        raise ConfigError(f"{where}: {folder / _MODULES} has no Pooling, so a text has no one embedding.")
    return SentenceEncoder(transformer, poolings, nn.Sequential(*head)).eval()


def _poolings(where: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    named = config.get("pooling_mode")
    if named is not None:
        found = (named,) if isinstance(named, str) else tuple(named)
    else:
        found = tuple(name for name, key in _MODES.items() if config.get(key))
        asked = {key for key, value in config.items() if key.startswith("pooling_mode") and value is True}
        found += tuple(sorted(asked - set(_MODES.values())))
    unknown = [name for name in found if name not in _POOLINGS]
    if unknown or not found:
        raise ConfigError(f"{where}: pooling {', '.join(unknown) or 'of no kind'}; known are {', '.join(_POOLINGS)}.")
    return found


def _dense(where: str, place: Path) -> list[nn.Module]:
    file = place / "config.json"
    config = validated(_Dense, read_json(file), file)
    activation = config.get("activation_function", "Tanh").rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"{where}: {place} has the activation {activation}; known are {', '.join(_ACTIVATIONS)}.")
    weights = place / "model.safetensors"
    state = {name.removeprefix("linear."): value for name, value in read_weights(str(weights)).items()}
    # Before a layer of that size is made: two numbers of a file could ask for all memory.
    size = (config["out_features"], config["in_features"])
    if "weight" in state and tuple(state["weight"].shape) != size:
        raise ConfigError(f"{weights}: its weight is {tuple(state['weight'].shape)}, but {file} says {size}.")
    with torch.device("meta" if "weight" not in state else "cpu"):
        layer = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
    apply_weights(layer, state, str(weights))
    return [layer, _ACTIVATIONS[activation]()]
