"""Places: where inside two networks their outputs can be compared, and what was seen there.

A place is a module that both have, under one name or two names that the user paired, whose outputs have the same
positions (pixels, tokens) and may differ in channels. Owns the choice of a few of them, made alike for every network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.errors import CompressionError, ConfigError, nearest

# The whole model: its outputs are a place, too.
OUTPUT = ""
# Places chosen where the user names none.
MOST_PLACES = 4

_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
)


@dataclass(frozen=True)
class Place:
    """A pair of modules whose outputs are compared.

    Attributes:
        teacher, student: Their names.
        axis: Of the channels, in outputs ``(N, ...)``.
        teacher_channels, student_channels: Along that axis.
        positions: Sizes of the other axes but the first.
    """

    teacher: str
    student: str
    axis: int
    teacher_channels: int
    student_channels: int
    positions: tuple[int, ...]

    def rows(self, output: Tensor) -> Tensor:
        """Return an output ``(N, ...)`` as ``(N, positions, channels)``, in float."""
        last = output.float().movedim(self.axis, -1)
        return last.reshape(len(last), -1, last.shape[-1])

    def __str__(self) -> str:
        return self.teacher if self.teacher == self.student else f"{self.teacher}:{self.student}"


@dataclass(frozen=True)
class _Seen:
    """What a module gave. `depth` counts the layers with weights that had finished when it did."""

    tensor: Tensor
    version: int
    axis: int
    depth: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(size for axis, size in enumerate(self.shape) if axis not in (0, self.axis))


@contextmanager
def observed(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs ``(N, ...)`` of the modules `names` in the block; nothing stays on the model after it."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            seen[name] = output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in dict.fromkeys(names)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def choose_places(
    teacher: nn.Module, student: nn.Module, inputs: Tensor, pairs: Mapping[str, str] | None = None
) -> tuple[Place, ...]:
    """Return where two networks are compared, in the teacher's order.

    Without `pairs`: modules of the same name in both that run once and give one tensor of the same positions; of these
    the last coarse one at each resolution, the deepest `MOST_PLACES` at most; where there are fewer resolutions, more
    are added as far as possible from those, going by the number of layers passed. Outputs of a single position (after
    global pooling) count only where there are no others.

    Args:
        teacher: The uncompressed model, in eval mode.
        student: In eval mode.
        inputs: Example inputs ``(N, ...)``, at least two.
        pairs: Module of the teacher to module of the student, taken as they are.

    Raises:
        ConfigError: A named module of the teacher does not exist, or does not give one tensor once.
        CompressionError: The same of the student's, or two differ in positions.
    """
    theirs, own = _outputs(teacher, inputs), _outputs(student, inputs)
    if pairs:
        return tuple(_paired(theirs, own, *pair, (teacher, student)) for pair in pairs.items())
    common = {name: place for name in theirs if name in own and (place := _place(theirs, own, name, name)) is not None}
    if any(math.prod(place.positions) > 1 for place in common.values()):
        common = {name: place for name, place in common.items() if math.prod(place.positions) > 1}
    depths = {name: theirs[name].depth for name in common}
    stages: dict[tuple[int, ...], list[str]] = {}
    for name, place in common.items():
        stages.setdefault(place.positions, []).append(name)
    ends = [_end(names, depths) for names in stages.values()]
    # An embedding of patches has a resolution of its own, and nothing behind it yet.
    apart = max(depths.values(), default=0) / (2 * MOST_PLACES)
    chosen = sorted((name for name in ends if depths[name] >= apart), key=lambda name: depths[name])[-MOST_PLACES:]
    while len(chosen) < MOST_PLACES:
        taken = [0, *(depths[name] for name in chosen)]
        # The coarsest of those that are equally far, a block before the layers in it.
        far = {n: (min(abs(depths[n] - t) for t in taken), -n.count("."), i) for i, n in enumerate(common)}
        best = max(far, key=lambda name: far[name], default=None)
        if best is None or far[best][0] == 0:
            break
        chosen.append(best)
    return tuple(place for name, place in common.items() if name in chosen)


def _end(stage: Sequence[str], depths: Mapping[str, int]) -> str:
    """Return the coarsest module in the later half of a stage, the last of several: not a part of the next block."""
    middle = (depths[stage[0]] + depths[stage[-1]]) / 2
    late = [name for name in stage if depths[name] >= middle]
    coarsest = min(name.count(".") for name in late)
    return [name for name in late if name.count(".") == coarsest][-1]


def _outputs(model: nn.Module, inputs: Tensor) -> dict[str, _Seen]:
    """Return what every module gives, in the order they finish; without those that cannot be a place."""
    seen: dict[str, _Seen | None] = {}
    before: tuple[tuple[int, ...], int] = ((), 0)
    depth = 0

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            nonlocal depth, before
            depth += any(p is not None and p.ndim > 1 for p in module._parameters.values())
            once = name not in seen
            whole = isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 1
            if not whole or not once or len(output) != count:
                seen[name] = None
                return
            axis = _channel_axis(module, tuple(output.shape), before)
            seen[name] = None if axis is None else _Seen(output, output._version, axis, depth)
            before = (tuple(output.shape), axis or 0)

        return hook

    count = len(inputs)
    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            final = model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    # What is written over in place is not there any more when losses are computed; the outputs are no inner place.
    return {
        name: found
        for name, found in seen.items()
        if found is not None and found.tensor._version == found.version and found.tensor is not final
    }


def _channel_axis(module: nn.Module, shape: tuple[int, ...], before: tuple[tuple[int, ...], int]) -> int | None:
    """Return the channel axis of a module's output, going by the width of the last layer in it.

    Where that does not tell, it is that of the output `before` if either the channels or all other sizes are as there
    (activation functions, pooling; branches put together); else nobody knows.
    """
    last = len(shape) - 1
    layers = [m for m in module.modules() if isinstance(getattr(m, "weight", None), Tensor)]
    if layers:
        weight: Any = layers[-1].weight
        width = weight.shape[-1] if isinstance(layers[-1], nn.Embedding) else len(weight)
        own = 1 if isinstance(layers[-1], _CHANNELS_FIRST) else last
        for axis in (own, 1, last):
            if shape[axis] == width:
                return axis
    old, axis = before
    if not axis or len(old) != len(shape):
        return None
    others = all(a == b for i, (a, b) in enumerate(zip(old, shape, strict=True)) if i != axis)
    return axis if others or old[axis] == shape[axis] else None


def _place(theirs: Mapping[str, _Seen], own: Mapping[str, _Seen], teacher: str, student: str) -> Place | None:
    """Return the pair as a place, or None where the positions differ."""
    found, mine = theirs[teacher], own[student]
    if len(found.shape) != len(mine.shape):
        return None
    # A pruned width may mislead the search for the student's axis, never the teacher's.
    mine = replace(mine, axis=found.axis)
    if found.positions != mine.positions:
        return None
    return Place(teacher, student, found.axis, found.shape[found.axis], mine.shape[found.axis], found.positions)


def _paired(
    theirs: Mapping[str, _Seen], own: Mapping[str, _Seen], teacher: str, student: str, models: tuple[nn.Module, ...]
) -> Place:
    # What compressing has taken from a student spoils one candidate; what the teacher never had is a mistake.
    for who, name, outputs, model, kind in (
        ("teacher", teacher, theirs, models[0], ConfigError),
        ("student", student, own, models[1], CompressionError),
    ):
        if name not in dict(model.named_modules()):
            raise kind(f"recovery.distill_at: the {who} has no module {name!r}.{_near(name, outputs)}")
        if name not in outputs:
            raise kind(
                f"recovery.distill_at: module {name!r} of the {who} cannot be compared: it must run once, give one "
                f"tensor (N, ...) that is not overwritten in place, and not be the output.{_near(name, outputs)}"
            )
    place = _place(theirs, own, teacher, student)
    if place is None:
        raise CompressionError(
            f"recovery.distill_at: module {teacher!r} of the teacher gives {theirs[teacher].shape} and {student!r} of "
            f"the student {own[student].shape}; all but the channels must be equal. Choose another pair."
        )
    return place


def _near(name: str, outputs: Mapping[str, _Seen]) -> str:
    """Return a hint with the modules that could be taken, the coarse ones where there are many."""
    coarse = [known for known in outputs if known.count(".") <= name.count(".")]
    return nearest(name, coarse or outputs)
