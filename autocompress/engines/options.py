"""How the engine of a policy is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autocompress.config import RunConfig
from autocompress.engines.base import EngineOptions
from autocompress.policy import CompressionPolicy


def engine_options(policy: CompressionPolicy, config: RunConfig, capabilities: Sequence[str]) -> EngineOptions:
    """Return how a policy's engine is built in a run."""
    settings = tuple(config.engine_options.items())
    options = EngineOptions(policy.dense_dtype, config.threads, config.batch_size, settings)
    return with_sparse_weights(options, policy, capabilities)


def with_sparse_weights(
    options: EngineOptions, policy: CompressionPolicy, capabilities: Sequence[str]
) -> EngineOptions:
    """Return the options that run a policy's 2:4 sparse weights as such, where the device can."""
    if not policy.sparse_layers or "2:4" not in capabilities:
        return options
    return replace(options, settings=tuple({**dict(options.settings), "sparse_weights": True}.items()))
