"""Weights from disk: safetensors only, since a pickle can run code when it is read. Owns every check on the file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autocompress.errors import ConfigError

# A PyTorch file is a zip archive (since 1.6) or a bare pickle, which starts with its protocol opcode.
_ZIP = b"PK\x03\x04"
_PICKLE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_LISTED = 5


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file as a state dict.

    Raises:
        ConfigError: The file is missing, a PyTorch pickle, damaged, or holds NaN or infinite values.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"Weights file {file} {'is a folder' if file.is_dir() else 'does not exist'}.")
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
        if start == _ZIP or start.startswith(_PICKLE):
            raise ConfigError(
                f"Weights file {file} is a PyTorch pickle, which can run code when read; only safetensors are read. "
                'Convert it once: python -c "import torch; from safetensors.torch import save_file; '
                f"s = torch.load('{file}', map_location='cpu', weights_only=True); "
                "save_file({k: v.clone().contiguous() for k, v in s.items()}, "
                f"'{file.with_suffix('.safetensors')}')\""
            )
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"Weights file {file} ({file.stat().st_size} bytes) is not a whole safetensors file: {error}. "
            "Copy or export it again."
        ) from error
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise ConfigError(f"Weights file {file}: tensor {name!r} holds NaN or infinite values. Export it again.")
    return state


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a safetensors file into `model`, in place.

    Names and shapes must match exactly; a missing ``num_batches_tracked`` is forgiven.

    Raises:
        ConfigError: As `read_weights`, or names or shapes do not match the model.
    """
    apply_weights(model, read_weights(path), str(path))


def apply_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict into `model`, in place; `source` names it in errors.

    Raises:
        ConfigError: Names or shapes do not match the model.
    """
    own = model.state_dict()
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    missing = [name for name in own if name not in state and name not in optional]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} is {tuple(tensor.shape)} in the file, {tuple(own[name].shape)} in the model"
        for name, tensor in state.items()
        if name in own and tensor.shape != own[name].shape
    ]
    found = [
        f"{len(items)} {what}: {_some(items)}"
        for what, items in (
            ("missing in the file", missing),
            ("unexpected in the file", unexpected),
            ("of another shape", shapes),
        )
        if items
    ]
    if found:
        raise ConfigError(
            f"Weights {source} do not fit the model {type(model).__name__}: {'; '.join(found)}. "
            "Check task.model, or export the weights with the model's own state_dict()."
        )
    model.load_state_dict(dict(state), strict=False)


def _some(items: Iterable[str]) -> str:
    every = list(items)
    return ", ".join(every[:_LISTED]) + (", ..." if len(every) > _LISTED else "")
