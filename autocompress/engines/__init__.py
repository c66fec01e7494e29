"""Inference runtimes, one file or folder each: model to file to Runner.

Importing this package loads no runtime and no torch. A module with `ENGINE_CLASSES` is found by itself.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module

from autocompress.engines.base import Engine, EngineFile, EngineOptions, Runner
from autocompress.errors import ConfigError, nearest

__all__ = ["ENGINES", "Engine", "EngineFile", "EngineOptions", "Runner", "engine_class", "get_engine"]


def _engine_classes() -> Iterator[type[Engine]]:
    for info in pkgutil.iter_modules(__path__, f"{__name__}."):
        yield from getattr(import_module(info.name), "ENGINE_CLASSES", ())


# By the name that users write.
ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in _engine_classes()}


def engine_class(name: str) -> type[Engine]:
    """Return what an engine is, without loading its runtime.

    Raises:
        ConfigError: No such engine.
    """
    if name not in ENGINES:
        raise ConfigError(f"Unknown engine {name!r}.{nearest(name, ENGINES)}")
    return ENGINES[name]


def get_engine(name: str) -> Engine:
    """Return the engine of this name.

    Raises:
        ConfigError: No such engine.
        MissingDependencyError: Its package is not installed.
    """
    return engine_class(name)()
