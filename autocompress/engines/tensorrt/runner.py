"""An opened TensorRT engine: device buffers, `execute_async_v3` on a stream of its own, CUDA events, CUDA graphs.

Nothing touches the device before ``__enter__``. What an engine was built with is compared first, so that a file from
another version or GPU is refused with both sides named rather than with the library's serialization error.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from autocompress.engines.base import Array, EngineOptions, Runner
from autocompress.engines.ports import Port, unpacked
from autocompress.engines.tensorrt.compute_capability import ComputeCapability
from autocompress.engines.tensorrt.cuda import Buffer, Gpu, Stream, current_gpu
from autocompress.engines.tensorrt.library import BuildLog, Flavour, make_logger
from autocompress.engines.tensorrt.locked_cache import LockedCache
from autocompress.engines.tensorrt.options import TensorRTOptions
from autocompress.errors import BuildError, ConfigError
from autocompress.files import read_json

_NUMPY = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT32": np.int32,
    "INT64": np.int64,
    "INT8": np.int8,
    "BOOL": np.bool_,
}


def description_of(path: Path) -> Path:
    """Return the JSON file that says what an engine file is: ``model.trt.json`` of ``model.trt.engine``."""
    return path.with_suffix(".json")


class TensorRTRunner(Runner):
    """One engine with one execution context. `time_run` is the GPU's own time between two events."""

    def __init__(
        self, flavour: Flavour, path: Path, options: EngineOptions, settings: TensorRTOptions,
        cache: Callable[[Gpu, Callable[[str], None]], LockedCache | None],
    ) -> None:  # fmt: skip
        self._flavour, self._path, self._options, self._settings = flavour, path, options, settings
        self._make_cache = cache
        self._log = BuildLog()
        self._parts: list[Any] = []
        self._context: Any = None
        self._bound = False

    # -- life ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Load the engine on the GPU.

        Raises:
            BuildError: The file is damaged, or was built by another version or for another GPU.
            DeviceNotFoundError: There is no driver or no GPU here.
        """
        try:
            data = self._path.read_bytes()
        except OSError as error:
            raise BuildError(f"{self._path} cannot be opened: {error.strerror or error}.") from error
        found = self._described(data)
        self._gpu = current_gpu()
        check_gpu(self._path, found, self._gpu)
        library = self._flavour.library()
        self._logger = make_logger(library, self._log)
        self._runtime = library.Runtime(self._logger)
        for plugin in self._settings.plugins:
            if self._runtime.get_plugin_registry().load_library(plugin) is None:
                raise BuildError(f"The plugin library {plugin} cannot be loaded: {self._log.words()}")
        # Version-compatible engines carry a small runtime. The options they are opened with allow it, which
        # `runs.trust` guards, and never the description beside the file.
        self._runtime.engine_host_code_allowed = self._settings.version_compatible
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise BuildError(
                f"{self._flavour.name} {self._flavour.version()} cannot open {self._path}: {self._log.words()} The "
                "file may be damaged or from another version; build it again from its ONNX file."
            )
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def _described(self, data: bytes) -> Mapping[str, Any]:
        """Return the engine's description, after comparing it with the bytes and this version."""
        path = description_of(self._path)
        if not path.exists():
            return {}
        try:
            found = read_json(path)
        except ConfigError as error:
            raise BuildError(f"{self._path} cannot be opened: {error} Build it again from its ONNX file.") from error
        check_version(self._path, found, data, self._flavour)
        return found if isinstance(found, dict) else {}

    def _open(self) -> None:
        library, engine = self._flavour.library(), self._engine
        self._stream = Stream()
        self._parts.append(self._stream)
        self._context = self._execution_context(library)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == library.TensorIOMode.INPUT]
        self._output = next(n for n in names if n not in inputs)
        self._ports = [self._port(name) for name in inputs]
        self._types = {name: self._numpy(name) for name in (*inputs, self._output)}
        self._buffers: dict[str, Buffer] = {}
        for name in names:
            dims = tuple(self._context.get_tensor_shape(name))
            self._buffers[name] = Buffer(int(np.prod(dims)) * np.dtype(self._numpy(name)).itemsize)
            self._parts.append(self._buffers[name])
            if not self._context.set_tensor_address(name, int(self._buffers[name].device)):
                raise BuildError(f"{self._path}: TensorRT refused a buffer for {name!r}: {self._log.words()}")
        self._output_shape = tuple(self._context.get_tensor_shape(self._output))
        self._flush = Buffer(2 * self._gpu.l2_bytes) if self._settings.l2_flush else None
        if self._flush is not None:
            self._parts.append(self._flush)

    def _port(self, name: str) -> Port:
        """Return an input, its batch axis set."""
        size, shape = self._options.batch_size, tuple(self._engine.get_tensor_shape(name))
        port = Port(name, (size, *shape[1:]), self._numpy(name))
        if shape[0] not in (-1, size):
            raise BuildError(f"{self._path} takes batches of {shape[0]}, but {size} was asked for.")
        if not self._context.set_input_shape(name, port.shape):
            raise BuildError(
                f"{self._path} does not take inputs of shape {port.shape}: {self._log.words()} Its profile allows "
                f"{[tuple(d) for d in self._engine.get_tensor_profile_shape(name, 0)]}."
            )
        return port

    def _execution_context(self, library: Any) -> Any:
        self._runtime_cache: Any = None
        if not self._flavour.needs_gpu_to_build:
            # RTX compiles kernels here, on the GPU; its own cache and graph strategy replace what is done by hand.
            config = self._engine.create_runtime_config()
            strategies = library.CudaGraphStrategy
            config.cuda_graph_strategy = (
                strategies.WHOLE_GRAPH_CAPTURE if self._settings.cuda_graph else strategies.DISABLED
            )
            self._cache = self._make_cache(self._gpu, lambda text: self._log.add("WARNING", text))
            if self._cache is not None:
                self._runtime_cache = config.create_runtime_cache()
                stored = self._cache.read()
                if stored and not self._runtime_cache.deserialize(stored):
                    self._cache.drop("does not fit this version and GPU")
                config.set_runtime_cache(self._runtime_cache)
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context()
        if context is None:
            raise BuildError(
                f"{self._path} cannot be run: {self._log.words()} When the GPU is out of memory, lower the batch size "
                "or engine_options.workspace."
            )
        return context

    def _numpy(self, name: str) -> Any:
        member = self._engine.get_tensor_dtype(name).name
        if member not in _NUMPY:
            raise BuildError(f"{self._path}: tensor {name!r} is a {member}, which is not supported as input or output.")
        return _NUMPY[member]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the GPU, and keep what RTX compiled for the next time."""
        if self._context is not None and self._runtime_cache is not None and self._cache is not None:
            data = bytes(self._runtime_cache.serialize())
            self._cache.update(lambda stored: data)
        self._close()

    def _close(self) -> None:
        self._context, self._bound = None, False
        for part in reversed(self._parts):
            part.close()
        self._parts.clear()
        self._engine = self._runtime = None

    # -- running ------------------------------------------------------------------------------------------------

    def infer(self, inputs: Array) -> Array:
        """Run ``(batch_size, ...)`` inputs and return the first output, float32."""
        self.prepare(inputs)
        self._enqueue()
        self._buffers[self._output].download(self._stream)
        self._stream.synchronize()
        return np.array(self._view(self._output, self._output_shape), dtype=np.float32)

    def prepare(self, inputs: Array) -> None:
        """Copy the inputs to the GPU in the engine's types, and record the CUDA graph where there is to be one."""
        if self._context is None:
            raise BuildError(f"{self._path} is not open; use its runner as a context manager.")
        for port, array in zip(self._ports, unpacked(inputs, self._ports, self._path), strict=True):
            self._view(port.name, port.shape)[...] = array
        self._upload()
        self._stream.synchronize()
        if not self._bound:
            # The first call compiles and allocates, which a graph cannot record.
            self._work()
            self._stream.synchronize()
            self._bound = True
            if self._captures:
                self._stream.capture(self._work)

    @property
    def _captures(self) -> bool:
        return self._settings.cuda_graph and self._flavour.needs_gpu_to_build

    def run(self) -> None:
        """Run once and wait for it."""
        self._before()
        self._start()
        self._stream.synchronize()

    def time_run(self, clock: Callable[[], int]) -> int:
        """Run once and return the nanoseconds between two events on the stream around it."""
        self._before()
        return round(self._stream.time(self._start) * 1e6)

    def _before(self) -> None:
        if self._flush is not None:
            self._flush.fill(self._stream)

    def _start(self) -> None:
        if self._captures:
            self._stream.replay()
        else:
            self._work()

    def _work(self) -> None:
        """Enqueue one inference, with the transfers where they are to be timed."""
        if self._settings.transfers:
            self._upload()
        self._enqueue()
        if self._settings.transfers:
            self._buffers[self._output].download(self._stream)

    def _upload(self) -> None:
        for port in self._ports:
            self._buffers[port.name].upload(self._stream)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.number):
            raise BuildError(f"{self._path} failed while running: {self._log.words()}")

    def _view(self, name: str, shape: tuple[int, ...]) -> Array:
        """Return the host side of a tensor as an array."""
        buffer, dtype = self._buffers[name], np.dtype(self._types[name])
        raw = (ctypes.c_char * buffer.size).from_address(int(buffer.host))
        view: Array = np.frombuffer(memoryview(raw).cast("B"), dtype=dtype, count=int(np.prod(shape))).reshape(shape)
        return view

    # -- insight ------------------------------------------------------------------------------------------------

    def layers(self) -> dict[str, Any]:
        """Return the engine inspector's account of every layer: what was fused, dtypes, tactics."""
        library = self._flavour.library()
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        text = inspector.get_engine_information(library.LayerInformationFormat.JSON)
        found: dict[str, Any] = json.loads(text) if text else {}
        return found

    def profile(self, repeats: int = 20) -> dict[str, float]:
        """Return every layer's mean ms over `repeats` runs, by the engine's name for it; no graph is used."""
        library = self._flavour.library()
        spent: dict[str, float] = {}

        class Profiler(library.IProfiler):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                library.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                spent[layer_name] = spent.get(layer_name, 0.0) + ms

        profiler = Profiler()
        self._context.profiler = profiler
        for _ in range(repeats):
            self._enqueue()
            self._stream.synchronize()
        return {name: total / repeats for name, total in spent.items()}


