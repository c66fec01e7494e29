"""How much a choice takes away of a network, as assumed before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autocompress.space import rank_choices
from autocompress.space.parameter import Parameter
from autocompress.space.search_space import Choice

# No factorization takes nothing away.
_LEAST_SEVERE = 0.05


def severity(name: str, choice: Choice, blocks: Sequence[str] = ()) -> float:
    """Return how much a parameter's choice takes away, in [0, 1]: what is assumed of quality before it is measured.

    Args:
        name, choice: Of the parameter.
        blocks: Those that may be removed, the one whose removal changes least first.
    """
    kind, target = Parameter.of(name)
    if kind == "prune":
        return float(choice)
    if kind == "rank":
        factorization, ratio = rank_choices.read(choice) or (rank_choices.DEFAULT, 1.0)
        # What Tucker-2 leaves of a layer goes with the square of its ratio; the full rank of the others is twice the
        # layer, and what they leave goes with the ratio itself.
        return 1 - ratio if factorization == rank_choices.DEFAULT else max(1 - math.sqrt(2 * ratio), _LEAST_SEVERE)
    if choice == "remove":
        return 0.4 + 0.5 * (blocks.index(target) / max(len(blocks) - 1, 1) if target in blocks else 0.5)
    if choice == "2:4":
        return 0.3
    # Costs a well calibrated network almost nothing.
    return 0.1 if choice == "int8" else 0.0
