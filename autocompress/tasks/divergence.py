"""How far a network's outputs have moved: one measure per kind of output, found from the task and its network.

`Task.divergence` is the one yardstick of everything that steers: sensitivity, order of blocks, reconstruction,
distillation, label-free losses. A kind is a `Divergence`; `KINDS` maps the names that `Task.outputs` may hold to how a
kind is made of what the uncompressed network gives.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from autocompress.errors import ConfigError, nearest

# Probabilities below this count as this: a class that a network rules out must not make the divergence infinite.
_LEAST_PROBABILITY = 1e-6
# Natural logarithm of a probability, at least; scores of minus infinity mask classes out.
_LEAST_LOG = -100.0
# Outputs add up to 1, or have one length, within this.
_ALIKE = 1e-2
# Targets that by custom count for nothing.
_IGNORED = (-100, 255)
# Width from which rows of one length are taken for embeddings; by chance, a few numbers may have it.
_LEAST_WIDTH = 8
# Standard deviation of the logarithms of variances from which scales differ clearly.
_APART = 0.5
# A column whose variance is below this share of its mean square is constant.
_CONSTANT = 1e-6


class Divergence(abc.ABC):
    """How far outputs are from a reference of the same shape: 0 for equal ones, lower is closer.

    Attributes:
        name: For the sentence "steered by ...".
        softens: Whether a temperature means something: scores of which a softmax is taken.
    """

    name: str
    softens: bool = False

    def __call__(self, outputs: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
        """Return the divergence, a scalar at least 0 that can be differentiated, computed in float32 or float64.

        Args:
            outputs: ``(N, ...)``.
            reference: What they are compared with ``(N, ...)``; of the uncompressed network.
            temperature: Divides class scores, and its square multiplies the result; other kinds ignore it.

        Raises:
            ConfigError: The two differ in size.
        """
        if outputs.shape != reference.shape:
            if outputs.numel() != reference.numel():
                raise ConfigError(
                    f"Outputs {tuple(outputs.shape)} cannot be compared with {tuple(reference.shape)}: a compressed "
                    "network must give what the uncompressed one gives."
                )
            outputs = outputs.reshape(reference.shape)
        return self._of(_wide(outputs), _wide(reference).to(outputs.device), temperature).clamp_min(0)

    @abc.abstractmethod
    def _of(self, outputs: Tensor, reference: Tensor, temperature: float) -> Tensor:
        """Return the divergence of tensors of the same shape in full precision."""


@dataclass(frozen=True)
class ClassScores(Divergence):
    """KL divergence of the class probabilities, mean over samples and positions.

    Attributes:
        axis: Of the classes.
        probabilities: Whether the outputs are probabilities already, not scores before a softmax.
    """

    axis: int = 1
    probabilities: bool = False
    name: str = "KL divergence of class scores"
    softens: bool = True

    def _of(self, outputs: Tensor, reference: Tensor, temperature: float) -> Tensor:
        own, wanted = (self._log_probabilities(scores, temperature) for scores in (outputs, reference))
        return temperature**2 * (wanted.exp() * (wanted - own)).sum(self.axis).mean()

    def _log_probabilities(self, scores: Tensor, temperature: float) -> Tensor:
        if self.probabilities:
            scores = scores.clamp_min(_LEAST_PROBABILITY).log()
        return F.log_softmax(scores / temperature, self.axis).clamp_min(_LEAST_LOG)


@dataclass(frozen=True)
class LabelScores(Divergence):
    """Bernoulli KL divergence, mean over labels (and samples): every output is a yes or no of its own.

    Attributes:
        probabilities: Whether the outputs are probabilities already, not scores before a sigmoid.
    """

    probabilities: bool = False
    name: str = "Bernoulli KL divergence of label scores"

    def _of(self, outputs: Tensor, reference: Tensor, temperature: float) -> Tensor:
        own, wanted = self._logs(outputs), self._logs(reference)
        return sum((t.exp() * (t - s) for s, t in zip(own, wanted, strict=True)), outputs.new_zeros(())).mean()

    def _logs(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithms of the probabilities of yes and of no."""
        if self.probabilities:
            yes = scores.clamp(_LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)
            return yes.log(), (1 - yes).log()
        return F.logsigmoid(scores).clamp_min(_LEAST_LOG), F.logsigmoid(-scores).clamp_min(_LEAST_LOG)


