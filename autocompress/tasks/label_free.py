"""Quality without labels: how far the compressed model's outputs agree with those of the uncompressed one.

``agreement`` takes what fits the model: ``top1`` where it gives class scores, ``r2`` where it gives one number (whose
cosine with another is its sign), else ``cosine``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.errors import ConfigError
from autocompress.tasks.base import Batch, Task
from autocompress.tasks.divergence import ClassScores, Divergence, check_kind, divergence_of
from autocompress.tasks.split import Data, SplitTask

# Name to what it measures, each in [0, 1] and 1 for equal outputs.
METRICS = {
    "agreement": "top1 for class scores, r2 for a single number, else cosine",
    "top1": "share of samples (pixels, in segmentation) that get the same class",
    "cosine": "mean cosine similarity of a sample's outputs, at least 0",
    "kl": "exp(-KL divergence) of the class probabilities, mean over samples",
    "r2": "1 - squared difference over variance of the uncompressed model's outputs, at least 0",
}


class LabelFreeTask(Task):
    """A task whose targets are what its own uncompressed model gives. Labels are not looked at.

    Args:
        task: Model and data.
        metric: One of `METRICS`.
    """

    labelled = False

    def __init__(self, task: Task, metric: str = "agreement") -> None:
        if metric not in METRICS:
            raise ConfigError(f"Unknown metric {metric!r}; without labels there are {', '.join(METRICS)}.")
        self._task = task
        self._teacher = task.network().requires_grad_(False)
        self.name, self.outputs, self.tokens = task.name, task.outputs, task.tokens
        self.kind = self._fitting() if metric == "agreement" else metric
        self.metric_name, self.metric_is_share = self.kind, self.kind == "top1"

    @property
    def source(self) -> Task:
        """See `Task.source`."""
        return self._task.source

    def model(self) -> nn.Module:
        """See `Task.model`."""
        return self._task.model()

    def example_inputs(self, batch_size: int = 1) -> Tensor:
        """See `Task.example_inputs`."""
        return self._task.example_inputs(batch_size)

    def calibration(self, batch_size: int) -> Iterator[Tensor]:
        """See `Task.calibration`."""
        return self._task.calibration(batch_size)

    def train_batches(self, batch_size: int, epoch: int) -> Iterator[Batch]:
        """Yield training inputs with what the uncompressed model makes of them."""
        return self._answered(self._task.train_batches(batch_size, epoch))

    def train_size(self) -> int:
        """See `Task.train_size`."""
        return self._task.train_size()

    def test_size(self) -> int | None:
        """See `Task.test_size`."""
        return self._task.test_size()

    def validation(self, batch_size: int) -> Iterator[Batch]:
        """Yield validation inputs with what the uncompressed model makes of them."""
        return self._answered(self._task.validation(batch_size))

    def test(self, batch_size: int) -> Iterator[Batch]:
        """Yield test inputs with what the uncompressed model makes of them."""
        return self._answered(self._task.test(batch_size))

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        """Return the agreement of `outputs` ``(N, ...)`` with `targets`; see `METRICS`."""
        if self.kind == "top1":
            return float((outputs.argmax(1) == targets).double().mean())
        if self.kind == "cosine":
            return max(0.0, float(_cosine(outputs.double(), targets.double())))
        if self.kind == "r2":
            return max(0.0, 1 - float(self._r2(outputs.double(), targets.double())))
        found = self.found_divergence()
        scores = found if isinstance(found, ClassScores) else ClassScores()
        return float(torch.exp(-scores(outputs.double(), targets.double())))

    def divergence(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """See `Task.divergence`."""
        if self._task.has_own_divergence:
            return self._task.divergence(outputs, reference)
        return self.found_divergence()(outputs, reference)

    @property
    def has_own_divergence(self) -> bool:
        """See `Task.has_own_divergence`."""
        return self._task.has_own_divergence

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return how far `outputs` are from the uncompressed model's; lower is closer."""
        return F.cross_entropy(outputs, targets) if self.kind == "top1" else self.divergence(outputs, targets)

    @property
    def data_notes(self) -> tuple[str, ...]:
        """See `SplitTask`."""
        return getattr(self._task, "data_notes", ())

    def fingerprint(self) -> Mapping[str, str | int | float]:
        """See `Task.fingerprint`."""
        return {**self._task.fingerprint(), "metric": self.kind}

    def _fitting(self) -> str:
        """Return the metric that fits what the model gives."""
        with torch.no_grad():
            outputs = self._teacher(self._task.example_inputs(2))
        if outputs[0].numel() == 1:
            return "r2"
        return "top1" if self.outputs == "classes" and outputs.ndim > 1 and outputs.shape[1] > 1 else "cosine"

    @cached_property
    def _r2(self) -> Divergence:
        """Squared error over variance, whatever the divergence is."""
        with torch.no_grad():
            inputs = next(iter(self.calibration(_ROWS)))
            return divergence_of(self._teacher(inputs), "regression")

    def _answered(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for inputs, _ in batches:
            with torch.no_grad():
                outputs = torch.cat([self._teacher(part) for part in torch.split(inputs, _ROWS)])
            yield inputs, outputs.argmax(1) if self.kind == "top1" else outputs


# Samples of one forward pass of the teacher; a task's batches may be as large as its data.
_ROWS = 64


def _cosine(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cosine_similarity(outputs.reshape(len(outputs), -1), targets.reshape(len(targets), -1)).mean()


class UnlabelledTask(SplitTask):
    """A model of any kind with inputs alone. Measured by `LabelFreeTask`, which makes the targets.

    Args:
        model: Trained network, one tensor ``(N, ...)`` to one tensor ``(N, ...)``; see `adapters` for others.
        train: Training inputs: a tensor ``(N, ...)``, anything that `SplitTask` takes with a tensor or a dict of inputs
            for a sample, or labelled data whose labels are not looked at.
        test: Test inputs.
        name: Short name for tables and folders.
        outputs: See `Task`.
        options: Those of `SplitTask`.
    """

    labelled = False

    def __init__(
        self,
        model: nn.Module,
        train: Tensor | Data,
        test: Tensor | Data,
        validation: Tensor | Data | None = None,
        *,
        name: str = "unlabelled",
        outputs: str | Mapping[str, str] = "values",
        **options: Any,
    ) -> None:
        for kind in (outputs,) if isinstance(outputs, str) else outputs.values():
            check_kind(kind, "outputs")
        self.outputs = outputs
        held = None if validation is None else _labelled(validation)
        super().__init__(model, _labelled(train), _labelled(test), held, name=name, **options)

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        """Refuse: there is nothing to compare with.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"Task {self.name!r} has no labels to measure by. Give --metric agreement (task.metric), or in Python wrap "
            "it: LabelFreeTask(task)."
        )

    def _check_outputs(self, outputs: object) -> None:
        if not isinstance(outputs, Tensor) or outputs.ndim < 1:
            found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ConfigError(
                f"Task {self.name!r}: the model must return one tensor (N, ...), found {found}. "
                "Wrap it in autocompress.tasks.Adapter."
            )


def _labelled(inputs: Tensor | Data) -> Data:
    if isinstance(inputs, (Tensor, np.ndarray)):
        return inputs, torch.zeros(len(inputs), dtype=torch.int64)
    return inputs
