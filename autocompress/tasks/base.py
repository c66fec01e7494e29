"""The `Task` interface: what is compressed and how good it is. A task owns the model, the data and the metric.

It knows nothing of compression or engines. The four data sets are kept apart: *train* fits weights, *calibration*
(a part of train) sets statistics and ranges, *validation* steers the search, *test* is read once, at the end.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from autocompress.errors import ConfigError
from autocompress.tasks.adapters import Adapter
from autocompress.tasks.divergence import Divergence, divergence_of
from autocompress.tasks.plain_model import plain_copy
from autocompress.tasks.tokens import TextTokens

Batch = tuple[Tensor, Tensor]

# Samples that tell what kind of outputs a network gives, and from which variances are taken; in parts.
_SAMPLES, _PART = 64, 8
# Numbers of the outputs of these samples at most.
_MOST_NUMBERS = 2**24


class Task(abc.ABC):
    """A trained model with its data and metric.

    Every iterator may be consumed any number of times and always yields the same samples in the same order, except
    `train_batches`, whose order and augmentation depend on `epoch` alone. Inputs are float tensors ``(N, ...)``,
    exactly as the network takes them (normalised); targets are ``(N, ...)``.

    Attributes:
        name: Short name for tables and folders.
        outputs: What the model gives: one of `autocompress.tasks.divergence.KINDS`, or for the several outputs of an
            `Adapter` a mapping of their names to kinds. ``"classes"``: axis 1 holds class scores. ``"classes_last"``:
            the last axis does. ``"labels"``: each is the score of a yes or no. ``"embedding"``: vectors.
            ``"regression"``: numbers. ``"values"``: no class scores; which of the others, is found.
        metric_name: What `metric` returns, for people.
        metric_is_share: Whether it is a share of samples, written as a percentage; else it is written as a number.
        model_notes: What was done to the user's model, a sentence each: see `plain_model`.
        tokens: How sentences become inputs, of a text model, for a deployed directory; None of any other.
        labelled: Whether targets are labels; else nobody looks at them but `metric` and `loss`.
    """

    name: str
    outputs: str | Mapping[str, str] = "classes"
    metric_name: str = "metric"
    metric_is_share: bool = False
    labelled: bool = True
    model_notes: tuple[str, ...] = ()
    tokens: TextTokens | None = None
    _found_divergence: tuple[object, Divergence] | None = None

    @abc.abstractmethod
    def model(self) -> nn.Module:
        """Return a fresh copy of the trained, uncompressed model in eval mode; the caller owns it."""

    def network(self) -> nn.Module:
        """Return a fresh copy of the model in the one form that everything works on: see `plain_model`.

        Raises:
            ConfigError: Its layers cannot be changed.
        """
        return plain_copy(self.model(), f"Task {self.name!r}")[0]

    @abc.abstractmethod
    def example_inputs(self, batch_size: int = 1) -> Tensor:
        """Return one input batch ``(batch_size, ...)``, real samples, always the same ones."""

    @abc.abstractmethod
    def calibration(self, batch_size: int) -> Iterator[Tensor]:
        """Yield inputs ``(N, ...)`` from the calibration part of the training data, without augmentation."""

    @abc.abstractmethod
    def train_batches(self, batch_size: int, epoch: int) -> Iterator[Batch]:
        """Yield shuffled, augmented training batches of one epoch."""

    @abc.abstractmethod
    def train_size(self) -> int:
        """Return the number of training samples in one epoch."""

    @abc.abstractmethod
    def validation(self, batch_size: int) -> Iterator[Batch]:
        """Yield the validation data in order."""

    @abc.abstractmethod
    def test(self, batch_size: int) -> Iterator[Batch]:
        """Yield the test data in order. Read once per run, after every choice has been made."""

    def test_size(self) -> int | None:
        """Return the number of test samples where that is known without reading them, else None."""
        return None

    @abc.abstractmethod
    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        """Return the quality of `outputs` ``(N, ...)`` for `targets` ``(N, ...)``, in [0, 1]; higher is better."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the scalar training loss on labels; cross-entropy unless a task says otherwise."""
        return nn.functional.cross_entropy(outputs, targets)

    @property
    def has_own_loss(self) -> bool:
        """Whether `loss` is the task's own and not cross-entropy."""
        return type(self).loss is not Task.loss

    @property
    def source(self) -> Task:
        """The task itself, beneath what is wrapped about it."""
        return self

    def divergence(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """Return how far `outputs` have moved from `reference`; everything that steers asks this.

        What fits the kind of the outputs: see `autocompress.tasks.divergence`. A task may have its own.

        Args:
            outputs: Of a compressed network ``(N, ...)``.
            reference: Of the uncompressed one for the same inputs ``(N, ...)``.

        Returns:
            A scalar that can be differentiated, mean over samples, at least 0; 0 for equal outputs.

        Raises:
            ConfigError: `Task.outputs` does not fit what the model gives.
        """
        return self.found_divergence()(outputs, reference)

    def softened_divergence(self, outputs: Tensor, reference: Tensor, temperature: float) -> Tensor:
        """Return `divergence` with class scores divided by a temperature, times its square; other kinds as they are."""
        if self.has_own_divergence:
            return self.divergence(outputs, reference)
        return self.found_divergence()(outputs, reference, temperature)

    @property
    def divergence_name(self) -> str:
        """What `divergence` measures, for the sentence "steered by ..."."""
        if self.has_own_divergence:
            return "the task's own divergence"
        return self.found_divergence().name

    @property
    def has_own_divergence(self) -> bool:
        """Whether `divergence` is the task's own and not what fits its outputs."""
        return type(self).divergence is not Task.divergence

    def found_divergence(self) -> Divergence:
        """Return what fits the kind of the outputs, found once by what the uncompressed model gives for some samples.

        Raises:
            ConfigError: `Task.outputs` does not fit what the model gives.
        """
        kind = self.outputs if isinstance(self.outputs, str) else tuple(self.outputs.items())
        if self._found_divergence is None or self._found_divergence[0] != kind:
            self._found_divergence = kind, self._find_divergence()
        return self._found_divergence[1]

    def _find_divergence(self) -> Divergence:
        model = self.network()
        inputs = next(iter(self.calibration(_SAMPLES)), None)
        inputs = self.example_inputs(_PART) if inputs is None else inputs[:_SAMPLES]
        found: list[Tensor] = []
        with torch.no_grad():
            for part in torch.split(inputs, _PART):
                outputs = model(part)
                if not isinstance(outputs, Tensor):
                    raise ConfigError(
                        f"Task {self.name!r}: the model must return one tensor (N, ...), found "
                        f"{type(outputs).__name__}. Wrap it in autocompress.tasks.Adapter."
                    )
                found.append(outputs)
                if sum(tensor.numel() for tensor in found) > _MOST_NUMBERS:
                    break
            specs = model.output_specs(inputs[:1]) if isinstance(model, Adapter) else ()
        labels = next(iter(self.validation(_SAMPLES)), None) if self.labelled else None
        return divergence_of(
            torch.cat(found), self.outputs, None if labels is None else labels[1], [(s.name, s.shape) for s in specs]
        )

    @abc.abstractmethod
    def fingerprint(self) -> Mapping[str, str | int | float]:
        """Return what identifies model, weights, data and split; a resumed study must have the same."""
