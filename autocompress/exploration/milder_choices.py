"""A milder network after one that went too far: inside the limit by more than it had to be, and not accurate enough."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from autocompress.exploration.constraints import Constraints
from autocompress.exploration.latency_limit.local_search import Choices, LocalSearch
from autocompress.policy import CompressionPolicy
from autocompress.runs.records import TrialRecord
from autocompress.space.search_space import Choice, SearchSpace

# Of the limit: a network this far inside it went too far, and where the milder one aims.
_FAR_INSIDE, _AIM = 0.07, 0.97


def milder_choices(
    choices: Mapping[str, Choice], record: TrialRecord, space: SearchSpace, constraints: Constraints,
    cost: Callable[[CompressionPolicy], float], *, spent: float, blocks: Sequence[str] = (),
) -> Choices | None:  # fmt: skip
    """Return choices that use the limit, the harshest taken back first; None where a network did not go too far.

    What a network between takes is expected from what this one took and the uncompressed one does.

    Args:
        choices: Of the network.
        record: Of its trial.
        space: What may be chosen.
        constraints: Limits.
        cost: Predicts what a network costs, in shares of the uncompressed one.
        spent: What this one cost, as `Constraints.cost` tells it.
        blocks: Those that may be removed, the one whose removal changes least first.
    """
    budget, here = constraints.budget, cost(record.policy)
    if budget is None or spent >= budget * (1 - _FAR_INSIDE) or constraints.within_drop(record) or here >= 1:
        return None

    def expected(policy: CompressionPolicy) -> float:
        return spent + (1 - spent) * (cost(policy) - here) / (1 - here)

    search = LocalSearch(choices, space, expected, random.Random(record.number), blocks)
    search.relax(_AIM * budget)
    return search.choices
