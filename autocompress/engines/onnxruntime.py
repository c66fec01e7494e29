"""ONNX Runtime on its CPU execution provider: ONNX to a self-contained ``.onnxruntime.onnx`` to `Runner`.

The engine file is the graph itself with its batch axis fixed and its weights inside, not the runtime's optimised form:
that one holds layouts (``com.microsoft.nchwc``) of the processor it was made on, breaks on others and after upgrades,
and saves a millisecond of load time. Must not import torch; onnx is imported only to draw external weights in.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from autocompress._optional import optional
from autocompress.engines.base import Array, Engine, EngineFile, EngineOptions, Runner
from autocompress.engines.kernel_attribution import KernelTime
from autocompress.engines.onnxruntime_profile import EVENTS, OPTIMISED, Overhead, kernel_times, measure_overhead
from autocompress.engines.ports import Port, unpacked
from autocompress.engines.rules import MONOTONE, QdqRules
from autocompress.environment import cpu_name
from autocompress.errors import BuildError, UnsupportedDtypeError

_PROVIDERS = ["CPUExecutionProvider"]
# The CPU provider has no bf16 kernels and almost no fp16 ones: it inserts casts and computes in fp32, so that a half
# precision graph runs slower than the fp32 one. int8 (Q/DQ, fused to QLinearConv and friends) is computed as int8.
_CAPABILITIES = ("fp32", "int8")
_FATAL = 4
_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


def _runtime() -> Any:
    # Released builds upload usage events and leave a device identifier; this is read when the library initializes
    # (its Privacy.md). Whoever wants them sets the variable to 0.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return optional("onnxruntime", ONNXRuntimeEngine.extra, "The engine 'onnxruntime'")


class ONNXRuntimeEngine(Engine):
    """ONNX Runtime's CPU execution provider. Stateless but for its profiler's overhead, measured on first use."""

    name = "onnxruntime"
    suffix = ".onnxruntime.onnx"
    extra = "onnxruntime"
    # DQ-Conv-Q is fused into QLinearConv only where the bias is int32 as well.
    qdq_rules = QdqRules(
        hoist=MONOTONE, int32_bias=True, unsigned_only=True, share_residual=True, quantize_results=True,
        clip_dense=True, pools_in_layout=True, int8_lstm=True,
    )  # fmt: skip
    kernels_in_order = True

    def __init__(self) -> None:
        self._overhead: Overhead | None = None

    def version(self) -> str:
        """Return the runtime's version."""
        return cast(str, _runtime().__version__)

    def device(self) -> str:
        """Return the processor's name."""
        _runtime()
        return cpu_name()

    def capabilities(self) -> Sequence[str]:
        """Return fp32 and int8, the dtypes the provider has kernels for."""
        _runtime()
        return _CAPABILITIES

    def build(self, onnx: Path, options: EngineOptions, output: Path) -> EngineFile:
        """Write the self-contained graph, after loading it once with these options to prove that it runs.

        Raises:
            BuildError: The runtime refused the graph; carries its own words.
            UnsupportedDtypeError: `options.dtype` is not among `capabilities`.
        """
        self._check(options)
        path = output.with_suffix(self.suffix)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
                fresh = Path(folder) / path.name
                _copy(onnx, fresh)
                session = _session(fresh, options)
                axis = _batch_axis(session)
                if isinstance(axis, str):
                    _fix_batch(fresh, axis, options)
                    session = _session(fresh, options)
                _check_shape(session, options)
                fresh.replace(path)
        except _failures() as error:
            raise BuildError(f"ONNX Runtime cannot build {onnx}: {error} The ONNX file is kept.") from error
        return EngineFile(self.name, path, options)

    def open(self, file: EngineFile, threads: int | None = None) -> Runner:
        """Return a runner of an engine file, or of any ONNX file."""
        options = file.options
        if threads is not None:
            options = EngineOptions(options.dtype, threads, options.batch_size)
        self._check(options)
        return ONNXRuntimeRunner(file.path, options)

    def kernel_times(self, file: EngineFile, inputs: Array, seconds: float) -> list[KernelTime]:
        """Return the kernels in the order they run, with the times of the runtime's profiler less what that costs.

        Raises:
            BuildError: The file is damaged, or takes other inputs.
        """
        with self.open(file) as runner:
            runner.prepare(inputs)
        try:
            if self._overhead is None:
                self._overhead = measure_overhead(ONNXRuntimeRunner)
            return kernel_times(
                ONNXRuntimeRunner, file.path, file.options, inputs, seconds=seconds, overhead=self._overhead
            )
        except _failures() as error:
            raise BuildError(f"ONNX Runtime cannot profile {file.path}: {error}") from error

    def _check(self, options: EngineOptions) -> None:
        if options.dtype != "fp32":
            raise UnsupportedDtypeError(
                f"ONNX Runtime does not run layers in {options.dtype!r} on a CPU; use fp32. (int8 layers are expressed "
                "by Q/DQ in the graph.)"
            )


