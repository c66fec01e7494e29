"""Why a policy is what it is: what each of its choices saves, what it costs, and what the next best would have given.

Milliseconds are predicted by taking one choice back in the network that was chosen; losses are those of the choice on
its own (`sensitivity`). Both say what steered the search, not what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from autocompress.policy import CompressionPolicy
from autocompress.search.fitting import severity
from autocompress.search.space import Choice, SearchSpace


@dataclass(frozen=True)
class Reason:
    """One choice of a policy.

    Attributes:
        parameter: Its name, as ``prune/layer1.0.conv1``.
        choice: What was chosen.
        saved_ms: What it saves, predicted; None where nothing could be predicted.
        loss: What it loses on its own, in nats; None where that was not measured.
        next_choice: The next milder choice.
        next_ms: By how much slower the network would be with that one, predicted; below 0 for faster.
        next_loss: What that one loses on its own.
    """

    parameter: str
    choice: Choice
    saved_ms: float | None
    loss: float | None
    next_choice: Choice
    next_ms: float | None
    next_loss: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def explain(
    choices: Mapping[str, Choice],
    space: SearchSpace,
    latency_ms: Callable[[CompressionPolicy], float] | None,
    losses: Mapping[str, Mapping[Choice, float]] | None,
) -> list[Reason]:
    """Return a reason for every choice that does something, the one that saves most first.

    Choices inside removed blocks do nothing.

    Args:
        choices: Of the policy.
        space: What could have been chosen.
        latency_ms: Predicts a network's latency; None where nothing is known.
        losses: Of single choices; None where they were not measured.
    """
    policy = space.policy(choices)
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
        found.append(Reason(name, choice, saved, row.get(choice), milder, other, row.get(milder)))
    return sorted(found, key=lambda reason: -(reason.saved_ms or 0.0))
