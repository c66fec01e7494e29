"""Losses of single choices in the user's cache: another target, or an interrupted pass, begins with what is known."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from autocompress.config import QuantizationConfig
from autocompress.documents import NotNegative, read_lines, validated
from autocompress.environment import cache_directory
from autocompress.errors import ConfigError
from autocompress.prediction.table_file import append_text
from autocompress.space.search_space import Choice
from autocompress.tasks.base import Task


class _Row(TypedDict):
    parameter: str
    choice: str | float
    loss: NotNegative | None


class SensitivityCache:
    """One file of losses: of one model, its data, and how choices are measured.

    Args:
        base: The uncompressed model, rewritten.
        task: Its model and data.
        method: What else the losses depend on.
        quantization: How ranges of activations are set.
        inputs: What networks are compared on ``(N, ...)``.
    """

    def __init__(
        self, base: nn.Module, task: Task, method: Sequence[Any], quantization: QuantizationConfig, inputs: Tensor
    ) -> None:
        # Omit defaults, so that the keys of older caches stay valid.
        own = quantization.model_dump(exclude_defaults=True)
        parts = [task.fingerprint(), task.divergence_name, *method, *([own] if own else [])]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
        for name, tensor in (*base.state_dict().items(), ("inputs", inputs)):
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self.path = cache_directory() / "sensitivity" / f"{digest.hexdigest()[:16]}.jsonl"

    def read(self) -> dict[str, dict[Choice, float]]:
        """Return what earlier passes measured; a line cut short by a crash is left out."""
        found: dict[str, dict[Choice, float]] = {}
        try:
            lines = read_lines(self.path, lambda data, source: validated(_Row, data, source))
        except ConfigError:
            return found
        for row in lines.values:
            loss = math.inf if row["loss"] is None else row["loss"]
            found.setdefault(row["parameter"], {})[row["choice"]] = loss
        return found

    def add(self, name: str, choice: Choice, loss: float) -> None:
        """Keep what one choice of a parameter loses; not finite where it could not be computed."""
        row = {"parameter": name, "choice": choice, "loss": loss if math.isfinite(loss) else None}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A line that a crash cut short must not swallow this one.
            whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
            append_text(self.path, ("" if whole else "\n") + json.dumps(row) + "\n")
        except (OSError, ConfigError):
            # The cache is a convenience: what cannot be kept is measured again.
            return