def check_version(path: Path, found: Any, data: bytes, flavour: Flavour) -> None:
    """Compare an engine's description with its bytes and this library.

    Raises:
        BuildError: The bytes are others than were described, or another flavour or version built them.
    """
    if not isinstance(found, dict) or not {"engine", "engine_version", "sha256"} <= found.keys():
        raise BuildError(f"{description_of(path)} is damaged; build {path} again from its ONNX file.")
    if hashlib.sha256(data).hexdigest() != found["sha256"]:
        raise BuildError(
            f"{path} is damaged: its {len(data)} bytes are not those that were built. Build it again from its ONNX "
            "file."
        )
    built, here = (found["engine"], found["engine_version"]), (flavour.name, flavour.version())
    same_major = built[1].partition(".")[0] == here[1].partition(".")[0]
    compatible = found.get("version_compatible") and same_major and _numbers(built[1]) <= _numbers(here[1])
    if built != here and not (built[0] == here[0] and compatible):
        raise BuildError(
            f"{path} was built by {built[0]} {built[1]}, but here is {here[0]} {here[1]}. Install that version, build "
            "it again from its ONNX file, or build with engine_options.version_compatible."
        )


def check_gpu(path: Path, found: Mapping[str, Any], gpu: Gpu) -> None:
    """Compare the GPUs that an engine was built for with the one here.

    Raises:
        BuildError: The engine is for other GPUs; names both.
    """
    built = [ComputeCapability.parse(c) for c in found.get("compute_capability", ())]
    level = found.get("hardware_compatible", "none")
    here = gpu.compute_capability
    if not built or here in built or (level == "ampere_plus" and here >= ComputeCapability(8, 0)):
        return
    raise BuildError(
        f"{path} was built for compute capability {', '.join(map(str, built))} ({found.get('gpu') or 'ahead of time'}),"
        f" but here is {gpu.name} with {here}. Build it again here from its ONNX file."
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
