"""Mixtures of inputs, answered by the teacher: more to learn from where there are few samples.

Mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019) without their mixed labels: what a mixture is, the
teacher says (Beyer et al., "A good teacher is patient and consistent", CVPR 2022). Only for continuous inputs: half of
one word and half of another is no word.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autocompress.catalogue import Method
from autocompress.tasks.adapters import Adapter

METHOD = Method(
    "mixtures",
    "recovery",
    "distillation on mixtures of inputs where training samples are few",
    "Beyer et al., A good teacher is patient and consistent, CVPR 2022",
)
# Training samples below which every other step is on mixtures.
FEW_SAMPLES = 2048


def can_mix(model: nn.Module, inputs: Tensor) -> bool:
    """Return whether inputs ``(N, ...)`` of a model are continuous: no token numbers, classes or masks."""
    if isinstance(model, Adapter) and any(spec.dtype != "float32" for spec in model.inputs or ()):
        return False
    return inputs.is_floating_point() and bool((inputs != inputs.round()).any())


def mixed(inputs: Tensor, seed: int) -> Tensor:
    """Return every input of ``(N, ...)`` mixed with another: all of it, or for images half the time a part."""
    generator = torch.Generator().manual_seed(seed)
    others = inputs[torch.randperm(len(inputs), generator=generator)]
    share, coin = torch.rand(2, generator=generator).tolist()
    if inputs.ndim != 4 or coin < 0.5:
        return torch.lerp(inputs, others, share)
    sizes = inputs.shape[-2:]
    lengths = [max(1, round(size * share**0.5)) for size in sizes]
    begins = [
        int(torch.randint(size - length + 1, (), generator=generator))
        for size, length in zip(sizes, lengths, strict=True)
    ]
    rows, columns = (slice(begin, begin + length) for begin, length in zip(begins, lengths, strict=True))
    made = inputs.clone()
    made[..., rows, columns] = others[..., rows, columns]
    return made
