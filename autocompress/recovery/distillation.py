"""Knowledge distillation from the uncompressed model: the teacher, and the losses of `distillations` put together.

The teacher's answers are kept, since `Task.train_batches` repeats exactly for the same epoch number: every candidate
that trains on the same epochs shares them.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autocompress.compress.layout import in_fast_layout
from autocompress.config import RecoveryConfig
from autocompress.errors import CompressionError, ConfigError, nearest
from autocompress.recovery import distillations
from autocompress.recovery.distillation_points import OUTPUT, Place, choose_places, observed
from autocompress.recovery.distillations.base import Distillation
from autocompress.recovery.recalibration import batch_norms
from autocompress.tasks.base import Task
from autocompress.tasks.repeats import checksum

__all__ = ["DISTILLATIONS", "Distiller", "Teacher", "check_distillation", "taught_by"]

# Answers of the teacher kept in memory at most; beyond it they are computed again.
_CACHE_BYTES = 512 * 2**20
# Samples on which projections begin.
_EXAMPLES = 32


def _found() -> Iterator[tuple[str, type[Distillation]]]:
    for info in pkgutil.iter_modules(distillations.__path__, f"{distillations.__name__}."):
        yield from getattr(import_module(info.name), "DISTILLATIONS", {}).items()


# Name of a method to its class.
DISTILLATIONS: Mapping[str, type[Distillation]] = dict(_found())


def check_distillation(config: RecoveryConfig) -> None:
    """Check the names of the methods in ``recovery.distill``.

    Raises:
        ConfigError: One is no key of `DISTILLATIONS`.
    """
    for name in config.distill:
        if name not in DISTILLATIONS:
            raise ConfigError(f"recovery.distill: unknown method {name!r}.{nearest(name, DISTILLATIONS)}")


class Question(NamedTuple):
    """What is asked of a teacher: the method that asks, and the module of the teacher, `OUTPUT` for the whole."""

    method: str
    module: str


_OUTPUTS = Question("logits", OUTPUT)


class Teacher:
    """The uncompressed model, remembering its answers for every augmented batch it has seen.

    Args:
        model: The uncompressed model; owned by the teacher from here on.
        dtype: What its forward passes run in under autocast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model = model.eval().requires_grad_(False)
        self._dtype, self._laid_out = dtype, False
        self._kept: dict[Question, dict[tuple[int, ...], Tensor]] = {}
        self._bytes = self._batch_size = 0

    def batches_of(self, size: int) -> None:
        """Set how many samples a batch has; answers for batches of another size are dropped."""
        if size != self._batch_size:
            self._kept.clear()
            self._bytes, self._batch_size = 0, size

    def outputs(self, inputs: Tensor, epoch: int, index: int) -> Tensor:
        """Return outputs ``(N, ...)`` for batch `index` of augmented epoch `epoch`."""
        return self.answers(inputs, (epoch, index), {_OUTPUTS: Tensor.float})[_OUTPUTS]

    def answers(
        self,
        inputs: Tensor,
        key: tuple[int, ...] | None,
        questions: Mapping[Question, Callable[[Tensor], Tensor]],
    ) -> dict[Question, Tensor]:
        """Return what each question makes of a module's output ``(N, ...)`` for a batch, kept as `outputs` are.

        What nobody asks for any more is dropped, but for the outputs. Without a `key` (epoch, index, and what tells
        its samples from others) nothing is kept: the batch will not be seen again.
        """
        for question in [q for q in self._kept if key is not None and q not in questions and q != _OUTPUTS]:
            self._bytes -= sum(answer.nbytes for answer in self._kept.pop(question).values())
        found = {} if key is None else {q: self._kept[q][key] for q in questions if key in self._kept.get(q, {})}
        missing = [question for question in questions if question not in found]
        if not missing:
            return found
        inner = [question.module for question in missing if question.module != OUTPUT]
        if not self._laid_out:
            in_fast_layout(self.model, inputs[:2])
            self._laid_out = True
        fast = torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32)
        with torch.no_grad(), fast, observed(self.model, inner) as seen:
            seen[OUTPUT] = self.model(inputs)
        for question in missing:
            with torch.no_grad():
                answer = questions[question](seen[question.module])
            if key is not None and self._bytes + answer.nbytes <= _CACHE_BYTES:
                self._kept.setdefault(question, {})[key] = answer
                self._bytes += answer.nbytes
            found[question] = answer
        return found


@contextmanager
def _training_statistics(model: nn.Module) -> Iterator[None]:
    """Have batch-norms normalise by the batch in the block, as in training, and learn nothing from it.

    An untrained student's running statistics are not those of its features.
    """
    norms = batch_norms(model)
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
            norm.eval()


