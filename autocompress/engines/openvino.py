"""OpenVINO on the CPU: ONNX to IR (``.xml`` and ``.bin``) to `Runner`.

Precision of integer layers is in the graph (Q/DQ); the dtype of all others is `EngineOptions.dtype`, always given to
the runtime, which would otherwise choose bf16 by itself where the processor has it. Must not import torch or onnx.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from autocompress._optional import optional
from autocompress.engines.base import Array, Engine, EngineFile, EngineOptions, Runner
from autocompress.engines.kernel_attribution import KernelTime
from autocompress.engines.openvino_profile import kernel_times
from autocompress.engines.ports import Port, unpacked
from autocompress.engines.rules import MONOTONE, QdqRules
from autocompress.errors import BuildError, UnsupportedDtypeError

_DEVICE = "CPU"
# Our dtype, the capability that says the device computes in it, and the value of INFERENCE_PRECISION_HINT.
_DENSE = {"fp32": ("FP32", "f32"), "bf16": ("BF16", "bf16"), "fp16": ("FP16", "f16")}
# Where the IR says what it was built for, so that the file tells without its companions.
_RT_INFO = "autocompress"


def _runtime() -> Any:
    if "openvino" not in sys.modules:
        # Importing it reports to its makers, from a forked process that hangs for good when another thread was reading
        # stdin. Without this package its own stub takes its place; whoever imported it before, meant it.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return optional("openvino", OpenVINOEngine.extra, "The engine 'openvino'")


def _core() -> Any:
    return _kept_core(_runtime())


@cache
def _kept_core(runtime: Any) -> Any:
    """Return the runtime's core: one for the whole life of the process.

    Its CPU plugin gives the calling thread a stack for signals and takes it back with the core, but not when another
    core was made since, nor when another thread lets go of it. The thread is then left with a stack that is no longer
    there, and the next signal (an ended child process, for one) ends this process with SIGSEGV.
    """
    return runtime.Core()


@cache
def _computes_in(dtype: str) -> bool:
    """Return whether a small matrix product runs in a dtype.

    The plugin lists dtypes by what the processor is. What its library may use of that can be less
    (``ONEDNN_MAX_CPU_ISA``): then every network in bf16 ends with "object is not initialized".
    """
    if dtype == "fp32":
        return True
    openvino, size = _runtime(), 64
    operations = openvino.opset13
    inputs = operations.parameter([1, size], np.float32)
    product = operations.matmul(inputs, operations.constant(np.ones((size, size), np.float32)), False, False)
    model = openvino.Model([product], [inputs], "probe")
    try:
        compiled = _core().compile_model(model, _DEVICE, _properties(EngineOptions(dtype)))
        found = compiled(np.ones((1, size), np.float32))[0]
    except RuntimeError:
        return False
    return bool(np.all(found == size))


# How the runtime lists operations that it has no form of.
_UNKNOWN = "No conversion rule found for operations:"


def _words(error: BaseException) -> str:
    """Return the runtime's message without its C++ source locations."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith("Exception from ")]
    unknown = next((line.partition(_UNKNOWN)[2].strip() for line in kept if _UNKNOWN in line), None)
    if unknown is not None:
        return (
            f"it does not know the operation {unknown}. Replace the layer that computes it, or take another engine "
            "(--engine onnxruntime)."
        )
    return " ".join(kept) or str(error).strip() or type(error).__name__


