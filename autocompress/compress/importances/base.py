"""`Importance`: one way to score channels, and what it may look at."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from autocompress.errors import CompressionError
from autocompress.model.inventory import Inventory


def _nothing(batch_size: int = 0) -> Iterable[Any]:
    return ()


@dataclass(frozen=True)
class Evidence:
    """What data say of a model. Made lazily: an importance pays only for what it reads.

    Attributes:
        losses: Number of samples in a batch, 128 at most, to scalar losses of the model over such training batches.
        outputs: Runs the model over calibration inputs, one batch for every step of the iterator; the same ones each
            time it is called.
    """

    losses: Callable[[int], Iterable[Tensor]] = _nothing
    outputs: Callable[[], Iterable[object]] = _nothing


@dataclass(frozen=True)
class Subject:
    """A model whose channels are to be scored.

    Attributes:
        method: Name of the importance, for messages.
        model: What `evidence` runs; not to be changed.
        copy: A copy, whose weights and gradients may be.
        inventory: Of this model.
        graph: Torch-Pruning's dependency graph of `copy`.
        groups: Group name to Torch-Pruning's group of all its channels, in `copy`.
        evidence: Of `model`.
        notes: Group name to what was done instead where the method says nothing of a group.
    """

    method: str
    model: nn.Module
    copy: nn.Module
    inventory: Inventory
    graph: Any
    groups: Mapping[str, Any]
    evidence: Evidence
    notes: dict[str, str] = field(default_factory=dict)

    def gradients(self, of: Callable[[Tensor], Tensor], *, batch_size: int, batches: int) -> dict[str, Tensor]:
        """Return parameter name to the mean of `of(gradient)` over training batches; leaves no gradient in `model`.

        Raises:
            CompressionError: There are no training batches, a weight of a group gets no gradient, or a loss is not
                finite.
        """
        needed = [f"{n}.weight" for g in self.inventory.groups.values() for n in (*g.producers, *g.consumers)]
        sums: dict[str, Tensor] = {}
        count = 0
        self.model.zero_grad(set_to_none=True)
        try:
            for loss in itertools.islice(self.evidence.losses(batch_size), batches):
                if not torch.isfinite(loss):
                    raise CompressionError(
                        f"Importance {self.method!r}: the loss of training batch {count} is {loss.item()}. Check the "
                        "model and the training data."
                    )
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
                count += 1
                for name, parameter in self.model.named_parameters():
                    if parameter.grad is not None:
                        found = of(parameter.grad)
                        sums[name] = sums[name] + found if name in sums else found
                self.model.zero_grad(set_to_none=True)
        finally:
            self.model.zero_grad(set_to_none=True)
        for name in needed:
            if name not in sums:
                raise CompressionError(
                    f"Importance {self.method!r} needs the gradient of {name.removesuffix('.weight')!r}, which the "
                    "losses do not give: there were no training batches, or its weight is frozen. Use 'magnitude'."
                )
        return {name: total / count for name, total in sums.items()}


class Importance(abc.ABC):
    """One way to score channels. Higher is more worth keeping.

    Attributes:
        compares: Whether raw scores compare between groups. Where they do not, those of every group are divided by
            their mean before groups are compared.
    """

    compares: ClassVar[bool] = False

    @abc.abstractmethod
    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """Return group name to the score of each of its channels ``(C,)``.

        Raises:
            CompressionError: The model or the evidence lacks what is needed; says what.
        """


def each_group(
    subject: Subject, rule: Callable[[Any], Tensor], gradients: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return what a rule of Torch-Pruning's says of every group, with these gradients of the parameters by name."""
    if gradients is not None:
        for name, parameter in subject.copy.named_parameters():
            parameter.grad = gradients.get(name)
    return {name: rule(group).detach().float() for name, group in subject.groups.items()}


def relative(scores: Tensor) -> Tensor:
    """Return scores ``(C,)`` divided by their mean; zeros where all are zero."""
    return scores / scores.mean().clamp_min(torch.finfo(torch.float32).tiny)
