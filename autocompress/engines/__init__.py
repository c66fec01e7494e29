"""Inference engines: model to file to Runner, and the graph work that precedes it.

Importing this package loads no runtime and no torch.
"""

from __future__ import annotations

from importlib import import_module

from autocompress.engines.base import Engine, EngineFile, EngineOptions, Runner
from autocompress.errors import ConfigError, nearest

__all__ = ["ENGINES", "Engine", "EngineFile", "EngineOptions", "Runner", "get_engine", "runs_on_gpu"]

# Name to "module:class"; adding an engine is one module and one line here.
ENGINES = {
    "openvino": "autocompress.engines.openvino:OpenVINOEngine",
    "onnxruntime": "autocompress.engines.onnxruntime:ONNXRuntimeEngine",
    "tensorrt": "autocompress.engines.tensorrt.engine:TensorRTEngine",
    "tensorrt-rtx": "autocompress.engines.tensorrt.engine:TensorRTRTXEngine",
}


_ON_GPU = frozenset({"tensorrt", "tensorrt-rtx"})


def runs_on_gpu(name: str) -> bool:
    """Return `Engine.uses_gpu` of an engine without loading it."""
    return name in _ON_GPU


def get_engine(name: str) -> Engine:
    """Return the engine of this name.

    Raises:
        ConfigError: No such engine.
        MissingDependencyError: Its package is not installed.
    """
    if name not in ENGINES:
        raise ConfigError(f"Unknown engine {name!r}.{nearest(name, ENGINES)}")
    module, _, cls = ENGINES[name].partition(":")
    engine: Engine = getattr(import_module(module), cls)()
    return engine
