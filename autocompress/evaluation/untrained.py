"""Engine files of networks whose weights are not made: latency alone is asked of them, which does not depend on any."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from autocompress.compress import CompressionContext, apply_policy
from autocompress.config import RunConfig
from autocompress.engines.base import EngineFile
from autocompress.engines.options import engine_options
from autocompress.graph.builder import GraphBuilder
from autocompress.graph.export import save_onnx
from autocompress.graph.placeholder_ranges import AssumedRanges
from autocompress.model.inventory import Inventory
from autocompress.policy import CompressionPolicy


class UntrainedNetworks:
    """Writes compressed forms of one model, in milliseconds each.

    Args:
        base: The uncompressed model, rewritten; it is run once and not changed.
        example: Inputs for it, ``(N, ...)``.
        inventory: Of it.
        graphs: Of it, for the engine of `config`.
        config: Engine, threads, batch size.
        capabilities: Dtypes that the engine runs.
    """

    def __init__(
        self, base: nn.Module, example: Tensor, inventory: Inventory, graphs: GraphBuilder, *, config: RunConfig,
        capabilities: tuple[str, ...],
    ) -> None:  # fmt: skip
        self._base, self._example, self._graphs = base, example, graphs
        self._config, self._capabilities = config, capabilities
        self._ranges = AssumedRanges(base, example, inventory.layers)

    def write(self, policy: CompressionPolicy, path: Path) -> EngineFile:
        """Write the network that a policy makes to an ONNX file, which opening builds.

        Raises:
            CompressionError: The policy does not fit the model.
            ExportError: It cannot be exported.
        """
        model = apply_policy(self._base, policy, CompressionContext(self._example, weights=False))
        graph = self._graphs.build(model, self._ranges(model), policy.removed_blocks)
        save_onnx(graph.model, path)
        return EngineFile(self._config.engine, path, engine_options(policy, self._config, self._capabilities))
