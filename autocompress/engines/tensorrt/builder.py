"""ONNX to a serialized TensorRT engine: parse, check dtypes against the compute capability, configure, build.

Strongly typed networks alone: the dtype of every tensor is the graph's. Nothing here runs on a device by itself;
TensorRT times kernels on the GPU while it builds, TensorRT-RTX does not and needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocompress.engines.base import EngineOptions
from autocompress.engines.tensorrt.compute_capability import ComputeCapability, require, require_sparsity
from autocompress.engines.tensorrt.library import (
    DTYPE_NAMES,
    BuildLog,
    Flavour,
    make_logger,
    make_progress_monitor,
)
from autocompress.engines.tensorrt.locked_cache import LockedCache
from autocompress.engines.tensorrt.options import TensorRTOptions
from autocompress.errors import BuildError, DeviceNotFoundError, ExportError

_OUT_OF_MEMORY = ("out of memory", "outofmemory", "insufficient memory", "memory allocation")


@dataclass(frozen=True)
class Built:
    """A serialized engine and what it is.

    Attributes:
        data: The bytes that TensorRT opens.
        dtypes: Every dtype that the network computes or stores in.
        fp32_nodes: Nodes kept in fp32 in a half precision engine.
        batch: Least, most common and largest batch of its profile.
    """

    data: bytes
    dtypes: tuple[str, ...]
    fp32_nodes: tuple[str, ...]
    batch: tuple[int, int, int]


class NetworkBuilder:
    """One build. The library's objects live as long as this one."""

    def __init__(self, flavour: Flavour, settings: TensorRTOptions, log: BuildLog) -> None:
        self._flavour, self._settings, self._log = flavour, settings, log
        self._library = flavour.library()
        self._logger = make_logger(self._library, log)
        self._monitor = make_progress_monitor(self._library, log.add)
        try:
            self._builder = self._library.Builder(self._logger)
        except (TypeError, RuntimeError) as error:
            raise DeviceNotFoundError(
                f"{flavour.name} cannot start a builder: {log.words() or error} It needs a GPU and its driver; see "
                f"`autocompress doctor --engine {flavour.name}`."
            ) from error

    def build(
        self, onnx: Path, options: EngineOptions, targets: Sequence[ComputeCapability], cache: LockedCache | None
    ) -> Built:
        """Build an engine for `targets`.

        Raises:
            BuildError: The graph cannot be read, parsed or built; carries the library's own words.
            UnsupportedDtypeError: The network uses a dtype that a target does not run.
        """
        data, kept = _graph(onnx, options.dtype, self._settings.fp32_nodes)
        self._load_plugins()
        library = self._library
        flag = library.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        # TensorRT 10 builds weakly typed networks without the flag; 11 has no others and takes it all the same.
        network = self._builder.create_network(1 << int(flag))
        parser = library.OnnxParser(network, self._logger)
        if not parser.parse(data, str(onnx.absolute())):
            raise BuildError(f"{self._flavour.name} cannot read {onnx}: {_parser_words(parser)} The ONNX file is kept.")
        dtypes = _dtypes(network)
        # Half precision networks keep fp32 at their inputs and outputs, which every target runs.
        require(self._flavour.name, [options.dtype, *(d for d in dtypes if d != "fp32")], targets)
        if self._settings.sparse_weights:
            require_sparsity(targets)
        config = self._builder.create_builder_config()
        batch = self._set_batch(network, config, onnx, options)
        self._configure(config, targets)
        if cache is not None:
            self._use_cache(config, cache)
        made = self._builder.build_serialized_network(network, config)
        if made is None:
            raise BuildError(self._refusal(onnx))
        if cache is not None:
            self._keep_cache(config, cache)
        return Built(bytes(made), dtypes, tuple(kept), batch)

    def _load_plugins(self) -> None:
        registry = self._builder.get_plugin_registry()
        for plugin in self._settings.plugins:
            if registry.load_library(plugin) is None:
                raise BuildError(
                    f"The plugin library {plugin} cannot be loaded: {self._log.words()} It must be built for "
                    f"{self._flavour.name} {self._flavour.version()}, and its plugins must not be registered already."
                )

    def _set_batch(self, network: Any, config: Any, onnx: Path, options: EngineOptions) -> tuple[int, int, int]:
        """Fix the batch axis, or give it a profile; return least, common and most."""
        puts, size = [network.get_input(i) for i in range(network.num_inputs)], options.batch_size
        shapes = [tuple(put.shape) for put in puts]
        for put, shape in zip(puts, shapes, strict=True):
            if not shape or any(axis < 0 for axis in shape[1:]):
                raise BuildError(
                    f"{onnx} has the shape {shape} of input {put.name!r}: only the batch axis may be dynamic, every "
                    "other needs a size."
                )
        if self._settings.max_batch <= size:
            for put, shape in zip(puts, shapes, strict=True):
                if shape[0] < 0:
                    put.shape = (size, *shape[1:])
                elif shape[0] != size:
                    raise BuildError(f"{onnx}: the graph's batch size is {shape[0]}, but {size} was asked for.")
            return size, size, size
        for put, shape in zip(puts, shapes, strict=True):
            put.shape = (-1, *shape[1:])
        if any(tuple(network.get_output(i).shape)[:1] != (-1,) for i in range(network.num_outputs)):
            raise BuildError(
                f"{onnx} fixes the batch size inside the graph, so max_batch {self._settings.max_batch} cannot be "
                f"built. Leave max_batch away, or export the model with a dynamic batch."
            )
        profile = self._builder.create_optimization_profile()
        batch = (1, size, self._settings.max_batch)
        for put, shape in zip(puts, shapes, strict=True):
            profile.set_shape(put.name, *((n, *shape[1:]) for n in batch))
        config.add_optimization_profile(profile)
        return batch

    def _configure(self, config: Any, targets: Sequence[ComputeCapability]) -> None:
        library, settings = self._library, self._settings
        flags = library.BuilderFlag
        config.builder_optimization_level = settings.optimization_level
        if settings.workspace_bytes:
            config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
        for wanted, flag in (
            (settings.sparse_weights, flags.SPARSE_WEIGHTS),
            (settings.refit, flags.REFIT),
            (settings.version_compatible, flags.VERSION_COMPATIBLE),
            (settings.tf32, flags.TF32),
        ):
            if wanted:
                config.set_flag(flag)
            else:
                config.clear_flag(flag)
        if settings.hardware_compatible != "none":
            level = settings.hardware_compatible.upper()
            config.hardware_compatibility_level = library.HardwareCompatibilityLevel.__members__[level]
        # The inspector then tells what every layer became.
        config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
        config.progress_monitor = self._monitor
        if not self._flavour.needs_gpu_to_build:
            config.num_compute_capabilities = len(targets)
            for index, target in enumerate(targets):
                known = library.ComputeCapability.__members__
                if target.sm not in known or not config.set_compute_capability(known[target.sm], index):
                    raise BuildError(
                        f"{self._flavour.name} {self._flavour.version()} cannot build for compute capability {target}"
                        f"{f' beside {targets[0]}' if index else ''}. {self._log.words()}"
                    )

    def _use_cache(self, config: Any, cache: LockedCache) -> None:
        data = cache.read()
        made = config.create_timing_cache(data)
        if made is not None and config.set_timing_cache(made, False):
            return
        if data:
            cache.drop("does not fit this version and GPU")
        config.set_timing_cache(config.create_timing_cache(b""), False)

    def _keep_cache(self, config: Any, cache: LockedCache) -> None:
        own = config.get_timing_cache()
        if own is None:
            return

        def merge(stored: bytes) -> bytes:
            # What other processes learnt meanwhile is kept too.
            if stored and (theirs := config.create_timing_cache(stored)) is not None:
                own.combine(theirs, False)
            return bytes(own.serialize())

        cache.update(merge)

    def _refusal(self, onnx: Path) -> str:
        words = self._log.words() or "it gave no reason."
        hint = ""
        if any(sign in words.lower() for sign in _OUT_OF_MEMORY):
            hint = " Lower engine_options.workspace or the batch size, or free GPU memory."
        return f"{self._flavour.name} cannot build {onnx}: {words}{hint} The ONNX file and the build log are kept."


