"""The container of packed weights: one safetensors file; docs/storage.md describes it."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autocompress.documents import RAW, Count, explained, reading, shown
from autocompress.errors import ConfigError, VerificationError, nearest
from autocompress.files import write_bytes
from autocompress.storage import streams
from autocompress.storage.coders import CODERS

FORMAT = "autocompress-storage"
VERSION = 1
_PAYLOAD = "payload"
_UNREADABLE: tuple[type[Exception], ...] = (SafetensorError, *RAW)
# Names as in safetensors.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSize:
    """What one tensor takes, in bytes, after each stage.

    Attributes:
        name: Of the tensor.
        shape: Of the tensor.
        original: Dense.
        pruned: Its non-zero values in their dtype and raw gaps; `original` where zeros do not pay.
        shared: The same with values as raw indices into their levels; `pruned` where values are not shared.
        coded: In the container, its share of the file's header not counted.
        nonzero: Values that are not zero.
        levels: Distinct values that are not zero; None: more than can be shared.
        form: How it is kept: raw, planes, shared or sparse.
    """

    name: str
    shape: tuple[int, ...]
    original: int
    pruned: int
    shared: int
    coded: int
    nonzero: int
    levels: int | None
    form: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**asdict(self), "shape": list(self.shape)}


def write_container(
    weights: Mapping[str, Tensor], path: Path, coders: tuple[str, ...] = tuple(CODERS)
) -> list[TensorSize]:
    """Write weights into one file, atomically, and return what each tensor takes.

    Args:
        weights: Name to tensor, of any shape and dtype; values are kept to the bit.
        path: The file.
        coders: Those that may be used; the smallest result is kept, per stream.

    Raises:
        ConfigError: A coder or a dtype is unknown, or the file cannot be written.
    """
    for name in coders:
        streams.coder(name)
    described, payload, sizes = {}, [], []
    for name, tensor in weights.items():
        if tensor.dtype not in _NAMES:
            raise ConfigError(f"Tensor {name!r} is of dtype {tensor.dtype}, which a container cannot hold.")
        patterns = _patterns(tensor)
        coded = streams.encode(patterns, tuple(tensor.shape), coders)
        described[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "size": len(coded.payload), **coded.form,
        }  # fmt: skip
        payload.append(coded.payload)
        sizes.append(_sizes(name, tensor, patterns, coded))
    text = json.dumps(described, separators=(",", ":"))
    data = b"".join(payload)
    metadata = {"format": FORMAT, "version": str(VERSION), "sha256": _checksum(text, data), "tensors": text}
    write_bytes(path, _safetensors(metadata, data))
    return sizes


def read_container(path: Path) -> dict[str, Tensor]:
    """Read weights back, to the bit.

    Raises:
        ConfigError: There is no such file, it is no container, or a newer release wrote it.
        VerificationError: The file is cut short or changed.
    """
    metadata, data = _open(path)
    found = metadata.get("version")
    if found != str(VERSION):
        raise ConfigError(f"{path} has version {found} of the container; this release reads {VERSION}. Update it.")
    text = metadata.get("tensors", "")
    if _checksum(text, data) != metadata.get("sha256"):
        raise VerificationError(f"{path} is damaged: its checksum is not that of its content. Copy or pack it again.")
    weights, at = {}, 0
    left = streams.FREE_BYTES + streams.MOST_EXPANSION * len(data)
    with reading(f"{path}: the description of its tensors", error=VerificationError):
        described: dict[str, dict[str, Any]] = TypeAdapter(dict[str, dict[str, Any]]).validate_python(json.loads(text))
        forms = {name: (form, _Tensor.read(form, name, path)) for name, form in described.items()}
        # Before anything is allocated: what a file says of itself is bounded by the bytes that it has.
        if (wanted := sum(tensor.nbytes for _, tensor in forms.values())) > left:
            raise VerificationError(
                f"{path}: its {len(data)} bytes are said to hold {wanted} bytes of tensors, which they cannot. "
                "It is damaged or made to harm."
            )
        for name, (form, tensor) in forms.items():
            end = at + tensor.size
            try:
                weights[name] = tensor.decode(form, data[at:end])
            except (ConfigError, VerificationError) as error:
                raise type(error)(f"{path}: {name!r}: {error}") from error
            at = end
    if at != len(data):
        raise VerificationError(f"{path} holds {len(data) - at} bytes that belong to no tensor.")
    return weights


def _safetensors(metadata: Mapping[str, str], data: bytes) -> bytes:
    """Return a safetensors file; the library's own writer puts metadata in another order every time."""
    payload = {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": metadata, _PAYLOAD: payload}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def _open(path: Path) -> tuple[dict[str, str], bytes]:
    if not path.is_file():
        raise ConfigError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}. Give a packed file.")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ConfigError(f"{path} is no packed file (made by `autocompress pack`), so it cannot be unpacked.")
            return metadata, file.get_tensor(_PAYLOAD).tobytes()
    except _UNREADABLE as error:
        if _cut_short(path):
            raise VerificationError(
                f"{path} ({path.stat().st_size} bytes) is damaged or cut short: {error}. Copy or pack it again."
            ) from error
        raise ConfigError(f"{path} is no packed file: {error}.") from error


def _cut_short(path: Path) -> bool:
    """Whether the file begins as a container does; what follows is then the trouble."""
    with path.open("rb") as file:
        return file.read(100)[8:].startswith(_safetensors({"format": FORMAT}, b"")[8:48])


def _checksum(text: str, data: bytes) -> str:
    return hashlib.sha256(text.encode() + data).hexdigest()


def _patterns(tensor: Tensor) -> streams.Patterns:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(f"<u{tensor.element_size()}")


@dataclass(frozen=True)
class _Tensor:
    """What a container says of one tensor, whatever its form."""

    dtype: str
    shape: tuple[Count, ...]
    size: Count

    @classmethod
    def read(cls, form: Mapping[str, Any], name: str, path: Path) -> _Tensor:
        for key in ("dtype", "shape", "size"):
            if key not in form:
                raise VerificationError(f"{path}: the description of {name!r} lacks its {key}.")
        try:
            found = TypeAdapter(cls).validate_python(form)
        except ValidationError as error:
            raise VerificationError(
                f"{path}: the description of {name!r} cannot be read: {explained(error)}."
            ) from error
        if found.dtype not in _DTYPES:
            raise ConfigError(
                f"{path}: tensor {name!r} has the unknown dtype {shown(found.dtype)}.{nearest(found.dtype, _DTYPES)}"
            )
        return found

    @property
    def nbytes(self) -> int:
        # In Python's own numbers, which do not wrap around.
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize

    def decode(self, form: Mapping[str, Any], payload: bytes) -> Tensor:
        dtype = _DTYPES[self.dtype]
        patterns = streams.decode(dict(form), payload, self.shape, dtype.itemsize)
        if not patterns.size:
            return torch.empty(self.shape, dtype=dtype)
        # A copy: torch warns of memory that it must not write to.
        return torch.from_numpy(patterns.view(np.uint8).copy()).view(dtype).reshape(self.shape)


def _sizes(name: str, tensor: Tensor, patterns: streams.Patterns, coded: streams.Coded) -> TensorSize:
    original = patterns.nbytes
    pruned, shared, levels = streams.stages(patterns)
    return TensorSize(
        name, tuple(tensor.shape), original, pruned, shared, len(coded.payload), int(np.count_nonzero(patterns)),
        levels, coded.form["form"],
    )  # fmt: skip
