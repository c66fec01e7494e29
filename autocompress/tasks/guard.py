"""The border of the user's code: a `Task` through which every call of another one goes.

Whatever a method raises or gives that it must not is one sentence with the method, the sample and the mend
(`TaskError`). Data and weights that change from reading to reading are noticed. Owns no wording of exceptions and no
time: see `user_calls`; and no comparison: see `repeats`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.errors import ConfigError, NotANumberError
from autocompress.runs.metric import Metric, metric_name
from autocompress.tasks.base import Batch, Task
from autocompress.tasks.label_free import LabelFreeTask
from autocompress.tasks.reading import as_number, checked_batch, checked_inputs, kind_of
from autocompress.tasks.repeats import Reading, Repeats
from autocompress.tasks.split import SplitTask
from autocompress.tasks.user_calls import UserCalls

_REPAIR = "Repair what comes there, or leave it out."
_END: Any = object()
_SEED = "Seed what is random in it (shuffling, augmentation), or leave that out."
# A share may be this far outside 0 to 1 by rounding.
_ROUNDING = 1e-6


def guarded(task: Task, calls: UserCalls | None = None) -> Task:
    """Return a task all of whose user's code is called through a `GuardedTask`; one that is so already gets `calls`.

    Args:
        task: As the user made it; of a `LabelFreeTask`, whose metric is this package's, the task within.
        calls: Are told of every call.

    Raises:
        ConfigError: It has no name.
    """
    if isinstance(task, LabelFreeTask):
        outer = copy.copy(task)
        outer._task = guarded(task._task, calls)
        return outer
    if not isinstance(task, GuardedTask):
        return GuardedTask(task, calls or UserCalls())
    if calls is not None:
        task.calls, calls.where = calls, task.calls.where
    return task


class GuardedTask(Task):
    """Calls another task's methods and checks what they give.

    Args:
        task: The user's.
        calls: Words errors, and knows the stage and the time.

    Raises:
        ConfigError: It has no name.
    """

    def __init__(self, task: Task, calls: UserCalls) -> None:
        name = getattr(task, "name", None)
        if not isinstance(name, str) or not name:
            raise ConfigError(f"A {type(task).__name__} has no name, for tables and folders: set its attribute `name`.")
        self._task, self.calls, self._repeats = task, calls, Repeats()
        self.name, self.outputs, self.tokens, self.labelled = name, task.outputs, task.tokens, task.labelled
        self.metric_name, self.metric_is_share = task.metric_name, task.metric_is_share
        self.model_notes = task.model_notes
        self._is_share = task.metric_is_share or Metric(metric_name(task)).is_share
        self._shape: tuple[int, ...] | None = None
        self._fingerprint: dict[str, Any] | None = None
        calls.where = f"Task {name!r}"

    def __getattr__(self, name: str) -> Any:
        # What a kind of task has beside the interface: `SplitTask.data_notes`, attributes of the user's own.
        if name.startswith("__") or "_task" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._task, name)

    @property
    def source(self) -> Task:
        """The user's task itself."""
        return self._task.source

    # -- the model ------------------------------------------------------------------------------------------------

    def model(self) -> nn.Module:
        """See `Task.model`.

        Raises:
            TaskError: It raised, or gives other weights than before.
        """
        with self.calls.calling("model"):
            found: object = self._task.model()
        # What else is no model is refused where it is copied.
        name = self._repeats.changed_weight(found) if isinstance(found, nn.Module) else None
        if name is not None:
            self.calls.refuse(
                "model", f"gives other weights at each call ({name} differs from the first)",
                "Load the trained weights in it, or seed what makes them: every candidate is compared with one model.",
            )  # fmt: skip
        return found  # type: ignore[return-value]

    # -- data -----------------------------------------------------------------------------------------------------

    def example_inputs(self, batch_size: int = 1) -> Tensor:
        """See `Task.example_inputs`.

        Raises:
            TaskError: It raised, or gives no batch.
        """
        with self.calls.calling("example_inputs", f" for {batch_size} samples"):
            found: object = self._task.example_inputs(batch_size)
        if not isinstance(found, Tensor) or not found.ndim or not 0 < len(found) <= batch_size:
            given = tuple(found.shape) if isinstance(found, Tensor) else kind_of(found)
            self.calls.refuse(
                "example_inputs", f"gave {given} for batch_size={batch_size}",
                "Return one tensor (batch_size, ...) of real samples.",
            )  # fmt: skip
        self._shape = self._shape or tuple(found.shape[1:])
        self._same_shape("example_inputs", found, 0)
        self._compare("example_inputs", self._repeats.reading(("example", batch_size), batch_size), (found,))
        return found

    def calibration(self, batch_size: int) -> Iterator[Tensor]:
        """See `Task.calibration`; samples with NaN or infinity are left out, which is said."""
        where = f"{self.calls.where}: calibration data"

        def check(batch: Any, count: int) -> tuple[Tensor, ...]:
            return (checked_inputs(where, batch),)

        start = lambda: self._task.calibration(batch_size)  # noqa: E731 - asked for when the first batch is due
        for (inputs,) in self._read("calibration", start, check, "calibration", batch_size):
            yield inputs

    def train_batches(self, batch_size: int, epoch: int) -> Iterator[Batch]:
        """See `Task.train_batches`; samples with NaN or infinity are left out, which is said."""
        # The order may depend on the size of a batch as well.
        key = ("train_batches", batch_size, epoch)
        return self._labelled("train_batches", lambda: self._task.train_batches(batch_size, epoch), key, batch_size)

    def validation(self, batch_size: int) -> Iterator[Batch]:
        """See `Task.validation`."""
        return self._labelled("validation", lambda: self._task.validation(batch_size), "validation", batch_size)

    def test(self, batch_size: int) -> Iterator[Batch]:
        """See `Task.test`."""
        return self._labelled("test", lambda: self._task.test(batch_size), "test", batch_size)

    def train_size(self) -> int:
        """See `Task.train_size`.

        Raises:
            TaskError: It raised, or gives no number of samples.
        """
        with self.calls.calling("train_size"):
            found: object = self._task.train_size()
        number = as_number(found)
        if number is None or not 0 <= number < math.inf:
            self.calls.refuse("train_size", f"gave {found!r}", "Return the number of training samples of one epoch.")
        return int(number)

    def test_size(self) -> int | None:
        """See `Task.test_size`."""
        with self.calls.calling("test_size"):
            return self._task.test_size()

    def _labelled(
        self, method: str, start: Callable[[], Iterator[Any]], key: Hashable, batch_size: int
    ) -> Iterator[Batch]:
        where = f"{self.calls.where}: {method.removesuffix('_batches')} data"

        def check(batch: Any, count: int) -> tuple[Tensor, ...]:
            return checked_batch(where, batch, count)

        for tensors in self._read(method, start, check, key, batch_size):
            yield tensors[0], tensors[1]

    def _read(
        self, method: str, start: Callable[[], Iterator[Any]], check: Callable[[Any, int], tuple[Tensor, ...]],
        key: Hashable, batch_size: int,
    ) -> Iterator[tuple[Tensor, ...]]:  # fmt: skip
        """Yield the user's batches, inputs first, as they are due."""
        calls, count = self.calls, 0
        reading = self._repeats.reading(key, batch_size)
        with calls.calling(method, mend=_REPAIR):
            batches = iter(start())
        while True:
            calls.check_time(method, count)
            with calls.calling(method, f" after {count} samples", _REPAIR):
                batch = next(batches, _END)
            if batch is _END:
                break
            tensors = check(batch, count)
            if not len(tensors[0]):
                continue
            # Training may be at several resolutions.
            if method != "train_batches":
                self._same_shape(method, tensors[0], count)
            self._compare(method, reading, tensors)
            kept = self._finite(method, tensors, count)
            count += len(tensors[0])
            if len(kept[0]):
                yield kept
        if (first := reading.ended()) is not None:
            said = f"{method}() gave {first} samples when it was first read, and now {count}"
            if count == 0:
                calls.refuse(
                    method, f"gave {first} samples when it was first read, and none now",
                    "Make a new iterator at every call; a generator that was read to its end yields nothing.",
                )  # fmt: skip
            calls.say_once(method, "count", f"{said}. {_SEED}")

    def _same_shape(self, method: str, inputs: Tensor, count: int) -> None:
        shape = tuple(inputs.shape[1:])
        self._shape = self._shape or shape
        if shape != self._shape:
            self.calls.refuse(
                method, f"gave inputs of shape {shape} from sample {count} on, others had {self._shape}",
                "An engine is built for one shape: resize, crop or pad to it.",
            )  # fmt: skip

    def _compare(self, method: str, reading: Reading, tensors: tuple[Tensor, ...]) -> None:
        differs = reading.changed(tensors)
        if differs is None:
            return
        what = "for the same epoch" if method == "train_batches" else "at each reading"
        why = "Fine-tuning is then not the same when it is repeated or resumed."
        if method != "train_batches":
            why = "What candidates are judged on must stay the same, or figures do not compare."
        said = f"{method}() gives other data {what} (sample {differs} differs). {why} {_SEED}"
        self.calls.say_once(method, "data", said)

    def _finite(self, method: str, tensors: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
        """Return what of a batch can be used, and name the first sample that holds NaN or infinity."""
        inputs = tensors[0]
        # NaN and infinity are in the sum as well, which is ten times as quick; a sum may also overflow.
        if not inputs.is_floating_point() or bool(torch.isfinite(inputs.sum())):
            return tensors
        if bool(torch.isfinite(inputs).all()):
            return tensors
        finite = torch.isfinite(inputs.reshape(len(inputs), -1)).all(1)
        first = int((~finite).nonzero()[0])
        kind = "NaN" if bool(torch.isnan(inputs[first]).any()) else "infinity"
        said = f"{method}() gave {kind} in the inputs of sample {count + first}"
        if not self.calls.leaves_out:
            return tensors
        if method in ("calibration", "train_batches"):
            said += "; such samples are left out. Repair them, or leave them out yourself."
            self.calls.say_once(method, "nan", said)
            return tuple(tensor[finite] for tensor in tensors)
        self.calls.say_once(method, "nan", f"{said}; what the model gives for it is wrong. Repair it, or leave it out.")
        return tensors

    # -- judging --------------------------------------------------------------------------------------------------

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        """See `Task.metric`.

        Raises:
            TaskError: It raised, gives no number, or a share that is none.
            NotANumberError: It is NaN or infinite.
        """
        with self.calls.calling(
            "metric", f" of {len(outputs)} samples",
            f"It gets outputs {tuple(outputs.shape)} of {outputs.dtype} and targets {tuple(targets.shape)} of "
            f"{targets.dtype}.",
        ):  # fmt: skip
            value: object = self._task.metric(outputs, targets)
        number = as_number(value)
        must = "Task.metric must return one finite number, higher for better"
        if number is None:
            given = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:100]
            self.calls.refuse("metric", f"of {len(outputs)} samples gave {given}", f"{must}.")
        if not math.isfinite(number):
            why = "" if bool(torch.isfinite(outputs).all()) else " The model's outputs are not finite either."
            raise NotANumberError(f"{self.calls.where}: metric() of {len(outputs)} samples is {number}. {must}.{why}")
        if self._is_share and not -_ROUNDING <= number <= 1 + _ROUNDING:
            mend = "Divide a percentage by 100" if 1 < number <= 100 else "Return a fraction"
            self.calls.refuse(
                "metric", f"gave {number:.6g}, but {metric_name(self._task)!r} is a share, from 0 to 1",
                f"{mend}; where it is another score, name it (metric_name) and set metric_is_share to False.",
            )  # fmt: skip
        return number

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Task.loss`.

        Raises:
            TaskError: It raised, or gives no scalar that can be trained on.
            NotANumberError: It is NaN, of outputs that are finite.
        """
        return self._scalar("loss", self._task.loss, outputs, targets)

    @property
    def has_own_loss(self) -> bool:
        """See `Task.has_own_loss`."""
        return self._task.has_own_loss

    def divergence(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """See `Task.divergence`.

        Raises:
            TaskError: The task's own raised, or gives no scalar.
            NotANumberError: It is NaN, of outputs that are finite.
        """
        if not self._task.has_own_divergence:
            return self.found_divergence()(outputs, reference)
        return self._scalar("divergence", self._task.divergence, outputs, reference)

    @property
    def has_own_divergence(self) -> bool:
        """See `Task.has_own_divergence`."""
        return self._task.has_own_divergence

    def _scalar(
        self, method: str, function: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, other: Tensor
    ) -> Tensor:
        with self.calls.calling(method, f" of {len(outputs)} samples"):
            found: object = function(outputs, other)
        if not isinstance(found, Tensor) or found.numel() != 1:
            given = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else kind_of(found)
            self.calls.refuse(method, f"gave {given}", "Return one number as a tensor, the mean over samples.")
        if bool(torch.isnan(found)) and bool(torch.isfinite(outputs).all()):
            raise NotANumberError(
                f"{self.calls.where}: {method}() of {len(outputs)} samples is NaN, though the outputs are finite"
                f"{'' if _finite(other) else ' (what they are compared with is not)'}. Look for a division by zero, a "
                "logarithm or a root in it."
            )
        if outputs.requires_grad and torch.is_grad_enabled() and not found.requires_grad:
            self.calls.refuse(
                method, "gave a number that does not depend on the outputs as far as gradients go",
                "Leave detach(), item() and torch.no_grad() out of it.",
            )  # fmt: skip
        return found

    def fingerprint(self) -> Mapping[str, str | int | float]:
        """See `Task.fingerprint`.

        Raises:
            TaskError: It raised, or gives no mapping of names to plain values.
        """
        source = self.source
        if self._fingerprint is not None and type(source).fingerprint is SplitTask.fingerprint:
            # Of this package's own: it reads all the data, and cannot change.
            return self._fingerprint
        with self.calls.calling("fingerprint"):
            found: object = self._task.fingerprint()
        items = list(found.items()) if isinstance(found, Mapping) else None
        if items is None or not all(isinstance(value, (str, int, float)) for _, value in items):
            self.calls.refuse(
                "fingerprint", f"gave {repr(found)[:100]}",
                "Return a mapping of names to strings and numbers that identify model, weights and data.",
            )  # fmt: skip
        plain = {str(key): value for key, value in items}
        if self._fingerprint is None:
            self._fingerprint = plain
        changed = next((key for key, value in plain.items() if self._fingerprint.get(key) != value), None)
        if changed is not None:
            self.calls.say_once(
                "fingerprint", "data",
                f"fingerprint() gives another {changed!r} at each call, so this run cannot be resumed. Have it depend "
                "on model, weights and data alone.",
            )  # fmt: skip
        return plain


def _finite(values: Tensor) -> bool:
    return not values.is_floating_point() or bool(torch.isfinite(values).all())
