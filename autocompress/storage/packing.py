"""`pack` and `unpack`: weights, pruned and shared on request, into a container and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from autocompress.engines.artifact import ENGINE_NAME, EngineDocument, check_hashes
from autocompress.errors import CompressionError, ConfigError
from autocompress.files import write_bytes
from autocompress.runs.directory import RunDirectory
from autocompress.storage.coders import CODERS
from autocompress.storage.container import TensorSize, read_container, write_container
from autocompress.storage.granularity import TENSOR, check_granularity, quantized
from autocompress.storage.quantizers import StorageQuantizer, quantizer
from autocompress.storage.sparsity import magnitude_masks, prunable
from autocompress.tasks.weights import read_weights

_WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Packed:
    """A container that was written.

    Attributes:
        path: The file.
        original_bytes: The same weights, dense, as a safetensors file.
        size_bytes: The container on disk, everything counted.
        lossless: Whether the weights come back as they were given; pruned or shared ones do not.
        tensors: What each takes.
    """

    path: Path
    original_bytes: int
    size_bytes: int
    lossless: bool
    tensors: tuple[TensorSize, ...]

    @property
    def ratio(self) -> float:
        """How many times smaller the file is."""
        return self.original_bytes / self.size_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "path": str(self.path), "original_bytes": self.original_bytes, "size_bytes": self.size_bytes,
            "ratio": self.ratio, "lossless": self.lossless, "tensors": [one.to_dict() for one in self.tensors],
        }  # fmt: skip


def pack(
    source: nn.Module | Mapping[str, Tensor] | Path | str,
    to: Path | str,
    *,
    sparsity: float | Mapping[str, float] | None = None,
    scope: str = "layer",
    weight_bits: int | Mapping[str, int] | None = None,
    scheme: str = "codebook",
    granularity: str | int = TENSOR,
    coders: Collection[str] = tuple(CODERS),
) -> Packed:
    """Write weights into one small file; losslessly, unless `sparsity` or `weight_bits` is given.

    Weights pruned or shared here are not trained on, and nobody has seen what that costs in accuracy: measure it, or
    train with `storage.sparsity` and `storage.sharing` first, whose zeros and levels packing finds by itself.

    Args:
        source: A model, its state dict, a safetensors file, or the folder of a run (its best), an artefact or a
            deployed engine.
        to: The file; must not exist.
        sparsity: Fraction of the weights REMOVED, those of least magnitude, of every tensor of two or more axes; or one
            per name, for those named alone.
        scope: ``"layer"`` or ``"global"``, see `magnitude_masks`.
        weight_bits: Share weights among at most ``2 ** weight_bits`` levels per tensor; or bits per name. A scheme that
            has one width alone (binary, ternary) needs none said.
        scheme: Of `storage.quantizers.QUANTIZERS`.
        granularity: What has levels of its own: ``"tensor"``, ``"channel"`` (of the first axis), or so many consecutive
            weights, one of `storage.scaled.GROUPS`. Only of float32 weights does the file become smaller for it.
        coders: Those that may be used; the smallest is chosen per stream.

    Raises:
        ConfigError: An argument cannot be used, `to` exists, or it cannot be written.
        CompressionError: A tensor would lose every weight, or has NaN where it is to be pruned or shared.
    """
    to = Path(to)
    if to.exists():
        raise ConfigError(f"{to} exists already. Remove it or choose another --out.")
    kind = quantizer(scheme)
    if weight_bits is None and len(kind.BITS) == 1:
        weight_bits = kind.BITS[0]
    if weight_bits is None and scheme != "codebook":
        raise ConfigError(f"The quantizer {scheme!r} needs weight_bits (--bits), {kind.BITS[0]} to {kind.BITS[-1]}.")
    check_granularity(kind, granularity)
    state, original = _read(source)
    packed = dict(state)
    if sparsity is not None:
        weights = packed if isinstance(sparsity, Mapping) else prunable(packed)
        for name, mask in magnitude_masks(weights, sparsity, scope).items():
            packed[name] = torch.where(mask, packed[name], torch.zeros_like(packed[name]))
    if weight_bits is not None:
        bits = weight_bits if isinstance(weight_bits, Mapping) else dict.fromkeys(prunable(packed), weight_bits)
        for name, width in bits.items():
            packed[name] = _shared(packed, name, width, kind, granularity)
    sizes = write_container(packed, to, tuple(coders))
    lossless = sparsity is None and weight_bits is None
    return Packed(to, original, to.stat().st_size, lossless, tuple(sizes))


def unpack(path: Path | str, to: Path | str | None = None) -> dict[str, Tensor]:
    """Return the weights of a container, to the bit; also write them to `to`, a new safetensors file.

    Raises:
        ConfigError: There is no such file, it is no container or of another version, or `to` exists.
        VerificationError: The file is damaged.
    """
    if to is not None and Path(to).exists():
        raise ConfigError(f"{to} exists already. Remove it or choose another --out.")
    state = read_container(Path(path))
    if to is not None:
        write_bytes(Path(to), save(state))
    return state


def _read(source: nn.Module | Mapping[str, Tensor] | Path | str) -> tuple[dict[str, Tensor], int]:
    """Return the weights, and the bytes of a safetensors file of them."""
    if isinstance(source, nn.Module):
        source = source.state_dict()
    if isinstance(source, Mapping):
        state = {name: tensor.detach().cpu() for name, tensor in source.items()}
        # Copies: safetensors refuses tensors that share memory.
        return state, len(save({name: tensor.clone().contiguous() for name, tensor in state.items()}))
    path = Path(source)
    if path.is_dir():
        run = RunDirectory(path)
        path = (run.best if run.config_file.exists() else path) / _WEIGHTS
        if not path.exists():
            raise ConfigError(f"{source} has no {_WEIGHTS}. Give a run with a result, an artefact or a weights file.")
        if (path.parent / ENGINE_NAME).exists():
            check_hashes(path.parent, EngineDocument.read(path.parent), (_WEIGHTS,))
    return read_weights(path), path.stat().st_size


def _shared(
    state: Mapping[str, Tensor], name: str, weight_bits: int, kind: StorageQuantizer, granularity: str | int
) -> Tensor:
    if name not in state:
        raise ConfigError(f"weight_bits is given for {name!r}, which the weights do not have.")
    if not state[name].is_floating_point():
        return state[name]
    try:
        return quantized(state[name], weight_bits, kind, granularity)
    except CompressionError as error:
        raise CompressionError(f"{name!r}: {error}") from error
