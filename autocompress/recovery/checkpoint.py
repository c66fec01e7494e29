"""The file that makes a fine-tuning resumable: the network's state, and how far training had come."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from autocompress.files import write_bytes
from autocompress.recovery.lsq import settle


def save_checkpoint(model: nn.Module, path: Path, fraction: float, epoch: int, *, int8: bool = False) -> None:
    """Write a network's state with the fraction and epochs done, and whether int8 has begun; a finished one settled."""
    if fraction >= 1:
        settle(model)
    # Copies: safetensors refuses tensors that share memory, as tied weights do.
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    write_bytes(path, save(state, {"fraction": str(fraction), "epoch": str(epoch), "int8": str(int8)}))


def load_checkpoint(model: nn.Module, path: Path | None) -> tuple[float, int, bool]:
    """Load a checkpoint into `model`; return the fraction and epochs done, and whether int8 had begun by then.

    A damaged one is started over.
    """
    if path is None or not path.exists():
        return 0.0, 0, False
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        model.load_state_dict(state)
        return float(metadata["fraction"]), int(metadata["epoch"]), metadata.get("int8") == "True"
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError):
        return 0.0, 0, False
