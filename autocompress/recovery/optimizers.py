"""Which optimizer trains a network back, at which rate, and when the rate is too high.

Networks of convolutions with batch-norm that give class scores take SGD; all others (attention, recurrence, no norm,
divergences of another scale) take AdamW, whose steps do not depend on the scale of the loss. No rate suits every
network: where the loss rises above what it began with, training goes back to the last good state at a lower rate.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean

import torch
from torch import Tensor, nn

from autocompress.compress.sparsity import keep_zeros
from autocompress.config import RecoveryConfig
from autocompress.model.eval_caches import clear_caches
from autocompress.recovery.recalibration import batch_norms

# Peak rates at batches of `_BATCH`: SGD's; AdamW's for attention and recurrence, and for other networks.
_SGD, _ADAMW_SEQUENCES, _ADAMW = 0.05, 3e-4, 1e-3
_BATCH = 128
_MOMENTUM = 0.9
# Largest norm of the gradients of one step.
_CLIP_NORM = {"sgd": 5.0, "adamw": 1.0}
# Steps whose mean loss is the level at the start, and the mean that is compared with it.
_FIRST, _LAST = 4, 10
# A loss above this multiple of the level has risen; then the rate is divided, this many times at most.
_RISEN, _DIVISOR, _MOST_REDUCTIONS = 1.5, 4.0, 4


def optimizer_name(model: nn.Module, config: RecoveryConfig, *, class_scores: bool) -> str:
    """Return ``"sgd"`` or ``"adamw"``: what the configuration says, or what suits the network.

    Args:
        model: The network to train.
        config: Its `optimizer` may be ``"auto"``.
        class_scores: Whether the loss is a divergence of class scores, for whose scale SGD's rate is meant.
    """
    if config.optimizer != "auto":
        return config.optimizer
    convolutions = any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())
    plain = convolutions and bool(batch_norms(model)) and not _is_sequence_network(model)
    return "sgd" if plain and class_scores else "adamw"


def peak_rate(name: str, model: nn.Module, batch_size: int, config: RecoveryConfig) -> float:
    """Return the highest rate of the cycle: the configured one, or what suits optimizer, network and batch size."""
    if config.learning_rate is not None:
        return config.learning_rate
    share = min(1.0, batch_size / _BATCH)
    if name == "sgd":
        return _SGD * share
    return (_ADAMW_SEQUENCES if _is_sequence_network(model) else _ADAMW) * math.sqrt(share)


def make_optimizer(
    name: str, model: nn.Module, learned: list[nn.Parameter], rate: float, config: RecoveryConfig
) -> torch.optim.Optimizer:
    """Return the optimizer of a model's parameters, whose zeros of 2:4 sparsity stay.

    Args:
        name: ``"sgd"`` or ``"adamw"``.
        model: The network.
        learned: What is trained beside it, without weight decay.
        rate: Learning rate.
        config: Weight decay.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer
    if name == "sgd":
        optimizer = torch.optim.SGD(
            parameters, rate, momentum=_MOMENTUM, weight_decay=config.weight_decay, nesterov=True
        )
    else:
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=config.weight_decay)
    keep_zeros(model, optimizer)
    if learned:
        optimizer.add_param_group({"params": learned, "weight_decay": 0.0})
    return optimizer


def clip_gradients(name: str, *groups: list[nn.Parameter]) -> None:
    """Bound the norm of each group's gradients by what suits the optimizer."""
    for group in groups:
        nn.utils.clip_grad_norm_(group, _CLIP_NORM[name])


class RateGuard:
    """Watches the losses of a training, which are to fall.

    Args:
        rate: Peak rate to begin with.
        enabled: Whether it may be lowered.
    """

    def __init__(self, rate: float, *, enabled: bool) -> None:
        self.rate = rate
        self._left = _MOST_REDUCTIONS if enabled else 0
        self.restart()

    def restart(self) -> None:
        """Take the level anew from the next losses."""
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=_LAST)

    def has_risen(self, loss: float) -> bool:
        """Note a step's loss; return whether training must go back, in which case the rate is lower already."""
        if not self._left:
            return False
        if len(self._first) < _FIRST and math.isfinite(loss):
            self._first.append(loss)
            return False
        self._last.append(loss)
        full = len(self._last) == _LAST
        if math.isfinite(loss) and not (full and fmean(self._last) > _RISEN * fmean(self._first)):
            return False
        self._left -= 1
        self.rate /= _DIVISOR
        self._last.clear()
        return True


class TrainingMode:
    """Puts a network in the mode in which it is trained back: as it will run, but for its batch-norms.

    What a network computes in training only (auxiliary outputs, other branches, dropout) is not what is compared with
    the teacher. Batch-norms learn their statistics from batches that are large enough, else keep those they have.

    Args:
        batch_size: Samples of a step.
        dropout: Whether dropout drops: for students that were not trained before.
    """

    def __init__(self, batch_size: int, *, dropout: bool = False) -> None:
        self.statistics = batch_size >= LEAST_FOR_STATISTICS
        self._dropout = dropout

    def set(self, model: nn.Module) -> None:
        """Set it, from whatever mode the network is in."""
        clear_caches(model.eval())
        for norm in batch_norms(model) if self.statistics else ():
            norm.train()
        if self._dropout:
            for module in model.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.train()


# Samples from which a batch's statistics are those of the data.
LEAST_FOR_STATISTICS = 32


def thaw(model: nn.Module) -> dict[str, bool]:
    """Let every floating-point parameter be trained; return by name which were before."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return before


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a network's parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _is_sequence_network(model: nn.Module) -> bool:
    """Return whether a network is of the kind that is trained with adaptive rates: attention or recurrence."""
    kinds = nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.RNNBase, nn.LayerNorm
    return any(isinstance(m, kinds) or "Attention" in type(m).__name__ for m in model.modules())
