"""How far down a search can come, found out before its first trial: what the most compressed network takes.

That network is measured without weights, in the time of one build. Its figure tells whether a limit can be met at all,
and where between the two ends other networks lie: engines have costs that arithmetic does not show.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from autocompress.config import RunConfig
from autocompress.errors import AutoCompressError
from autocompress.evaluation.evaluator import CandidateEvaluator
from autocompress.evaluation.untrained import UntrainedNetworks
from autocompress.measurement.protocol import Protocol
from autocompress.policy import CompressionPolicy
from autocompress.space.parameter import Parameter
from autocompress.space.search_space import Choice, SearchSpace
from autocompress.space.severity import severity

Ratio = Callable[[CompressionPolicy], float]
# Arithmetic of the most compressed network from which on two ends do not say where others lie.
_MOST_ARITHMETIC = 0.95


@dataclass(frozen=True)
class Reach:
    """The lowest cost within a search space, about.

    Attributes:
        policy: Of the network that it is the cost of.
        ratio: What that network takes over what the uncompressed one does.
        measured: Whether that was measured; else it is predicted.
    """

    policy: CompressionPolicy
    ratio: float
    measured: bool = False

    def describe(self, budget: float | None) -> str | None:
        """Say what is within reach, and whether a limit is: None where there is no limit, or nothing is wrong with it.

        Args:
            budget: The limit, in shares of the uncompressed network's figure.
        """
        if budget is None or self.ratio <= budget:
            return None
        how = "measured without its weights" if self.measured else "predicted"
        return (
            f"The limit looks out of reach: the most compressed network of the search space takes about "
            f"{self.ratio:.2g}x of the uncompressed one ({how}), and {budget:.2g}x was asked. Within reach is about "
            f"{self.ratio:.2g}x to 1x: a mixture may come a little lower, and a wider --space further"
        )

    def calibrated(self, ratio: Ratio) -> Ratio:
        """Return `ratio` moved to what was measured: 1 for the uncompressed network, `self.ratio` for the other end."""
        end = ratio(self.policy)
        if not self.measured or end > _MOST_ARITHMETIC or self.ratio >= 1:
            return ratio
        slope = (1 - self.ratio) / (1 - end)
        return lambda policy: 1 - slope * (1 - ratio(policy))


def most_compressed(space: SearchSpace, ratio: Ratio) -> list[CompressionPolicy]:
    """Return the policies of the smallest networks: with and without int8, with and without low ranks.

    The two of least cost by `ratio`, with and without int8, come first. int8 takes longer than dense where an engine
    has no kernel for it, and a chain of factors longer than its layer where layers are small.
    """

    def harshest(dtype: str, *kinds: str) -> CompressionPolicy:
        choices: dict[str, Choice] = space.everywhere()
        for name, offered in space.parameters.items():
            kind = Parameter.of(name).kind
            if kind == "dtype" and dtype in offered:
                choices[name] = dtype
            elif kind in kinds:
                choices[name] = max(offered, key=lambda choice: severity(name, choice))
        return space.policy(choices)

    pairs = [
        sorted((harshest(dtype, "prune", "block", *ranks) for ranks in ((), ("rank",))), key=ratio)
        for dtype in ("int8", "dense")
    ]
    return list(dict.fromkeys(policy for same in zip(*pairs, strict=True) for policy in same))


def predicted_reach(space: SearchSpace, ratio: Ratio) -> Reach:
    """Return the reach by prediction alone."""
    policy = min(most_compressed(space, ratio), key=ratio)
    return Reach(policy, ratio(policy))


def measured_reach(
    evaluator: CandidateEvaluator, config: RunConfig, space: SearchSpace, ratio: Ratio, budget: float | None = None
) -> Reach:
    """Return the reach by building and measuring the most compressed networks.

    Args:
        evaluator: Its baseline has been measured.
        config: Engine, threads, batch size.
        space: What may be chosen.
        ratio: Predicts what a network takes over what the uncompressed one does.
        budget: The limit in that unit. Networks are measured until one is inside it; without a limit one is enough.

    Returns:
        What is predicted, where the engine refuses these networks.
    """
    networks = UntrainedNetworks(
        evaluator.base, evaluator.data.reference, evaluator.inventory, evaluator.graphs,
        config=config, capabilities=evaluator.capabilities,
    )  # fmt: skip
    found: list[Reach] = []
    for policy in most_compressed(space, ratio):
        if found and (budget is None or found[-1].ratio <= budget):
            break
        with suppress(AutoCompressError), TemporaryDirectory(dir=evaluator.run.path, prefix=".reach-") as folder:
            file = networks.write(policy, Path(folder) / "network.onnx")
            found.append(Reach(policy, evaluator.measure(file, Protocol.quick()).ratio, measured=True))
    return min(found, key=lambda reach: reach.ratio, default=predicted_reach(space, ratio))
