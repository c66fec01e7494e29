"""A sentence-transformers folder as one network: what ``modules.json`` puts behind the transformer belongs to it.

Read without the package: pooling, dense layers and normalisation are a few lines, and their settings are plain JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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


def is_sentence_encoder(folder: Path) -> bool:
    """Return whether a folder is one of sentence-transformers."""
    return (folder / _MODULES).exists()


def longest_text(folder: Path) -> int | None:
    """Return the most tokens that a folder's texts are cut to, or None where it does not say."""
    path = folder / _SETTINGS
    found = read_json(path).get("max_seq_length") if path.exists() else None
    return None if found is None else int(found)


def sentence_encoder(where: str, folder: Path, transformer: nn.Module) -> SentenceEncoder:
    """Put a folder's modules behind its transformer.

    Raises:
        ConfigError: One of them is of a kind that is not known here, or cannot be read.
    """
    poolings: tuple[str, ...] = ()
    head: list[nn.Module] = []
    for module in read_json(folder / _MODULES)[1:]:
        kind, place = str(module.get("type", "")).rpartition(".")[2], folder / str(module.get("path", ""))
        if kind == "Pooling":
            poolings = _poolings(where, read_json(place / "config.json"))
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
    config = read_json(place / "config.json")
    activation = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"{where}: {place} has the activation {activation}; known are {', '.join(_ACTIVATIONS)}.")
    layer = nn.Linear(int(config["in_features"]), int(config["out_features"]), bias=bool(config.get("bias", True)))
    weights = place / "model.safetensors"
    state = {name.removeprefix("linear."): value for name, value in read_weights(str(weights)).items()}
    apply_weights(layer, state, str(weights))
    return [layer, _ACTIVATIONS[activation]()]
