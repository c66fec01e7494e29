"""What can be set for TensorRT beyond the options of every engine: `TensorRTOptions`.

Read from `EngineOptions.settings`, whose values come from the run file (``engine_options:``) and the command line as
text, numbers and booleans. Imports no runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from autocompress.engines.tensorrt.compute_capability import ComputeCapability
from autocompress.errors import ConfigError, nearest
from autocompress.quantities import parse_size

HARDWARE_LEVELS = ("none", "ampere_plus", "same_compute_capability")


@dataclass(frozen=True)
class TensorRTOptions:
    """Settings of one build and of running what it built.

    Attributes:
        compute_capability: GPUs to build for, such as ``"8.9"`` or ``"8.6,8.9"``; empty for the GPU that is here.
            TensorRT-RTX only, which needs no GPU then.
        workspace_bytes: Most scratch memory that a layer may take; 0 leaves it to TensorRT (all there is).
        optimization_level: 0 (fast to build) to 5 (fast to run).
        timing_cache: ``"auto"`` (one file per version and GPU in the cache directory), ``"off"``, or a file.
        hardware_compatible: One of `HARDWARE_LEVELS`: which other GPUs the engine runs on, at a cost.
        version_compatible: Whether later TensorRT releases can run the engine, at a cost.
        refit: Whether the engine's weights can be replaced later.
        max_batch: Most samples of one call; above the batch size the batch axis stays dynamic. 0 fixes it.
        sparse_weights: Whether 2:4 sparse weights may be run on Sparse Tensor Cores.
        tf32: Whether fp32 layers may round their inputs to TF32 (10 bits of mantissa), as TensorRT does by default.
        plugins: Shared libraries with plugins, loaded before the graph is read.
        fp32_nodes: Names of graph nodes kept in fp32 in an fp16 or bf16 engine.
        cuda_graph: Whether `Runner.run` replays a CUDA graph rather than enqueueing every layer.
        transfers: Whether timing includes copying the input to the GPU and the output back.
        l2_flush: Whether the GPU's L2 cache is overwritten before every timed run.
    """

    compute_capability: tuple[ComputeCapability, ...] = ()
    workspace_bytes: int = 0
    optimization_level: int = 3
    timing_cache: str = "auto"
    hardware_compatible: str = "none"
    version_compatible: bool = False
    refit: bool = False
    max_batch: int = 0
    sparse_weights: bool = False
    tf32: bool = True
    plugins: tuple[str, ...] = ()
    fp32_nodes: tuple[str, ...] = ()
    cuda_graph: bool = True
    transfers: bool = False
    l2_flush: bool = False

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: A value is out of range, or a plugin is not there.
        """
        if not 0 <= self.optimization_level <= 5:
            raise ConfigError(f"optimization_level is {self.optimization_level!r}; it is 0 to 5.")
        if self.workspace_bytes < 0:
            raise ConfigError(f"workspace is {self.workspace_bytes!r}; give a size such as 2GB, or 0 for no limit.")
        if self.max_batch < 0:
            raise ConfigError(f"max_batch is {self.max_batch!r}; give the most samples of a call, or 0.")
        if self.hardware_compatible not in HARDWARE_LEVELS:
            raise ConfigError(
                f"Unknown hardware_compatible {self.hardware_compatible!r}."
                f"{nearest(self.hardware_compatible, HARDWARE_LEVELS)}"
            )
        for plugin in self.plugins:
            if not Path(plugin).is_file():
                raise ConfigError(f"The plugin library {plugin} does not exist. Check engine_options.plugins.")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Read settings as users write them: ``workspace: 2GB``, ``compute_capability: "8.6,8.9"``, lists or text.

        Raises:
            ConfigError: An unknown key, or a value of another kind or out of range.
        """
        known = {f.name for f in fields(cls)} - {"workspace_bytes"} | {"workspace"}
        values: dict[str, Any] = {}
        for key, value in settings.items():
            if key not in known:
                raise ConfigError(f"Unknown engine option {key!r} for TensorRT.{nearest(key, known)}")
            if key == "workspace":
                values["workspace_bytes"] = _bytes(value)
            elif key == "compute_capability":
                values[key] = tuple(sorted({ComputeCapability.parse(v) for v in _texts(key, value)}))
            elif key in ("plugins", "fp32_nodes"):
                values[key] = _texts(key, value)
            elif key in ("optimization_level", "max_batch"):
                values[key] = _of_kind(key, value, int)
            elif key in ("timing_cache", "hardware_compatible"):
                values[key] = _of_kind(key, value, str)
            else:
                values[key] = _of_kind(key, value, bool)
        return cls(**values)


def _of_kind(key: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {int: "a whole number", str: "text", bool: "true or false"}[kind]
        raise ConfigError(f"Engine option {key} is {value!r}; it must be {words}.")
    return value


def _texts(key: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str | int | float):
        return tuple(part.strip() for part in str(value).split(",") if part.strip())
    if isinstance(value, Iterable):
        return tuple(str(part) for part in value)
    raise ConfigError(f"Engine option {key} is {value!r}; it must be text or a list of texts.")


def _bytes(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    limit = parse_size(str(value), "workspace")
    if limit.relative:
        raise ConfigError(f"workspace is {value!r}; give a size such as 2GB.")
    return int(limit.value)