def _graph(onnx: Path, dtype: str, fp32_nodes: Sequence[str]) -> tuple[bytes, list[str]]:
    """Return the ONNX bytes in the dense dtype asked for, and the nodes left in fp32."""
    try:
        if dtype == "fp32":
            return onnx.read_bytes(), []
        import onnx_ir as ir

        from autocompress.engines.tensorrt.half import to_half

        model = ir.load(onnx)
        kept = to_half(model, dtype, fp32_nodes=fp32_nodes)
        return ir.to_proto(model).SerializeToString(), kept
    except OSError as error:
        raise BuildError(f"{onnx} cannot be read: {error.strerror or error}.") from error
    except ExportError:
        raise
    except BuildError as error:
        raise BuildError(f"{onnx}: {error}") from error
    except Exception as error:  # onnx and onnx-ir raise whatever a damaged file provokes
        raise BuildError(f"{onnx} cannot be converted to {dtype}: {type(error).__name__}: {error}") from error


def _parser_words(parser: Any) -> str:
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f"op {error.node_operator()!r} (node {error.node_name()!r}): " if error.node_operator() else ""
        found.append(where + " ".join(error.desc().split()))
    return "; ".join(dict.fromkeys(found[:3])) or "it gave no reason."


def _dtypes(network: Any) -> tuple[str, ...]:
    """Return every dtype of the network's tensors, in the order of `DTYPE_NAMES`."""
    used = set()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for output in range(layer.num_outputs):
            tensor = layer.get_output(output)
            if tensor is not None:
                used.add(tensor.dtype.name)
    return tuple(name for member, name in DTYPE_NAMES.items() if member in used)
