"""What can be seen to be wrong with a task's data, model and metric before anything is compressed, in seconds.

Each fault is one sentence that names the data set, the value and the mend: an error where no result would mean
anything, else a warning. Owns the checks only; `model_checks` has those of the model alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from autocompress.errors import AutoCompressError, ConfigError, TaskError
from autocompress.tasks.base import Task
from autocompress.tasks.classification import ClassificationTask
from autocompress.tasks.label_free import LabelFreeTask
from autocompress.tasks.model_checks import check_model, first_nan, run
from autocompress.tasks.plain_model import plain_copy
from autocompress.tasks.reading import as_number, read_batches, read_calibration
from autocompress.tasks.sampling import class_numbers
from autocompress.tasks.split import SplitTask
from autocompress.tasks.validation import ValidationData

_BATCH = 32
_FEW = 8  # samples that a model is tried on
_MOST = 64  # samples that a metric is tried on, and that predictions are looked at of
_NO_DIVERGENCE = 1e-2  # of outputs from themselves, by rounding
_SAME = 1e-6  # a metric of the same outputs, over its value
_CLEARLY = 0.3  # accuracy that labels moved by one must gain before they are doubted


def check_task(task: Task, *, training: bool = True, scored: bool = True, seconds: float = 5.0) -> list[str]:
    """Check a task before a run, on a few batches of its data.

    Args:
        task: As `load_task` or the user gave it.
        training: Whether training batches are needed, for fine-tuning.
        scored: Whether the metric is needed.
        seconds: About how long reading and running may take; what there is no time for is not looked at.

    Returns:
        Warnings: what was done to the data (`SplitTask.data_notes`), then what is odd but can be worked with.

    Raises:
        ConfigError: Data are missing, hold NaN that reaches the outputs, or cannot be scored; or the model is no
            function of one sample.
    """
    return [*getattr(task, "data_notes", ()), *_Check(task, seconds).all(training, scored)]


def check_validation(task: Task, data: ValidationData) -> None:
    """Check the validation data that were chosen of a task, all of whose labels are known then.

    Raises:
        ConfigError: They are of one class, so that accuracy tells nothing.
    """
    if data.only_class is not None and task.outputs == "classes" and not isinstance(task, LabelFreeTask):
        raise ConfigError(
            f"Task {task.name!r}: all {len(data.targets)} validation samples are of class {data.only_class}, so "
            "accuracy tells nothing. Give validation data of all classes."
        )


class _Check:
    def __init__(self, task: Task, seconds: float) -> None:
        self.task, self.seconds = task, seconds
        self.where = f"Task {task.name!r}"
        self.source = task.source
        self.warnings: list[str] = []

    def all(self, training: bool, scored: bool) -> list[str]:
        model, said = plain_copy(self.task.model(), self.where)
        self.warnings += [*self.source.model_notes, *said]
        self.examples(model)
        rows, names = self.calibration(model)
        few = check_model(self.where, model, rows[:_FEW])
        self.finite_outputs(model, rows[:_FEW], few, names)
        start = time.monotonic()
        run(model, rows[:1])
        spent = time.monotonic() - start
        most = max(_FEW, min(_MOST, int(self.seconds / 4 / max(spent, 1e-4))))
        predicted = run(model, rows[:most])
        self.finite_outputs(model, rows[:most], predicted, names)
        if self.task.has_own_divergence:
            self.divergence(predicted)
        if not isinstance(self.task, LabelFreeTask) and isinstance(self.source, ClassificationTask):
            for split, targets in self.source.known_targets().items():
                self.labels(split, targets, few.shape[1], whole=True)
        if training:
            self.task.train_size()
            self.train(model)
        if scored:
            # A run needs it; one that raises is to do so now.
            self.task.fingerprint()
        self.validation(model, most, predicted, scored)
        if next(read_batches(self.task, "test", 2), None) is None:
            raise ConfigError(f"{self.where} has no test data. What is delivered is verified on them; give some.")
        return self.warnings

    # -- inputs ---------------------------------------------------------------------------------------------------

    def examples(self, model: nn.Module) -> None:
        """Refuse example inputs with NaN that the model does not bear: networks are traced and compared on them."""
        inputs = self.task.example_inputs(2)
        finite = torch.isfinite(_rows(inputs)).all(1)
        bad = [(int(at), inputs[at]) for at in (~finite).nonzero().flatten()]
        self.not_finite("example", len(inputs), bad, model)

    def calibration(self, model: nn.Module) -> tuple[Tensor, list[str]]:
        """Return some finite calibration samples, spread over those read, and what they are called."""
        end = time.monotonic() + self.seconds / 2
        kept: list[tuple[int, Tensor]] = []
        bad: list[tuple[int, Tensor]] = []
        count = flat = 0
        low, high = math.inf, -math.inf
        generator = torch.Generator().manual_seed(0)
        for inputs in read_calibration(self.task, _BATCH):
            table = _rows(inputs)
            finite, smallest, largest = torch.isfinite(table).all(1), table.amin(1), table.amax(1)
            flat += int((smallest == largest).sum()) if table.shape[1] > 1 else 0
            for row in range(len(inputs)):
                if not finite[row]:
                    bad.append((count + row, inputs[row].clone() if len(bad) < _FEW else inputs[row][:0]))
                    continue
                low, high = min(low, float(smallest[row])), max(high, float(largest[row]))
                place = len(kept) if len(kept) < _MOST else int(torch.randint(count + row + 1, (), generator=generator))
                if place < len(kept):
                    kept[place] = count + row, inputs[row].clone()
                elif place < _MOST:
                    kept.append((count + row, inputs[row].clone()))
            count += len(inputs)
            if time.monotonic() > end:
                break
        if count == 0:
            raise ConfigError(
                f"{self.where} has no calibration data. int8 ranges are taken from them; yield some training inputs."
            )
        self.not_finite("calibration", count, bad, model)
        if not kept:
            raise ConfigError(f"{self.where}: all {count} calibration samples hold NaN or infinity. Give others.")
        if low == high:
            what = "zeros" if low == 0 else f"the same value, {low:.6g}"
            raise ConfigError(
                f"{self.where}: the {count} calibration samples are all {what}, so no range can be taken from them. "
                "Give real inputs, as the model gets them in use."
            )
        if flat > count / 2:
            self.warnings.append(
                f"{flat} of {count} calibration samples are of one value throughout; ranges come from the others alone."
            )
        # One of each class first where classes come in turn: the model is tried on the first few.
        kept.sort(key=lambda item: int(item[0]))
        step = max(1, len(kept) // _FEW)
        spread = [item for first in range(step) for item in kept[first::step]]
        return torch.stack([row for _, row in spread]), [self.name("calibration", at) for at, _ in spread]

    def name(self, split: str, at: int) -> str:
        """Return what the user knows a sample by."""
        own = getattr(type(self.source), split, self) is getattr(SplitTask, split, None)
        return (
            self.source.sample_name(split, at) if own and isinstance(self.source, SplitTask) else f"{split} sample {at}"
        )

    def not_finite(self, split: str, count: int, bad: list[tuple[int, Tensor]], model: nn.Module) -> None:
        """Say which samples hold NaN or infinity: an error where the model's outputs then do, too."""
        if not bad:
            return
        at, row = bad[0]
        what = "NaN" if torch.isnan(row).any() else "infinity"
        found = f"{len(bad)} of {count} {split} samples hold NaN or infinity ({what} in {self.name(split, at)})"
        rows = torch.stack([sample for _, sample in bad[:_FEW]])
        try:
            survives = bool(torch.isfinite(run(model, rows)).all())
        except Exception:  # noqa: BLE001 - a network that refuses NaN does not bear it
            survives = False
        if survives:
            self.warnings.append(f"{found}; the model bears them, but ranges of its input cannot be taken from them.")
            return
        raise ConfigError(
            f"{self.where}: {found}, and the model's outputs for these are no numbers. Leave such samples out, or "
            "replace the values (torch.nan_to_num)."
        )

    def finite_outputs(self, model: nn.Module, inputs: Tensor, outputs: Tensor, names: list[str]) -> None:
        """Refuse a model that gives NaN for finite inputs."""
        table = _rows(outputs)
        nan = torch.isnan(table).any(1)
        if nan.any():
            at = int(nan.nonzero()[0])
            raise ConfigError(
                f"{self.where}: model {type(model).__name__} gives NaN for {names[at]}"
                f"{first_nan(model, inputs[at : at + 1])}, though its input is finite. Check the weights and that "
                "inputs are scaled as in training."
            )
        infinite = torch.isinf(table).any(1)
        if infinite.any() and not any("infinite values" in text for text in self.warnings):
            at = int(infinite.nonzero()[0])
            self.warnings.append(
                f"model {type(model).__name__} gives infinite values for {names[at]}"
                f"{first_nan(model, inputs[at : at + 1])}; outputs cannot be compared there. Masks that are large "
                "finite numbers (-1e4) can be."
            )

    # -- labels ---------------------------------------------------------------------------------------------------

    def labels(self, split: str, targets: Tensor, classes: int, *, whole: bool = False) -> None:
        """Refuse labels that are no classes of the model, and, where all are known, one class alone."""
        low, high = int(targets.min()), int(targets.max())
        if low == 1 and high == classes:
            raise ConfigError(
                f"{self.where}: {split} labels run from 1 to {high}, but the model's {classes} classes count from 0 to "
                f"{classes - 1}. Subtract 1 from the labels."
            )
        wrong = targets[(targets < 0) | (targets >= classes)]
        if len(wrong):
            mend = "Leave samples without a label out" if int(wrong[0]) < 0 else "Use weights trained on these classes"
            raise ConfigError(
                f"{self.where}: {len(wrong)} of {len(targets)} {split} labels are no class of the model, such as "
                f"{int(wrong[0])}; its {classes} classes are 0 to {classes - 1}. {mend}."
            )
        if not (whole and low == high and len(targets) > 1 and classes > 1) or split == "test":
            return
        if split == "calibration":
            self.warnings.append(
                f"all {len(targets)} calibration samples are of class {low}, so int8 ranges are those of one class. "
                "Raise task.calibration_size."
            )
            return
        raise ConfigError(
            f"{self.where}: all {len(targets)} {split} samples are of class {low}. Give data of all {classes} classes."
        )

    def read_labels(self, split: str, outputs: Tensor, targets: Tensor) -> None:
        """Check labels ``(N,)`` of samples read, where they are classes that `outputs` of some of these tell apart."""
        classes = class_numbers(targets)
        if (
            classes is None
            or outputs.ndim != 2
            or self.task.outputs != "classes"
            or isinstance(self.task, LabelFreeTask)
        ):
            return
        width = outputs.shape[1]
        outside = classes[(classes < 0) | (classes >= width)]
        # A task of the user's own may know what such labels mean; then its loss does.
        meant = not isinstance(self.source, ClassificationTask) and self.has_loss(outputs[:1], outside[:1])
        if len(outside) and not meant:
            self.labels(split, classes, width)

    def has_loss(self, outputs: Tensor, targets: Tensor) -> bool:
        """Return whether the task's loss takes these."""
        try:
            return math.isfinite(float(self.task.loss(outputs, targets)))
        except Exception:  # noqa: BLE001 - the user's code
            return False

    def train(self, model: nn.Module) -> None:
        """Check that there is something to fine-tune on."""
        batch = next(read_batches(self.task, "train", _BATCH), None)
        if batch is None:
            raise ConfigError(
                f"{self.where} has no training batches (train_batches yields nothing). Fine-tuning needs them; give "
                "training data, or switch it off (recovery.enabled=false)."
            )
        # The guard compares two readings of the same epoch.
        next(read_batches(self.task, "train", _BATCH), None)
        inputs, targets = batch[0][:_FEW], batch[1]
        finite = torch.isfinite(_rows(batch[0])).all(1)
        bad = [(int(at), batch[0][at]) for at in (~finite).nonzero().flatten()]
        if bad:
            self.not_finite("training", len(finite), bad, model)
        outputs = run(model, inputs)
        self.read_labels("training", outputs, targets)
        targets = targets[: len(inputs)]
        if not self.has_loss(outputs, targets):
            try:
                said = f"is {float(self.task.loss(outputs, targets)):.6g}"
            except Exception as error:  # noqa: BLE001 - the user's code
                said = f"raised {type(error).__name__}: {error}"
            given = f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} of {targets.dtype}"
            self.warnings.append(
                f"the loss of {given} {said}. Fine-tuning on labels needs one; override "
                "Task.loss where it is not cross-entropy."
            )

    # -- divergence and metric ------------------------------------------------------------------------------------

    def divergence(self, outputs: Tensor) -> None:
        """Refuse a divergence of the task's own that gives no number, and doubt one that is not 0 for equal outputs."""
        said = f"the divergence of {len(outputs)} outputs from themselves"
        try:
            # As for training: what is not differentiated here would not be there.
            with torch.enable_grad():
                value = as_number(self.task.divergence(outputs.clone().requires_grad_(), outputs))
        except AutoCompressError:
            raise
        except Exception as error:  # the user's code
            raise ConfigError(f"{self.where}: {said} raised {type(error).__name__}: {error}.") from error
        if value is None or not math.isfinite(value):
            found = "no number" if value is None else f"{value}"
            raise ConfigError(
                f"{self.where}: {said} is {found}; Task.divergence must return a scalar, 0 for equal ones."
            )
        if abs(value) > _NO_DIVERGENCE:
            self.warnings.append(f"{said} is {value:.3g}. It must be 0 there, and grow as they move apart.")

    def validation(self, model: nn.Module, most: int, predicted: Tensor, scored: bool) -> None:
        """Check validation inputs, labels and what the metric makes of them."""
        batches = read_batches(self.task, "validation", min(_BATCH, most))
        taken = list(self.within(batches, most))
        if not taken:
            raise ConfigError(f"{self.where} has no validation data. Candidates are chosen by them; give some.")
        inputs = torch.cat([x for x, _ in taken])[:most]
        targets = torch.cat([y for _, y in taken])[:most]
        finite = torch.isfinite(_rows(inputs)).all(1)
        self.not_finite(
            "validation", len(inputs), [(int(at), inputs[at]) for at in (~finite).nonzero().flatten()], model
        )
        outputs = run(model, inputs)
        names = [self.name("validation", at) for at in range(len(inputs))]
        kept = finite.nonzero().flatten()
        self.finite_outputs(model, inputs[kept], outputs[kept], [names[int(at)] for at in kept])
        self.read_labels("validation", outputs, targets)
        self.predictions(predicted, outputs)
        if scored:
            self.metric(outputs, targets)

    def within(self, batches: Iterator[tuple[Tensor, Tensor]], most: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches until there are enough samples or the time is over."""
        end, count = time.monotonic() + self.seconds / 4, 0
        for inputs, targets in batches:
            yield inputs, targets
            count += len(inputs)
            if count >= most or time.monotonic() > end:
                return

    def predictions(self, calibration: Tensor, validation: Tensor) -> None:
        """Warn of calibration samples that the model takes for one class, where it tells others apart."""
        if (
            self.task.outputs != "classes"
            or calibration.ndim != 2
            or calibration.shape[1] < 2
            or len(calibration) < _FEW
        ):
            return
        seen, others = (set(outputs.argmax(1).tolist()) for outputs in (calibration, validation))
        if len(seen) == 1 and len(others) > 1:
            self.warnings.append(
                f"the model takes all of {len(calibration)} calibration samples for class {min(seen)}, but tells "
                "validation samples apart. If they are of one class, so are int8 ranges; calibrate on all classes."
            )

    def metric(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse a metric that gives no number, and doubt one that gives an odd one."""
        classes = class_numbers(targets)
        alone = classes is not None and bool((classes == classes[0]).all())
        said = f"the metric of {len(outputs)} validation samples"
        try:
            value: object = self.task.metric(outputs, targets)
        except TaskError as error:  # said by the guard
            if not alone:
                raise
            self.warnings.append(f"{error} These samples are all of one class.")
            return
        except AutoCompressError:
            raise
        except Exception as error:  # the user's code
            problem = f"{said} raised {type(error).__name__}: {error}"
            if alone:  # what ranks classes may need more than one
                self.warnings.append(f"{problem}; these samples are all of one class.")
                return
            raise ConfigError(
                f"{self.where}: {problem}. It gets outputs {tuple(outputs.shape)} of {outputs.dtype} and targets "
                f"{tuple(targets.shape)} of {targets.dtype}."
            ) from error
        number = as_number(value)
        if number is None or not math.isfinite(number):
            found = repr(value) if number is None else f"{number}"
            if alone and number is not None:
                self.warnings.append(f"{said} is {found}; these samples are all of one class.")
                return
            raise ConfigError(
                f"{self.where}: {said} is {found}; Task.metric must return one finite number, higher for better."
            )
        again = as_number(self.task.metric(outputs, targets))
        if again is None or abs(again - number) > _SAME * max(1.0, abs(number)):
            self.warnings.append(
                f"{said} is {number:.6g}, and {again} when it is asked again for the same. Candidates are told apart "
                "by it: leave out what is random in it, or what it adds up over calls."
            )
        if not -1e-6 <= number <= 1 + 1e-6:
            hint = " If it is a percentage, divide it by 100." if 1 < number <= 100 else ""
            self.warnings.append(
                f"{said} is {number:.6g}, outside 0 to 1. A drop of 1 pp means 0.01 of it, and higher must be better."
                + hint
            )
        elif isinstance(self.source, ClassificationTask) and classes is not None:
            self.chance(outputs, classes, number)

    def chance(self, outputs: Tensor, classes: Tensor, accuracy: float) -> None:
        """Warn of a classifier that gets no more right than by guessing, as with labels moved by one."""
        count, width = outputs.shape
        error = math.sqrt((1 / width) * (1 - 1 / width) / count)
        if count < _BATCH or width < 2 or accuracy > 1 / width + 2 * error:
            return
        right = outputs.argmax(1)
        for moved in (1, -1):
            found = float((right == classes + moved).double().mean())
            if found > max(accuracy + _CLEARLY, 1 / width + 5 * error):
                raise ConfigError(
                    f"{self.where}: the model gets {100 * accuracy:.0f} % of {count} validation samples right, but "
                    f"{100 * found:.0f} % if {'1 is added to' if moved > 0 else '1 is subtracted from'} every label. "
                    "Number the classes as in training."
                )
        self.warnings.append(
            f"the model gets {100 * accuracy:.0f} % of {count} validation samples right, no more than by guessing "
            f"among {width} classes. Unless its weights are random, check the normalisation and how classes are "
            "numbered."
        )


def _rows(values: Tensor) -> Tensor:
    """Return floats ``(N, values of a sample)``."""
    return values.detach().float().reshape(len(values), -1)
