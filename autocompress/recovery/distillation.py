"""Knowledge distillation from the uncompressed model (Hinton et al., 2015).

Owns the loss and the teacher; the teacher's outputs are kept, since `Task.train_batches` repeats exactly for the same
epoch number: every candidate that trains on the same epochs shares them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.methods import Method

METHOD = Method(
    "logits",
    "distillation",
    "outputs of the uncompressed model matched, with temperature and alpha",
    "Hinton et al., Distilling the knowledge in a neural network, 2015",
)

# Teacher outputs kept in memory at most; beyond it they are computed again.
_CACHE_BYTES = 512 * 2**20


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the KL divergence of the softened outputs ``(N, classes)``, times temperature squared; lower is closer."""
    return temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.log_softmax(teacher / temperature, 1),
        log_target=True,
        reduction="batchmean",
    )


class Teacher:
    """The uncompressed model, remembering its outputs for every augmented batch it has seen.

    Args:
        model: The uncompressed model; owned by the teacher from here on.
        dtype: What its forward passes run in under autocast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self._dtype = dtype
        self._outputs: dict[tuple[int, int], Tensor] = {}
        self._bytes = 0

    def outputs(self, inputs: Tensor, epoch: int, index: int) -> Tensor:
        """Return outputs ``(N, classes)`` for batch `index` of augmented epoch `epoch`."""
        key = (epoch, index)
        if key in self._outputs:
            return self._outputs[key]
        with torch.no_grad(), torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32):
            found: Tensor = self._model(inputs).float()
        if self._bytes + found.nbytes <= _CACHE_BYTES:
            self._outputs[key] = found
            self._bytes += found.nbytes
        return found
