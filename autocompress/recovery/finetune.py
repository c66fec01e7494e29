"""Fine-tuning of one finalist: distillation on a time budget, quantization-aware at the end when int8 is in the policy.

Owns the schedule and the loop. The learning rate follows one cycle (Smith, 2018) over whichever runs out first, epochs
or seconds, so that training always ends annealed. The best state by the task's metric is kept, that of before training
included. A checkpoint after every epoch makes it resumable (the optimizer's momentum starts anew).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autocompress.catalogue import Method
from autocompress.compress.layout import in_fast_layout, layout_of
from autocompress.compress.quantization import calibrate, quantization_mode, quantized_layers
from autocompress.compress.recurrent import int8_lstms
from autocompress.config import RecoveryConfig
from autocompress.errors import AutoCompressError, CompressionError, ConfigError
from autocompress.model.eval_caches import Memory, clear_caches
from autocompress.recovery.budget import LEAST_BATCH, Budget, batch_within, learning_rate_factor, training_batch
from autocompress.recovery.checkpoint import load_checkpoint, save_checkpoint
from autocompress.recovery.distillation import Distiller, Teacher
from autocompress.recovery.held_out import HeldOut
from autocompress.recovery.label_loss import LabelLoss
from autocompress.recovery.lsq import learn_steps, settle
from autocompress.recovery.mixtures import FEW_SAMPLES, can_mix, mixed
from autocompress.recovery.optimizers import (
    LEAST_FOR_STATISTICS,
    RateGuard,
    TrainingMode,
    clip_gradients,
    make_optimizer,
    optimizer_name,
    peak_rate,
    state_of,
    thaw,
)
from autocompress.recovery.recalibration import batch_norms, fast_dtype, following, recalibrate
from autocompress.tasks.base import Batch, Task

METHOD = Method(
    "qat",
    "recovery",
    "int8 simulated in the last part of fine-tuning, gradients straight through",
    "Jacob et al., CVPR 2018",
)
# Augmented epochs are repeated after this many, so that the teacher's outputs are computed once for each.
AUGMENTED_EPOCHS = 6
# Fractions of a training at which states are compared, beside its beginning and its end; and the share of its time
# that one comparison may take for those to be made.
_LOOKS, _LOOK_SHARE = (0.5, 0.8), 0.03
# Calibration takes this share of a training's time at most.
_CALIBRATION_SHARE = 0.1
# Steps below which running statistics have not settled (their momentum is 0.1).
_SETTLED_STEPS = 30
# Characters of what a network raises that are told.
_WORDS = 300


@dataclass(frozen=True)
class FinetuneReport:
    """What a fine-tuning did.

    Attributes:
        epochs: Passes over the training data made, over all resumed parts.
        seconds: Wall time of this part.
        loss: Mean loss over the last epoch.
        before: The task's metric of the model as it was given, in torch on some validation samples; None where the task
            cannot measure.
        metric: The same of the state it is left in, at least `before`.
        optimizer: ``"sgd"`` or ``"adamw"``.
        learning_rate: Peak rate in the end.
    """

    epochs: float
    seconds: float
    loss: float
    before: float | None = None
    metric: float | None = None
    optimizer: str = ""
    learning_rate: float = math.nan

    @property
    def improved(self) -> bool:
        """Whether the metric is better than before; where nobody can tell, it is taken to be."""
        return self.before is None or self.metric is None or self.metric > self.before


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
    on_message: Callable[[str], None] = lambda text: None,
    untrained: bool = False,
) -> FinetuneReport:
    """Train `model` in place to match the teacher; leaves its best state by the task's metric, in eval mode.

    Args:
        model: The compressed model; int8 layers train in float until the last `config.qat_fraction`. What is frozen in
            it is trained all the same, and frozen again.
        teacher: The uncompressed model.
        task: Gives training, validation and calibration data, divergence, metric and the loss on labels.
        config: Optimizer, rates, temperature, alpha.
        budget: When to stop.
        checkpoint: Safetensors file written after every epoch, and continued from when it exists.
        progress: Called with the fraction done and a short text.
        first_epoch: Epoch number to start the data order at, so that a second part sees other batches.
        on_message: Called with where inner outputs are compared, when they are, and why labels are not used, when they
            fail.
        untrained: Whether the model is a student that was not trained before: what is frozen in it stays so, and
            dropout drops.

    Raises:
        CompressionError: The loss became NaN or infinite, the model and the teacher cannot be compared, or no parameter
            has a part in what the model gives.
        ConfigError: ``recovery.distill`` or ``recovery.distill_at`` names what there is not, or there are no samples.
    """
    training = _Training(model, teacher, task, config, budget, checkpoint, progress, first_epoch, on_message, untrained)
    frozen = {} if untrained else thaw(model)
    try:
        # Somebody may have switched gradients off for good, as one does for inference.
        with torch.inference_mode(False), torch.enable_grad(), following(model):
            return training.run()
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen.get(name, parameter.requires_grad))


@dataclass
class _Training:
    """One fine-tuning: see `finetune`."""

    model: nn.Module
    teacher: Teacher
    task: Task
    config: RecoveryConfig
    budget: Budget
    checkpoint: Path | None
    progress: Callable[[float, str], None]
    first_epoch: int
    on_message: Callable[[str], None]
    untrained: bool

    def __post_init__(self) -> None:
        self._start = time.monotonic()
        config, size = self.config, self.task.train_size()
        self._batch = training_batch(size, config)
        self._dtype = fast_dtype(self.model.eval(), self.task.example_inputs(2))
        self._held_out = HeldOut(self.task, self._dtype, self.budget.seconds)
        self._quantized = any(True for _ in (*quantized_layers(self.model), *int8_lstms(self.model)))
        self._simulate = False
        self._step_seconds = 0.0
        # Mixtures have no labels: the teacher alone says what they are.
        wanted = config.mixtures == "auto" and config.alpha > 0 and size < FEW_SAMPLES
        self._mixable: bool | None = None if wanted else False
        self._looks = list(_LOOKS)

    # -- the whole ----------------------------------------------------------------------------------------------------

    def run(self) -> FinetuneReport:
        """Train and return what was done; leaves the best state."""
        in_fast_layout(self.model, self.task.example_inputs(2))
        self._memory = Memory(self.model.eval())
        self._held_out.look(self.model)
        self._fit_batch()
        done, self._epoch, self._ranged = load_checkpoint(self.model, self.checkpoint)
        self._offset = done
        if done < 1:
            self._prepare()
            epoch = max(1, self.task.train_size() // self._batch)
            self._steps = max(1, math.ceil(self.budget.epochs * epoch))
            self._step = round(done * self._steps)
            loss = self._train(done)
            self._finish()
            epochs = self._step / self._steps * self.budget.epochs
        else:
            epochs, loss = self.budget.epochs, math.nan
            self._held_out.look(settle_and_eval(self.model))
        self._held_out.restore(self.model)
        # Caches may be of other weights than the best ones.
        clear_caches(self.model)
        if self.checkpoint is not None and done < 1:
            save_checkpoint(self.model, self.checkpoint, 1.0, self._epoch, int8=self._simulate)
        self.progress(1.0, "")
        return FinetuneReport(
            epochs=epochs,
            seconds=time.monotonic() - self._start,
            loss=loss,
            before=self._held_out.before,
            metric=self._held_out.best,
            optimizer=self._name if done < 1 else "",
            learning_rate=self._guard.rate if done < 1 else math.nan,
        )

    def _fit_batch(self) -> None:
        """Make batches smaller where so few would fit into the time that training got nowhere."""
        least = LEAST_FOR_STATISTICS if batch_norms(self.model) else LEAST_BATCH
        spent, seconds = self._held_out.sample_seconds, self.budget.seconds
        if math.isfinite(seconds):
            self._batch = batch_within(self._batch, spent, seconds, least=least)
        self._mode = TrainingMode(self._batch, dropout=self.untrained)
        self.teacher.batches_of(self._batch)

    def _prepare(self) -> None:
        config, own = self.config, self.task.has_own_divergence
        with quantization_mode(self.model, "off"):
            self._distiller = Distiller(self.teacher, self.model, self.task, config)
        if self._distiller.places:
            self.on_message(f"Distilling {self._distiller.describe()}")
        scores = not own and self.task.found_divergence().softens
        self._name = optimizer_name(self.model, config, class_scores=scores)
        rate = peak_rate(self._name, self.model, self._batch, config)
        self._guard = RateGuard(rate, enabled=config.learning_rate is None)
        self._labels = LabelLoss(self.task, self.on_message)
        self._new_optimizer()
        self._good = state_of(self.model)

    def _new_optimizer(self) -> None:
        learned = self._distiller.parameters()
        self._optimizer = make_optimizer(self._name, self.model, learned, self._guard.rate, self.config)

    def _train(self, fraction: float) -> float:
        """Train from a fraction of the budget to its end; return the mean loss of the last epoch."""
        running = math.nan
        while fraction < 1:
            with quantization_mode(self.model, "quantize" if self._simulate else "off"):
                fraction, losses = self._one_epoch(fraction)
            if self._step >= self._steps:
                fraction = 1.0
            running = sum(losses) / len(losses) if losses else running
            if self._int8_is_due(fraction) and fraction < 1:
                self._begin_int8()
            elif fraction < 1 or losses:
                self._epoch += 1
                if not losses:
                    raise ConfigError(
                        f"Task {self.task.name!r} has {self.task.train_size()} training samples, fewer than one batch "
                        f"of {self._batch}; lower recovery.batch_size."
                    )
            if self.checkpoint is not None and losses and fraction < 1:
                save_checkpoint(self.model, self.checkpoint, fraction, self._epoch, int8=self._simulate)
        return running

    def _one_epoch(self, fraction: float) -> tuple[float, list[float]]:
        """Train until the epoch, the budget or training in float ends; return the fraction done and the losses."""
        losses: list[float] = []
        number = (self.first_epoch + self._epoch) % AUGMENTED_EPOCHS
        self._mode.set(self.model)
        for index, batch in enumerate(self.task.train_batches(self._batch, number)):
            fraction = self._fraction()
            if fraction >= 1 or self._int8_is_due(fraction):
                break
            self._look(fraction)
            if len(batch[0]) < 2 and self._mode.statistics:
                continue  # one sample has no variance
            began = time.monotonic()
            for group in self._optimizer.param_groups:
                group["lr"] = self._guard.rate * learning_rate_factor(fraction)
            mix = self._step % 2 == 1 and self._can_mix(batch[0])
            with _trainable():
                loss = _loss(
                    self.model, self._distiller, self.config, batch, self._labels,
                    dtype=self._dtype, epoch=number, index=index, mix=mix,
                )  # fmt: skip
                found = self._update(loss)
            self._memory.forget()
            if not math.isfinite(found) and self.config.learning_rate is not None:
                raise CompressionError(
                    f"Fine-tuning diverged at step {self._step}: the loss is {found}. Lower recovery.learning_rate, "
                    f"now {self.config.learning_rate}."
                )
            if not mix and self._guard.has_risen(found):
                self._go_back()
            elif not math.isfinite(found):
                raise CompressionError(
                    f"Fine-tuning diverged at step {self._step}: the loss is {found}, at whatever rate. Check that the "
                    "model and the teacher give finite outputs."
                )
            else:
                losses.append(found)
            self._step += 1
            self._step_seconds = time.monotonic() - began
            if self._step % 10 == 0 and losses:
                self.progress(fraction, f"loss {sum(losses[-50:]) / len(losses[-50:]):.3f}")
        return fraction, losses

    def _finish(self) -> None:
        """Bring the last state to what is shipped, and compare it."""
        settle_and_eval(self.model)
        if self._mode.statistics and self._step < _SETTLED_STEPS and not self._quantized:
            recalibrate(self.model, self._calibration())
        if self._quantized and not self._simulate and not self._ranged:
            with quantization_mode(self.model, "off"):
                recalibrate(self.model, self._calibration())
            calibrate(self.model, self._calibration())
        self._held_out.look(self.model)

    # -- parts of it --------------------------------------------------------------------------------------------------

    def _fraction(self) -> float:
        """Return the share of the budget that is spent, 1 where another step does not fit into it."""
        now, seconds = time.monotonic(), self.budget.seconds
        if math.isinf(seconds):
            return self._step / self._steps
        kept = self._held_out.seconds
        if self._quantized and not self._simulate and not self._ranged:
            kept += 2 * _CALIBRATION_SHARE * seconds
        elapsed = (now - self._start + self._step_seconds) / max(seconds - kept, 1e-9)
        return max(self._step / self._steps, self._offset + (1 - self._offset) * elapsed)

    def _int8_is_due(self, fraction: float) -> bool:
        return self._quantized and not self._simulate and fraction >= 1 - self.config.qat_fraction

    def _begin_int8(self) -> None:
        """Calibrate, unless a checkpoint has the ranges, and let steps be learned where they are to be."""
        if not self._ranged:
            calibrate(self.model, self._calibration())
        self._simulate = True
        self._guard.restart()
        self._good = state_of(self.model)
        if self.config.qat == "lsq":
            learn_steps(self.model, self._optimizer)

    def _look(self, fraction: float) -> None:
        """Compare the state where one is due, has its ranges, and time allows."""
        due = [at for at in self._looks if at <= fraction]
        if not due:
            return
        self._looks = [at for at in self._looks if at > fraction]
        if self._quantized or self._held_out.seconds > _LOOK_SHARE * self.budget.seconds:
            return
        if self._held_out.look(self.model.eval()):
            self._good = state_of(self.model)
        self._mode.set(self.model)

    def _go_back(self) -> None:
        self.model.load_state_dict(self._good)
        if not (self._simulate and self.config.qat == "lsq"):  # whose optimizer holds what it learns
            self._new_optimizer()

    def _can_mix(self, inputs: Tensor) -> bool:
        if self._mixable is None:
            self._mixable = can_mix(self._distiller.teacher, inputs)
        return self._mixable

    def _update(self, loss: Tensor) -> float:
        """Make one step and return the loss."""
        if not loss.requires_grad:
            raise CompressionError(
                "No parameter has a part in the model's outputs as far as gradients go: its forward switches them off "
                "(torch.no_grad) or detaches. It cannot be fine-tuned."
            )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        clip_gradients(self._name, list(self.model.parameters()), self._distiller.parameters())
        found = loss.item()
        if math.isfinite(found):
            self._optimizer.step()
        return found

    def _calibration(self) -> Iterator[Tensor]:
        """Yield calibration inputs for as long as there is time, one batch at least."""
        started = time.monotonic()
        for inputs in self.task.calibration(self._batch):
            yield inputs
            if time.monotonic() - started > _CALIBRATION_SHARE * self.budget.seconds:
                return


@contextmanager
def _trainable() -> Iterator[None]:
    """Say of whatever a network raises in a step that it cannot be trained."""
    try:
        yield
    except (AutoCompressError, MemoryError):
        raise
    except Exception as error:  # the user's forward, which may have run in eval mode alone so far
        raise CompressionError(
            f"The network cannot be trained: {type(error).__name__}: {str(error)[:_WORDS]}. Check that one step of "
            "your own training runs on the uncompressed model."
        ) from error


def settle_and_eval(model: nn.Module) -> nn.Module:
    """Return the model in eval mode without learned steps."""
    settle(model.eval())
    return model


def _loss(
    model: nn.Module,
    distiller: Distiller,
    config: RecoveryConfig,
    batch: Batch,
    labels: LabelLoss,
    *,
    dtype: torch.dtype,
    epoch: int,
    index: int,
    mix: bool = False,
) -> Tensor:
    inputs, targets = batch
    if mix:
        inputs = mixed(inputs, epoch * 2**20 + index)
    if inputs.ndim == 4:
        inputs = inputs.contiguous(memory_format=layout_of(model))
    wanted = distiller.targets(inputs, epoch, index, keep=not mix)
    fast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with fast, distiller.watching(model) as seen:
        outputs = model(inputs)
    if not isinstance(outputs, Tensor):
        raise CompressionError(
            f"The model gives {type(outputs).__name__} where it is trained and a tensor where it is not; it cannot be "
            "compared with its teacher. Wrap it in autocompress.tasks.Adapter."
        )
    outputs = outputs.float()
    soft = distiller.loss(outputs, seen, wanted)
    if config.alpha == 1 or mix:
        return soft
    hard = labels(outputs, targets, lambda: distiller.outputs(inputs))
    return soft if hard is None else config.alpha * soft + (1 - config.alpha) * hard
