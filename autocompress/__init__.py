"""Hardware-aware automatic compression of PyTorch models.

Importing this package loads neither torch nor optuna; names arrive when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autocompress.api import (
        benchmark,
        build,
        distill,
        measure,
        open_profile,
        profile,
        prune,
        quantize,
        search,
        sensitivity,
    )
    from autocompress.api.run import Run, open_run, repair
    from autocompress.catalogue import list_methods
    from autocompress.errors import AutoCompressError
    from autocompress.policy import CompressionPolicy, LayerPolicy
    from autocompress.storage import pack, unpack
    from autocompress.tasks import ClassificationTask, Task, load_task

__version__ = "0.1.0"

_HOMES = {
    "AutoCompressError": "autocompress.errors",
    "ClassificationTask": "autocompress.tasks",
    "CompressionPolicy": "autocompress.policy",
    "LayerPolicy": "autocompress.policy",
    "Run": "autocompress.api.run",
    "Task": "autocompress.tasks",
    "benchmark": "autocompress.api",
    "build": "autocompress.api",
    "distill": "autocompress.api",
    "list_methods": "autocompress.catalogue",
    "load_task": "autocompress.tasks",
    "measure": "autocompress.api",
    "open_profile": "autocompress.api",
    "open_run": "autocompress.api.run",
    "pack": "autocompress.storage",
    "profile": "autocompress.api",
    "prune": "autocompress.api",
    "quantize": "autocompress.api",
    "repair": "autocompress.api.run",
    "search": "autocompress.api",
    "sensitivity": "autocompress.api",
    "unpack": "autocompress.storage",
}

__all__ = [
    "AutoCompressError",
    "ClassificationTask",
    "CompressionPolicy",
    "LayerPolicy",
    "Run",
    "Task",
    "benchmark",
    "build",
    "distill",
    "list_methods",
    "load_task",
    "measure",
    "open_profile",
    "open_run",
    "pack",
    "profile",
    "prune",
    "quantize",
    "repair",
    "search",
    "sensitivity",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'autocompress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