class Distiller:
    """What a teacher says to one student: the losses of ``recovery.distill``, weighted and added up.

    Args:
        teacher: The uncompressed model.
        student: The model to train; not changed, and left in eval mode.
        task: Gives the inputs on which places are chosen and projections begin.
        config: Methods, weights, places, temperature.

    Raises:
        ConfigError: An unknown method, or a place that the teacher does not have.
        CompressionError: The student does not have it, or the two have none in common that a method can use.
    """

    def __init__(self, teacher: Teacher, student: nn.Module, task: Task, config: RecoveryConfig) -> None:
        check_distillation(config)
        self._teacher = teacher
        student.eval()
        places: tuple[Place, ...] = ()
        if any(DISTILLATIONS[name].intermediate for name in config.distill):
            places = choose_places(teacher.model, student, task.example_inputs(2), config.distill_at)
        self._methods: dict[str, Distillation] = {}
        self._weights: dict[str, float] = {}
        for name, weight in config.distill.items():
            kind = DISTILLATIONS[name]
            own = [p for p in places if kind.suits(p)] if kind.intermediate else [Place(OUTPUT, OUTPUT, 1, 0, 0, ())]
            if not own:
                raise CompressionError(
                    f"Distillation by {name!r} needs a module of the same name in teacher and student whose outputs "
                    "have the same positions (pixels or tokens; for attention more than one), and there is none. Name "
                    "pairs in recovery.distill_at, or leave it out of recovery.distill."
                )
            self._methods[name] = kind(config, own, task.softened_divergence)
            self._weights[name] = kind.weight if weight is None else weight
        self.places = places
        if places:
            self._start(student, task.example_inputs(_EXAMPLES))

    def _start(self, student: nn.Module, inputs: Tensor) -> None:
        model = self._teacher.model
        with (
            torch.no_grad(),
            _training_statistics(student),
            observed(model, [p.teacher for p in self.places]) as theirs,
            observed(student, [p.student for p in self.places]) as own,
        ):
            model(inputs)
            student(inputs)
        for method in self._methods.values():
            for place in method.places if method.intermediate else ():
                method.start(place, own[place.student], theirs[place.teacher])

    def describe(self) -> str:
        """Return the methods and where they compare: ``"logits; attention at layer1, layer2"``."""
        said = []
        for name, method in self._methods.items():
            said.append(f"{name} at {', '.join(map(str, method.places))}" if method.intermediate else name)
        return "; ".join(said)

    def parameters(self) -> list[nn.Parameter]:
        """Return what the methods learn beside the student."""
        return [parameter for method in self._methods.values() for parameter in method.parameters()]

    @property
    def teacher(self) -> nn.Module:
        """The uncompressed model."""
        return self._teacher.model

    def outputs(self, inputs: Tensor) -> Tensor:
        """Return the teacher's outputs ``(N, ...)``, without keeping them."""
        return self._teacher.answers(inputs, None, {_OUTPUTS: Tensor.float})[_OUTPUTS]

    def targets(self, inputs: Tensor, epoch: int, index: int, *, keep: bool = True) -> dict[tuple[str, Place], Tensor]:
        """Return what the teacher says of batch `index` of augmented epoch `epoch`, by method and place.

        Args:
            inputs: ``(N, ...)``.
            epoch, index: What the answers are kept by.
            keep: Whether they are; else those kept are not looked at.
        """
        pairs = [(name, place) for name, method in self._methods.items() for place in method.places]

        def asked(name: str, place: Place) -> Callable[[Tensor], Tensor]:
            return lambda output: self._methods[name].target(place, output)

        questions = {Question(name, place.teacher): asked(name, place) for name, place in pairs}
        # By the samples too: a task whose epochs do not repeat would be taught the answers to others.
        key = (epoch, index, checksum(inputs[0])) if keep else None
        answers = self._teacher.answers(inputs, key, questions)
        return {(name, place): answers[Question(name, place.teacher)] for name, place in pairs}

    def watching(self, student: nn.Module) -> AbstractContextManager[dict[str, Tensor]]:
        """Collect the student's outputs at the places during the block, for `loss`."""
        return observed(student, [place.student for place in self.places])

    def loss(self, outputs: Tensor, seen: Mapping[str, Tensor], targets: Mapping[tuple[str, Place], Tensor]) -> Tensor:
        """Return the weighted sum over methods of the mean over their places; lower is closer.

        Args:
            outputs: Of the student ``(N, ...)``.
            seen: Its outputs at the places, from `watching`.
            targets: The teacher's, from `targets`.
        """
        total = outputs.new_zeros(())
        for name, method in self._methods.items():
            parts = [
                method.loss(p, seen[p.student] if method.intermediate else outputs, targets[name, p])
                for p in method.places
            ]
            total = total + self._weights[name] * torch.stack(parts).mean()
        return total


def taught_by(teacher: nn.Module, student: nn.Module, task: Task, config: RecoveryConfig) -> str:
    """Return what a student would learn from, in words, and so find out before any training whether it can.

    Args:
        teacher: Owned by the callee from here on.
        student: Not changed, and left in eval mode.
        task: Gives the inputs.
        config: Methods, weights, places.

    Raises:
        ConfigError: An unknown method, or places that the two do not have or no method can use.
    """
    try:
        return Distiller(Teacher(teacher, torch.float32), student, task, config).describe()
    except CompressionError as error:
        raise ConfigError(str(error)) from error
