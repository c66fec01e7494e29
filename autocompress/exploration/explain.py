"""Why a policy is what it is: what each of its choices saves, what it costs, and what the next best would have given.

Milliseconds are predicted by taking one choice back in the network that was chosen; losses are those of the choice on
its own (`sensitivity`). Both say what steered the search, not what was measured. Arithmetic and bytes of weights are
counted, so that there is a reason without any prediction of latency too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from autocompress.graph.layout import Layout
from autocompress.policy import CompressionPolicy
from autocompress.space.search_space import Choice, SearchSpace
from autocompress.space.severity import severity


@dataclass(frozen=True)
class Reason:
    """One choice of a policy.

    Attributes:
        parameter: Its name, as ``prune/layer1.0.conv1``.
        choice: What was chosen.
        saved_ms: What it saves, predicted; None where nothing could be predicted.
        loss: How far it moves the outputs on its own, by the task's divergence; None where that was not measured.
        next_choice: The next milder choice.
        next_ms: By how much slower the network would be with that one, predicted; below 0 for faster.
        next_loss: What that one loses on its own.
        saved_macs, saved_bytes: Share of the uncompressed network's multiply-accumulates, and of its weights' bytes,
            that the choice saves; None where the network's structure could not be read.
    """

    parameter: str
    choice: Choice
    saved_ms: float | None
    loss: float | None
    next_choice: Choice
    next_ms: float | None
    next_loss: float | None
    saved_macs: float | None = None
    saved_bytes: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def explain(
    choices: Mapping[str, Choice],
    space: SearchSpace,
    latency_ms: Callable[[CompressionPolicy], float] | None,
    losses: Mapping[str, Mapping[Choice, float]] | None,
    layout: Layout | None = None,
) -> list[Reason]:
    """Return a reason for every choice that does something, the one that saves most first.

    What saves most goes by milliseconds where they are predicted, else by arithmetic and bytes.

    Choices inside removed blocks do nothing.

    Args:
        choices: Of the policy.
        space: What could have been chosen.
        latency_ms: Predicts a network's latency; None where nothing is known.
        losses: Of single choices; None where they were not measured.
        layout: The network's structure, for arithmetic and bytes; None where it could not be read.
    """
    policy = space.policy(choices)
    counted = None if layout is None else _Counted(layout, policy)
    now = None if latency_ms is None else latency_ms(policy)
    found = []
    for name, offered in space.parameters.items():
        choice = choices.get(name, offered[0])
        back = space.policy({**choices, name: offered[0]})
        if choice == offered[0] or back == policy:
            continue
        steps = sorted(offered, key=lambda one: severity(name, one))
        milder = steps[max(steps.index(choice) - 1, 0)]
        saved = other = None
        if latency_ms is not None and now is not None:
            saved = latency_ms(back) - now
            other = latency_ms(space.policy({**choices, name: milder})) - now
        row = (losses or {}).get(name, {})
        macs, size = (None, None) if counted is None else counted.saved(back)
        found.append(Reason(name, choice, saved, row.get(choice), milder, other, row.get(milder), macs, size))
    if latency_ms is not None:
        return sorted(found, key=lambda reason: -(reason.saved_ms or 0.0))
    return sorted(found, key=lambda reason: -((reason.saved_macs or 0.0) + (reason.saved_bytes or 0.0)))


class _Counted:
    """Arithmetic and bytes of weights of one policy, against those of others."""

    def __init__(self, layout: Layout, policy: CompressionPolicy) -> None:
        self._layout = layout
        self._dense_bytes = 4 if policy.dense_dtype == "fp32" else 2
        self._whole = self._count(CompressionPolicy(policy.dense_dtype))
        self._now = self._count(policy)

    def saved(self, other: CompressionPolicy) -> tuple[float, float]:
        """Return which share of the uncompressed network's MACs and bytes the policy needs less than `other`."""
        macs, size = (
            (before - now) / whole if whole else 0.0
            for before, now, whole in zip(self._count(other), self._now, self._whole, strict=True)
        )
        return macs, size

    def _count(self, policy: CompressionPolicy) -> tuple[int, int]:
        units = self._layout.units(policy)
        weights = ((sum(ins * outs * area for ins, outs, area, _ in unit.chain), unit.int8) for unit in units)
        size = sum(count * (1 if int8 else self._dense_bytes) for count, int8 in weights)
        return sum(unit.macs for unit in units), size
