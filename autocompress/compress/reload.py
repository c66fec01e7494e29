"""Compressed models as they were stored: a policy and weights."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from autocompress.compress.apply import apply_policy
from autocompress.compress.base import CompressionContext
from autocompress.compress.rewrite import rewrite
from autocompress.config import QuantizationConfig
from autocompress.documents import reading
from autocompress.engines.artifact import ENGINE_NAME, EngineDocument, check_hashes
from autocompress.errors import CompressionError
from autocompress.runs.records import TrialRecord
from autocompress.tasks.base import Task


def load_compressed(
    task: Task, folder: Path, record: TrialRecord, quantization: QuantizationConfig | None = None
) -> nn.Module:
    """Rebuild a record's model from its policy and ``weights.safetensors`` in `folder`: eval mode, ready to train on.

    `quantization` says how ranges of activations are set when they are calibrated again; those stored are loaded.

    Raises:
        ConfigError: The weights are missing or damaged.
        CompressionError: They do not fit the policy and the task's model.
        VerificationError: They are not those that were recorded.
    """
    path = folder / "weights.safetensors"
    if (folder / ENGINE_NAME).exists():
        check_hashes(folder, EngineDocument.read(folder), (path.name,))
    if record.stage == "baseline":
        model = task.network()
    else:
        context = CompressionContext(
            task.example_inputs(2), quantization=quantization or QuantizationConfig(), weights=False
        )
        model = apply_policy(rewrite(task.network()), record.policy, context)
    with reading(path, also=(SafetensorError,)):
        state = load_file(path)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CompressionError(f"{path} does not fit the policy on this task's model: {error}") from error
    return model.eval()