@dataclass(frozen=True)
class Embedding(Divergence):
    """Cosine distance of the vectors plus their squared error over the reference's mean square.

    Attributes:
        axis: Of a vector's numbers.
    """

    axis: int = 1
    name: str = "cosine distance and relative error of embeddings"

    def _of(self, outputs: Tensor, reference: Tensor, temperature: float) -> Tensor:
        # Half the squared distance of unit vectors is 1 - cosine, and 0 where both are zero.
        own, wanted = (F.normalize(vectors, dim=self.axis) for vectors in (outputs, reference))
        cosine = (own - wanted).square().sum(self.axis).mean() / 2
        scale = reference.square().mean().clamp_min(torch.finfo(reference.dtype).tiny)
        return cosine + (outputs - reference).square().mean() / scale


@dataclass(frozen=True)
class Regression(Divergence):
    """Squared error over the reference's variance, each column on its own scale: the mean of 1 - R2.

    Attributes:
        axis: Of the columns; None for outputs ``(N,)``.
        variances: Of each column, over samples (and positions) of the uncompressed network; None takes the batch's.
    """

    axis: int | None = 1
    variances: Tensor | None = None
    name: str = "squared error over variance"

    def _of(self, outputs: Tensor, reference: Tensor, temperature: float) -> Tensor:
        error = _columns(outputs - reference, self.axis).square().mean(0)
        variances = self.variances
        if variances is None or variances.shape != error.shape:
            variances = column_variances(_columns(reference, self.axis))
        return (error / variances.to(error)).mean()


@dataclass(frozen=True)
class Part:
    """One of several outputs that travel as one tensor.

    Attributes:
        name: The model's own.
        shape: Of one sample.
        divergence: Of this output alone.
    """

    name: str
    shape: tuple[int, ...]
    divergence: Divergence


class Several(Divergence):
    """Mean over a network's outputs of each one's own divergence.

    Args:
        parts: In the order in which their numbers lie in outputs ``(N, total)``.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.softens = any(part.divergence.softens for part in parts)
        self.name = "; ".join(f"{part.divergence.name} of `{part.name}`" for part in parts)

    def _of(self, outputs: Tensor, reference: Tensor, temperature: float) -> Tensor:
        sizes = [math.prod(part.shape) for part in self.parts]
        pieces = zip(self.parts, torch.split(outputs, sizes, 1), torch.split(reference, sizes, 1), strict=True)
        found = [
            part.divergence(own.reshape(-1, *part.shape), wanted.reshape(-1, *part.shape), temperature)
            for part, own, wanted in pieces
        ]
        return torch.stack(found).mean()


# -- which kind it is -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What tells the kind of an output.

    Attributes:
        outputs: Of the uncompressed network ``(N, ...)``, in full precision.
        targets: Labels of other samples ``(M, ...)``, or None where there are none.
    """

    outputs: Tensor
    targets: Tensor | None = None


def _classes(seen: Seen) -> Divergence:
    """Return the kind of outputs said to be class scores, unless they cannot be."""
    outputs = seen.outputs
    if other := _no_classes(seen):
        return other
    if _distributions(outputs):
        return ClassScores(1, probabilities=True)
    if outputs.ndim > 2 and _last_axis_holds_classes(seen):
        return _classes_last(seen)
    if _shares(outputs):
        return _renamed(LabelScores(probabilities=True), "each class has a sigmoid of its own")
    return ClassScores(1)