class OpenVINOEngine(Engine):
    """OpenVINO's CPU plugin. Stateless; the runtime's core is made on first use."""

    name = "openvino"
    suffix = ".xml"
    extra = "openvino"
    opens = (".xml", ".onnx")
    qdq_rules = QdqRules(
        hoist=MONOTONE, shifted_codes=True, uneven_bias=True, dense_behind_reductions=True, own_weights=True,
        whole_attention=True,
    )  # fmt: skip

    def version(self) -> str:
        """Return the runtime's version, as ``"2026.4.1"``."""
        return cast(str, _runtime().get_version()).partition("-")[0]

    def device(self) -> str:
        """Return the processor's name."""
        return cast(str, _core().get_property(_DEVICE, "FULL_DEVICE_NAME"))

    def capabilities(self) -> Sequence[str]:
        """Return the dtypes the plugin computes in here. Listed is not fast: fp16 can be slower than fp32."""
        listed = set(_core().get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES"))
        dense = [dtype for dtype, (capability, _) in _DENSE.items() if capability in listed and _computes_in(dtype)]
        return (*dense, "int8") if "INT8" in listed else tuple(dense)

    def build(self, onnx: Path, options: EngineOptions, output: Path) -> EngineFile:
        """Convert to IR, after compiling it once with these options to prove that it runs.

        Weights are stored as fp16 when `options.dtype` is not fp32. The two files appear whole or not at all.

        Raises:
            BuildError: The runtime refused the graph; carries its own words.
            UnsupportedDtypeError: `options.dtype` is not among `capabilities`.
        """
        self._check(options)
        openvino = _runtime()
        path = output.with_suffix(self.suffix)
        try:
            model = _read(onnx, options)
            model.set_rt_info(options.dtype, [_RT_INFO, "dtype"])
            model.set_rt_info(str(options.batch_size), [_RT_INFO, "batch_size"])
            _core().compile_model(model, _DEVICE, _properties(options))
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
                fresh = Path(folder) / path.name
                openvino.save_model(model, fresh, compress_to_fp16=options.dtype != "fp32")
                # The weights first: an `.xml` is never seen without its `.bin`.
                fresh.with_suffix(".bin").replace(path.with_suffix(".bin"))
                fresh.replace(path)
        except (RuntimeError, TypeError, ValueError, OSError) as error:
            raise BuildError(f"OpenVINO cannot build {onnx}: {_words(error)} The ONNX file is kept.") from error
        return EngineFile(self.name, path, options)

    def open(self, file: EngineFile, threads: int | None = None) -> Runner:
        """Return a runner of an IR, or of an ONNX file compiled on the spot."""
        options = file.options
        if threads is not None:
            options = EngineOptions(options.dtype, threads, options.batch_size)
        self._check(options)
        return OpenVINORunner(file.path, options)

    def kernel_times(self, file: EngineFile, inputs: Array, seconds: float) -> list[KernelTime]:
        """Return the kernels in the order they run, with the times that the plugin counted.

        Raises:
            BuildError: The file is damaged, or takes other inputs.
        """
        self._check(file.options)
        properties = {**_properties(file.options), "PERF_COUNT": True}
        try:
            model = _read(file.path, file.options)
            bound = [np.array(array) for array in unpacked(inputs, _ports(model), file.path)]
            tensors = [_runtime().Tensor(array, shared_memory=True) for array in bound]
            return kernel_times(model, lambda: _core().compile_model(model, _DEVICE, properties), tensors, seconds)
        except (RuntimeError, TypeError, ValueError, OSError) as error:
            raise BuildError(f"OpenVINO cannot profile {file.path}: {_words(error)}") from error

    def _check(self, options: EngineOptions) -> None:
        dense = [c for c in self.capabilities() if c in _DENSE]
        if options.dtype not in dense:
            raise UnsupportedDtypeError(
                f"OpenVINO does not run layers in {options.dtype!r} on {self.device()}; choose one of "
                f"{', '.join(dense)}. (int8 layers are expressed by Q/DQ in the graph.)"
            )


class OpenVINORunner(Runner):
    """One compiled model with one infer request, run on the calling thread and `threads` - 1 helpers."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        self._path, self._options = path, options
        self._request: Any = None
        self._ports: list[Port] = []
        self._bound: list[Array] = []

    def __enter__(self) -> Self:
        """Read and compile the model."""
        try:
            model = _read(self._path, self._options)
            compiled = _core().compile_model(model, _DEVICE, _properties(self._options))
            self._ports = _ports(compiled)
            self._request = compiled.create_infer_request()
        except (RuntimeError, TypeError, ValueError, OSError) as error:
            raise BuildError(
                f"OpenVINO cannot open {self._path}: {_words(error)} The file may be damaged or come from another "
                "release; build it again from its ONNX file."
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the compiled model."""
        self._request, self._bound = None, []

    def infer(self, inputs: Array) -> Array:
        """Run ``(batch_size, ...)`` inputs and return the first output, float32."""
        self.prepare(inputs)
        self.run()
        return np.array(self._request.get_output_tensor(0).data, dtype=np.float32)

    def prepare(self, inputs: Array) -> None:
        """Bind a copy of the inputs, in the graph's element types."""
        if self._request is None:
            raise BuildError(f"{self._path} is not open; use its runner as a context manager.")
        self._bound = [np.array(array) for array in unpacked(inputs, self._ports, self._path)]
        for index, array in enumerate(self._bound):
            self._request.set_input_tensor(index, _runtime().Tensor(array, shared_memory=True))

    def time_request(self, inputs: Array, clock: Callable[[], int]) -> int:
        """Copy inputs in, run, copy outputs out: 6 µs more than `run` for a small image."""
        given = unpacked(inputs, self._ports, self._path)
        begin = clock()
        for bound, array in zip(self._bound, given, strict=True):
            np.copyto(bound, array)
        self._request.infer(share_outputs=True)
        np.array(self._request.get_output_tensor(0).data)
        return clock() - begin

    def run(self) -> None:
        """Run once. Outputs are shared, not copied: 14 µs a call for an empty graph, of which Python is under 1."""
        self._request.infer(share_outputs=True)


def _read(path: Path, options: EngineOptions) -> Any:
    """Read a model and fix its batch axis where that is dynamic."""
    model = _core().read_model(path)
    if not model.inputs:
        raise ValueError("The graph has no input.")
    fixed = {}
    for port in model.inputs:
        shape = port.get_partial_shape()
        if len(shape) and shape[0].is_dynamic:
            shape[0] = options.batch_size
            fixed[port] = shape
    if fixed:
        model.reshape(fixed)
    for port in model.inputs:
        shape = port.get_partial_shape()
        name = "the input's shape" if len(model.inputs) == 1 else f"the shape of input {port.get_any_name()!r}"
        if shape.is_dynamic:
            raise ValueError(f"Only the batch axis may be dynamic, but {name} is {shape}.")
        if len(shape) and shape[0].get_length() != options.batch_size:
            raise ValueError(
                f"The graph's batch size is {shape[0].get_length()}, but {options.batch_size} was asked for."
            )
    return model


def _ports(model: Any) -> list[Port]:
    """Return the inputs of a model, compiled or not."""
    return [
        Port(port.get_any_name(), tuple(port.get_shape()), np.dtype(port.get_element_type().to_dtype()))
        for port in model.inputs
    ]


def _properties(options: EngineOptions) -> dict[str, Any]:
    return {
        "INFERENCE_NUM_THREADS": options.threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": _DENSE[options.dtype][1],
        "PERFORMANCE_HINT": "LATENCY",
        # The process' affinity decides where threads run, or two opened engines would fight for the first cores.
        "ENABLE_CPU_PINNING": False,
        "ENABLE_HYPER_THREADING": True,
    }


ENGINE_CLASSES = (OpenVINOEngine,)
