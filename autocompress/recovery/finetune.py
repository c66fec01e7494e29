"""Fine-tuning of one finalist: distillation on a time budget, quantization-aware at the end when int8 is in the policy.

Owns the schedule and the loop. The learning rate follows one cycle (Smith, 2018) over whichever runs out first, epochs
or seconds, so that training always ends annealed. A checkpoint after every epoch makes it resumable (the optimizer's
momentum starts anew).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from autocompress.compress.quantization import calibrate, quantization_mode, quantized_layers
from autocompress.compress.sparsity import keep_zeros
from autocompress.config import RecoveryConfig
from autocompress.errors import CompressionError, ConfigError
from autocompress.methods import Method
from autocompress.recovery.distillation import Distiller, Teacher
from autocompress.recovery.lsq import learn_steps, settle
from autocompress.recovery.recalibration import fast_dtype, recalibrate
from autocompress.results import write_bytes
from autocompress.tasks.base import Batch, Task

METHOD = Method(
    "qat",
    "recovery",
    "int8 simulated in the last part of fine-tuning, gradients straight through",
    "Jacob et al., CVPR 2018",
)
# Augmented epochs are repeated after this many, so that the teacher's outputs are computed once for each.
AUGMENTED_EPOCHS = 6
_WARM_UP = 0.1
_CLIP_NORM = 5.0


@dataclass(frozen=True)
class Budget:
    """How long one fine-tuning may take: whichever ends first.

    Attributes:
        epochs: Passes over the training data; fractions are allowed.
        seconds: Wall time.
    """

    epochs: float
    seconds: float


@dataclass(frozen=True)
class FinetuneReport:
    """What a fine-tuning did.

    Attributes:
        epochs: Passes over the training data made, over all resumed parts.
        seconds: Wall time of this part.
        loss: Mean loss over the last epoch.
    """

    epochs: float
    seconds: float
    loss: float


def learning_rate_factor(progress: float) -> float:
    """Return the share of the peak rate at `progress` in [0, 1]: linear warm-up, then cosine to zero."""
    if progress < _WARM_UP:
        return max(progress / _WARM_UP, 0.02)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - _WARM_UP) / (1 - _WARM_UP))))


def finetune(
    model: nn.Module,
    teacher: Teacher,
    task: Task,
    config: RecoveryConfig,
    budget: Budget,
    *,
    checkpoint: Path | None = None,
    progress: Callable[[float, str], None] = lambda fraction, text: None,
    first_epoch: int = 0,
    told: Callable[[str], None] = lambda text: None,
) -> FinetuneReport:
    """Train `model` in place to match the teacher; leaves it in eval mode.

    Args:
        model: The compressed model; int8 layers train in float until the last `config.qat_fraction`.
        teacher: The uncompressed model.
        task: Gives training and calibration data and the loss on labels.
        config: Rates, temperature, alpha.
        budget: When to stop.
        checkpoint: Safetensors file written after every epoch, and continued from when it exists.
        progress: Called with the fraction done and a short text.
        first_epoch: Epoch number to start the data order at, so that a second part sees other batches.
        told: Called with where inner outputs are compared, when they are.

    Raises:
        CompressionError: The loss became NaN or infinite, or the model and the teacher cannot be compared inside.
        ConfigError: ``recovery.distill`` or ``recovery.distill_at`` names what there is not.
    """
    start = time.monotonic()
    done, epoch, ranged = _resume(model, checkpoint)
    model.to(memory_format=torch.channels_last)
    distiller = _distiller(model, teacher, task, config, told)
    optimizer = _optimizer(model, distiller, config)
    dtype = fast_dtype()
    steps = max(1, math.ceil(budget.epochs * max(1, task.train_size() // config.batch_size)))
    quantized = any(True for _ in quantized_layers(model))
    step, fraction, running, simulate = round(done * steps), done, math.nan, False
    offset = done
    while fraction < 1:
        losses: list[float] = []
        number = (first_epoch + epoch) % AUGMENTED_EPOCHS
        with quantization_mode(model, "quantize" if simulate else "off"):
            model.train()
            for index, (inputs, targets) in enumerate(task.train_batches(config.batch_size, number)):
                elapsed = (time.monotonic() - start) / max(budget.seconds, 1e-9)
                fraction = max(step / steps, offset + (1 - offset) * elapsed)
                if fraction >= 1 or (quantized and not simulate and fraction >= 1 - config.qat_fraction):
                    break
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * learning_rate_factor(fraction)
                loss = _loss(model, distiller, task, config, (inputs, targets), dtype=dtype, epoch=number, index=index)
                losses.append(_update(model, distiller, optimizer, loss))
                if not math.isfinite(losses[-1]):
                    raise CompressionError(
                        f"Fine-tuning diverged at step {step}: the loss is {losses[-1]}. Lower "
                        f"recovery.learning_rate, now {config.learning_rate}."
                    )
                step += 1
                if step % 10 == 0:
                    progress(fraction, f"loss {sum(losses[-50:]) / len(losses[-50:]):.3f}")
        if step >= steps:
            fraction = 1.0
        running = sum(losses) / len(losses) if losses else running
        if quantized and not simulate and fraction >= 1 - config.qat_fraction and fraction < 1:
            _begin_int8(model, optimizer, None if ranged else task, config)
            simulate = True
        elif fraction < 1 or losses:
            epoch += 1
            if not losses:
                raise ConfigError(
                    f"Task {task.name!r} has {task.train_size()} training samples, fewer than one batch of "
                    f"{config.batch_size}; lower recovery.batch_size."
                )
        if checkpoint is not None and losses:
            _save(model, checkpoint, fraction, epoch, int8=simulate)
    settle(model.eval())
    if quantized and not simulate and not ranged:
        with quantization_mode(model, "off"):
            recalibrate(model, _calibration(task, config))
        calibrate(model, _calibration(task, config))
    progress(1.0, "")
    return FinetuneReport(epochs=step / steps * budget.epochs, seconds=time.monotonic() - start, loss=running)


def _distiller(
    model: nn.Module, teacher: Teacher, task: Task, config: RecoveryConfig, told: Callable[[str], None]
) -> Distiller:
    with quantization_mode(model, "off"):
        distiller = Distiller(teacher, model, task, config)
    if distiller.places:
        told(f"Distilling {distiller.describe()}")
    return distiller


def _optimizer(model: nn.Module, distiller: Distiller, config: RecoveryConfig) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(
        model.parameters(), config.learning_rate, momentum=0.9, weight_decay=config.weight_decay, nesterov=True
    )
    keep_zeros(model, optimizer)
    if learned := distiller.parameters():
        optimizer.add_param_group({"params": learned, "weight_decay": 0.0})
    return optimizer


def _update(model: nn.Module, distiller: Distiller, optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """Make one step and return the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    for trained in (model.parameters(), distiller.parameters()):
        nn.utils.clip_grad_norm_(trained, _CLIP_NORM)
    optimizer.step()
    return loss.item()