def _last_axis_holds_classes(seen: Seen) -> bool:
    """Return whether class numbers for every position, or probabilities, tell that the classes are not on axis 1."""
    outputs, targets = seen.outputs, seen.targets
    first, last = tuple(outputs.shape[2:]), tuple(outputs.shape[1:-1])
    numbers = None if targets is None or targets.is_floating_point() else tuple(targets.shape[1:])
    if first != last and numbers in (first, last):
        return numbers == last
    return _distributions(outputs, outputs.ndim - 1)


def _no_classes(seen: Seen) -> Divergence | None:
    """Return the kind of outputs that their width or the targets forbid to be class scores; None where they may be."""
    outputs, targets = seen.outputs, seen.targets
    if outputs.ndim < 2 or outputs.shape[1] == 1:
        return _renamed(_values(seen), "one column cannot be class scores")
    if targets is None or not _one_each(seen) or _distributions(targets):
        return None
    if _binary(targets):
        return _renamed(_labels(seen), "each output has a yes or no of its own")
    return _renamed(_values(seen), "the targets are no classes") if targets.is_floating_point() else None


def _classes_last(seen: Seen) -> Divergence:
    axis = seen.outputs.ndim - 1
    return ClassScores(axis, probabilities=_distributions(seen.outputs, axis))


def _labels(seen: Seen) -> Divergence:
    return LabelScores(probabilities=_shares(seen.outputs))


def _embedding(seen: Seen) -> Divergence:
    return Embedding(_vector_axis(seen.outputs))


def _regression(seen: Seen) -> Divergence:
    outputs, last = seen.outputs, seen.outputs.ndim - 1
    if last == 0:
        return Regression(None, column_variances(_columns(outputs, None)))
    found = {axis: column_variances(_columns(outputs, axis)) for axis in {1, last}}
    spread = {axis: float(variances.log().std(correction=0)) for axis, variances in found.items()}
    # Columns are along the last axis, as of a detector's anchors, where scales clearly differ there and not on axis 1.
    axis = last if spread[last] > 2 * spread[1] + _APART else 1
    return Regression(axis, found[axis])


def _values(seen: Seen) -> Divergence:
    """Return the kind of outputs that are said to be no class scores, by what they look like."""
    outputs, targets = seen.outputs, seen.targets
    if targets is not None and _one_each(seen) and _binary(targets):
        return _labels(seen)
    if outputs.ndim > 1 and _distributions(outputs):
        return ClassScores(1, probabilities=True)
    if outputs.ndim > 1 and _unit_length(outputs):
        return _embedding(seen)
    return _regression(seen)


# What `Task.outputs` may say, to how its divergence is found.
KINDS: Mapping[str, Callable[[Seen], Divergence]] = {
    "classes": _classes,
    "classes_last": _classes_last,
    "labels": _labels,
    "embedding": _embedding,
    "values": _values,
    "regression": _regression,
}