class ONNXRuntimeRunner(Runner):
    """One session whose input and output are bound to fixed buffers.

    With a folder to `profile` into, the graph as it is run is written there, and what each node takes.
    """

    def __init__(self, path: Path, options: EngineOptions, profile: Path | None = None) -> None:
        self._path, self._options, self._profile = path, options, profile
        self._session: Any = None
        self._ports: list[Port] = []
        self._binding: Any = None
        self._output: Any = None

    def __enter__(self) -> Self:
        """Load and optimise the graph."""
        try:
            session = _session(self._path, self._options, profile=self._profile)
            axis = _batch_axis(session)
            if isinstance(axis, str):
                session = _session(self._path, self._options, axis, profile=self._profile)
            _check_shape(session, self._options)
            for put in session.get_inputs():
                if put.type not in _NUMPY:
                    raise ValueError(f"The graph's input {put.name!r} is a {put.type}, which is not supported.")
        except _failures() as error:
            raise BuildError(
                f"ONNX Runtime cannot open {self._path}: {error} The file may be damaged; build it again from its "
                "ONNX file."
            ) from error
        self._ports = [Port(put.name, tuple(put.shape), _NUMPY[put.type]) for put in session.get_inputs()]
        self._session = session
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the session."""
        self._session = self._binding = self._output = None

    def infer(self, inputs: Array) -> Array:
        """Run ``(batch_size, ...)`` inputs and return the first output, float32."""
        self.prepare(inputs)
        self.run()
        return np.array(self._output.numpy(), dtype=np.float32)

    def prepare(self, inputs: Array) -> None:
        """Bind a copy of the inputs, in the graph's element types, and an output buffer."""
        if self._session is None:
            raise BuildError(f"{self._path} is not open; use its runner as a context manager.")
        value = _runtime().OrtValue
        given = unpacked(inputs, self._ports, self._path)
        bound = {p.name: value.ortvalue_from_numpy(np.array(a)) for p, a in zip(self._ports, given, strict=True)}
        first_time = self._binding is None
        if first_time:
            self._binding = self._session.io_binding()
        for input_name, tensor in bound.items():
            self._binding.bind_ortvalue_input(input_name, tensor)
        if first_time:
            # The first run tells the output's shape; from then on it is written in place.
            name = self._session.get_outputs()[0].name
            self._binding.bind_output(name)
            self._run()
            first = self._binding.get_outputs()[0].numpy()
            self._output = value.ortvalue_from_numpy(np.array(first))
            self._binding.clear_binding_outputs()
            self._binding.bind_ortvalue_output(name, self._output)

    def time_request(self, inputs: Array, clock: Callable[[], int]) -> int:
        """Run without bound buffers."""
        given = unpacked(inputs, self._ports, self._path)
        feeds = {port.name: array for port, array in zip(self._ports, given, strict=True)}
        begin = clock()
        self._session.run(None, feeds)
        return clock() - begin

    def run(self) -> None:
        """Run once on the bound buffers: 9 µs a call for an empty graph."""
        self._session.run_with_iobinding(self._binding)

    def end_profiling(self) -> Path:
        """Stop the profiler and return its file."""
        return Path(self._session.end_profiling())

    def _run(self) -> None:
        try:
            self.run()
        except _failures() as error:
            raise BuildError(f"ONNX Runtime cannot run {self._path}: {error}") from error


def _failures() -> tuple[type[Exception], ...]:
    """Return what the runtime raises; its own exceptions have no common base but `Exception`."""
    state = optional("onnxruntime.capi.onnxruntime_pybind11_state", ONNXRuntimeEngine.extra, "The engine 'onnxruntime'")
    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (RuntimeError, ValueError, TypeError, OSError, *own)


def _session(
    path: Path,
    options: EngineOptions,
    batch_axis: str | None = None,
    save: Path | None = None,
    profile: Path | None = None,
) -> Any:
    """Load a graph; with `batch_axis` its dimension of this name is fixed, with `save` the plain graph is written.

    With `profile` the optimised graph is written to this folder, and events when profiling ends.
    """
    runtime = _runtime()
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    settings.log_severity_level = _FATAL
    level = runtime.GraphOptimizationLevel
    settings.graph_optimization_level = level.ORT_ENABLE_ALL if save is None else level.ORT_DISABLE_ALL
    if batch_axis is not None:
        settings.add_free_dimension_override_by_name(batch_axis, options.batch_size)
    if save is not None:
        settings.optimized_model_filepath = str(save)
    if profile is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile / EVENTS)
        settings.optimized_model_filepath = str(profile / OPTIMISED)
    return runtime.InferenceSession(str(path), settings, providers=_PROVIDERS)


def _batch_axis(session: Any) -> int | str | None:
    """Return the batch axis: its size, its name when dynamic, or None for a nameless dynamic one."""
    inputs = session.get_inputs()
    if not inputs:
        raise ValueError("The graph has no input.")
    axes = [put.shape[0] if put.shape else None for put in inputs]
    named = [axis for axis in axes if isinstance(axis, str)]
    return cast("int | str | None", named[0] if named else axes[0])


def _check_shape(session: Any, options: EngineOptions) -> None:
    inputs = session.get_inputs()
    for put in inputs:
        name = "the input's shape" if len(inputs) == 1 else f"the shape of input {put.name!r}"
        if not all(isinstance(axis, int) for axis in put.shape):
            raise ValueError(f"Only one named batch axis may be dynamic, but {name} is {put.shape}.")
        if put.shape[:1] != [options.batch_size]:
            size = put.shape[0] if put.shape else "none"
            raise ValueError(f"The graph's batch size is {size}, but {options.batch_size} was asked for.")


def _copy(onnx: Path, target: Path) -> None:
    """Copy a graph, drawing weights from beside it in."""
    # Entries of external weights always have the key "location"; looking for it is cheap, parsing is not.
    if b"location" in onnx.read_bytes():
        package = optional("onnx", ONNXRuntimeEngine.extra, "A graph with external weights")
        package.save(package.load(str(onnx)), str(target))
    else:
        shutil.copyfile(onnx, target)


def _fix_batch(path: Path, axis: str, options: EngineOptions) -> None:
    fixed = path.with_name(f"fixed-{path.name}")
    _session(path, options, axis, save=fixed)
    fixed.replace(path)


ENGINE_CLASSES = (ONNXRuntimeEngine,)