def _loss(
    model: nn.Module,
    distiller: Distiller,
    task: Task,
    config: RecoveryConfig,
    batch: Batch,
    *,
    dtype: torch.dtype,
    epoch: int,
    index: int,
) -> Tensor:
    inputs, targets = batch
    if inputs.ndim == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    wanted = distiller.targets(inputs, epoch, index)
    fast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with fast, distiller.watching(model) as seen:
        outputs = model(inputs).float()
    soft = distiller.loss(outputs, seen, wanted)
    if config.alpha == 1:
        return soft
    return config.alpha * soft + (1 - config.alpha) * task.loss(outputs, targets)


def _calibration(task: Task, config: RecoveryConfig) -> Iterator[Tensor]:
    return task.calibration(config.batch_size)


def _begin_int8(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task | None, config: RecoveryConfig) -> None:
    """Calibrate by a task's data, unless a checkpoint has the ranges, and let steps be learned where they are to be."""
    if task is not None:
        calibrate(model, _calibration(task, config))
    if config.qat == "lsq":
        learn_steps(model, optimizer)


def _save(model: nn.Module, path: Path, fraction: float, epoch: int, *, int8: bool = False) -> None:
    if fraction >= 1:
        settle(model)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_bytes(path, save(state, {"fraction": str(fraction), "epoch": str(epoch), "int8": str(int8)}))


def _resume(model: nn.Module, path: Path | None) -> tuple[float, int, bool]:
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