def check_kind(kind: str, where: str = "Task.outputs") -> str:
    """Return `kind` if it is one of `KINDS`.

    Raises:
        ConfigError: It is not.
    """
    if kind not in KINDS:
        raise ConfigError(f"{where} is {kind!r}; it must be one of {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    return kind


def divergence_of(
    outputs: Tensor,
    kind: str | Mapping[str, str],
    targets: Tensor | None = None,
    layout: Sequence[tuple[str, tuple[int, ...]]] = (),
) -> Divergence:
    """Return how outputs like these are compared.

    Args:
        outputs: Of the uncompressed network ``(N, ...)``, the more the better.
        kind: One of `KINDS`, or for several outputs the kind of each by its name; a name left out is ``"values"``.
        targets: Labels ``(M, ...)``; None where there are none.
        layout: Name and shape of one sample of every output that `outputs` holds; empty for a single one.

    Raises:
        ConfigError: There is no such kind, or no output of such a name.
    """
    outputs = _wide(outputs.detach())
    finite = outputs.flatten(1).isfinite().all(1) if outputs.ndim > 1 else outputs.isfinite()
    outputs = outputs[finite] if bool(finite.any()) else outputs.nan_to_num(0, 0, 0)
    if isinstance(kind, str) and len(layout) < 2:
        found = KINDS[check_kind(kind)](Seen(outputs, targets if targets is not None and len(targets) else None))
        return replace(found, name=f"{found.name} of `{layout[0][0]}`") if layout and layout[0][0] else found  # type: ignore[type-var]
    kinds = kind if isinstance(kind, Mapping) else {}
    names = [name for name, _ in layout]
    for name in kinds:
        if name not in names:
            known = ", ".join(filter(None, names)) or "one without a name (autocompress.tasks.Adapter names them)"
            raise ConfigError(f"Task.outputs names output {name!r}; the model has {known}.{nearest(name, names)}")
    parts, begin = [], 0
    for name, shape in layout:
        end = begin + math.prod(shape)
        own = outputs.reshape(len(outputs), -1)[:, begin:end].reshape(-1, *shape)
        # "classes" for several outputs means each that can be: one with a score for boxes cannot say more.
        known = check_kind(kinds.get(name, "values"), f"Task.outputs[{name!r}]")
        parts.append(Part(name, shape, KINDS[known](Seen(own))))
        begin = end
    return Several(parts)


def column_variances(columns: Tensor) -> Tensor:
    """Return what squared errors of each column of ``(rows, columns)`` are divided by, all above 0.

    The variance; of a column that hardly varies its mean square, of one that is always zero the mean of the others.
    """
    square, variance = columns.square().mean(0), columns.var(0, correction=0)
    scale = torch.where(variance > _CONSTANT * square, variance, square)
    known = scale[scale > 0]
    usual = known.mean() if len(known) else scale.new_ones(())
    return torch.where(scale > 0, scale, usual)


# -- what outputs look like -------------------------------------------------------------------------------------------


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _columns(values: Tensor, axis: int | None) -> Tensor:
    """Return ``(N, ...)`` as ``(rows, columns)``."""
    if axis is None:
        return values.reshape(-1, 1)
    last = values.movedim(axis, -1)
    return last.reshape(-1, last.shape[-1])


def _vector_axis(outputs: Tensor) -> int:
    """Return the axis of a vector's numbers: the last of tokens ``(N, T, D)``, else that of the channels."""
    return 2 if outputs.ndim == 3 else min(1, outputs.ndim - 1)


def _distributions(values: Tensor, axis: int = 1) -> bool:
    """Return whether values along an axis of ``(N, ...)`` are all at least 0 and add up to 1."""
    if values.ndim <= axis or values.shape[axis] < 2 or bool((values < 0).any()):
        return False
    return bool(((values.double().sum(axis) - 1).abs() < _ALIKE).all())


def _shares(values: Tensor) -> bool:
    """Return whether all values lie between 0 and 1 and differ."""
    low, high = float(values.min()), float(values.max())
    return 0 <= low < high <= 1


def _one_each(seen: Seen) -> bool:
    """Return whether there is one target for every output."""
    return seen.targets is not None and math.prod(seen.targets.shape[1:]) == math.prod(seen.outputs.shape[1:])


def _binary(targets: Tensor) -> bool:
    """Return whether targets are 0 and 1, both of them, but for those that losses ignore."""
    no, yes = targets == 0, targets == 1
    ignored = sum((targets == value for value in _IGNORED), torch.zeros_like(yes))
    return bool(no.any()) and bool(yes.any()) and bool((no | yes | ignored.bool()).all())


def _unit_length(outputs: Tensor) -> bool:
    """Return whether vectors of some width all have one length."""
    axis = _vector_axis(outputs)
    if outputs.shape[axis] < _LEAST_WIDTH:
        return False
    lengths = outputs.norm(dim=axis)
    return bool(lengths.mean() > 0) and bool(((lengths - lengths.mean()).abs() < _ALIKE * lengths.mean()).all())


def _renamed(found: Divergence, reason: str) -> Divergence:
    return replace(found, name=f"{found.name} ({reason})")  # type: ignore[type-var]
