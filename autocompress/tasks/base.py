"""The `Task` interface: what is compressed and how good it is. A task owns the model, the data and the metric.

It knows nothing of compression or engines. The four data sets are kept apart: *train* fits weights, *calibration*
(a part of train) sets statistics and ranges, *validation* steers the search, *test* is read once, at the end.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class Task(abc.ABC):
    """A trained model with its data and metric.

    Every iterator may be consumed any number of times and always yields the same samples in the same order, except
    `train_batches`, whose order and augmentation depend on `epoch` alone. Inputs are float tensors ``(N, ...)``,
    exactly as the network takes them (normalised); targets are ``(N, ...)``.

    Attributes:
        name: Short name for tables and folders.
        outputs: ``"classes"`` where axis 1 of the outputs holds class scores, else ``"values"``.
    """

    name: str
    outputs: str = "classes"

    @abc.abstractmethod
    def model(self) -> nn.Module:
        """Return a fresh copy of the trained, uncompressed model in eval mode; the caller owns it."""

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

    @abc.abstractmethod
    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        """Return the quality of `outputs` ``(N, ...)`` for `targets` ``(N, ...)``, in [0, 1]; higher is better."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the scalar training loss on labels; cross-entropy unless a task says otherwise."""
        return nn.functional.cross_entropy(outputs, targets)

    @abc.abstractmethod
    def fingerprint(self) -> Mapping[str, str | int | float]:
        """Return what identifies model, weights, data and split; a resumed study must have the same."""
