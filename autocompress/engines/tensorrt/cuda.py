"""The part of CUDA that a TensorRT runner needs: devices, buffers, streams, events and graphs, through cuda-bindings.

Every call goes through `call`, which turns CUDA's status into our errors with what to do about it. No CUDA call is made
on import, nor before an engine is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from autocompress._optional import optional
from autocompress.engines.tensorrt.compute_capability import ComputeCapability
from autocompress.errors import BuildError, DeviceNotFoundError

_NO_DRIVER = (
    "No NVIDIA driver answers here ({name}). Run nvidia-smi: when it fails, install the driver "
    "(https://www.nvidia.com/drivers) and restart; in a container, start it with --gpus all. CUDA 13 needs driver 580 "
    "or newer, CUDA 12 needs 525: with an older driver, upgrade it or install the packages for its CUDA version. To "
    "build without a GPU use --engine tensorrt-rtx --compute-capability 8.9 (or whichever the target has)."
)
_NO_DEVICE = (
    "The NVIDIA driver works but shows no GPU ({name}). Check `nvidia-smi -L` and CUDA_VISIBLE_DEVICES, and in a "
    "container --gpus all."
)
_NO_MEMORY = (
    "The GPU is out of memory ({name}). See nvidia-smi for who else uses it; lower the batch size or "
    "engine_options.workspace."
)
# Names of cudaError_t members whose cause the user can remove.
_DRIVER_ERRORS = frozenset(
    {
        "cudaErrorInsufficientDriver",
        "cudaErrorStubLibrary",
        "cudaErrorSystemDriverMismatch",
        "cudaErrorInitializationError",
        "cudaErrorCompatNotSupportedOnDevice",
        "cudaErrorSystemNotReady",
    }
)
_DEVICE_ERRORS = frozenset({"cudaErrorNoDevice", "cudaErrorInvalidDevice", "cudaErrorDevicesUnavailable"})


def runtime() -> Any:
    """Return cuda-bindings' runtime module.

    Raises:
        MissingDependencyError: It is not installed.
    """
    return optional("cuda.bindings.runtime", "tensorrt", "Running on an NVIDIA GPU")


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of cuda-bindings and return its value, a tuple of several, or None.

    Raises:
        DeviceNotFoundError: There is no driver or no GPU; says what to do.
        BuildError: CUDA refused, out of memory included.
    """
    what = getattr(function, "__name__", "CUDA")
    try:
        status, *values = function(*arguments)
    except (RuntimeError, ImportError, OSError) as error:
        # Without the driver's library cuda-bindings cannot find the function, and says so in several ways.
        raise DeviceNotFoundError(_NO_DRIVER.format(name=str(error).splitlines()[0])) from error
    name = getattr(status, "name", str(status))
    if name != "cudaSuccess":
        raise _error(what, name)
    return values[0] if len(values) == 1 else tuple(values) or None


def _error(what: str, name: str) -> DeviceNotFoundError | BuildError:
    if name in _DRIVER_ERRORS:
        return DeviceNotFoundError(_NO_DRIVER.format(name=name))
    if name in _DEVICE_ERRORS:
        return DeviceNotFoundError(_NO_DEVICE.format(name=name))
    if name == "cudaErrorMemoryAllocation":
        return BuildError(_NO_MEMORY.format(name=name))
    return BuildError(f"CUDA refused {what}: {name}. After such an error the process must be started again.")


@dataclass(frozen=True)
class Gpu:
    """The GPU that CUDA gives this process.

    Attributes:
        name: As the driver gives it.
        compute_capability: Its generation.
        memory_bytes, l2_bytes: Device memory, and L2 cache.
        driver_cuda: Newest CUDA version that the driver runs, such as ``"13.0"``.
        runtime_cuda: CUDA version of the runtime library.
    """

    name: str
    compute_capability: ComputeCapability
    memory_bytes: int
    l2_bytes: int
    driver_cuda: str
    runtime_cuda: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**asdict(self), "compute_capability": str(self.compute_capability)}


def current_gpu() -> Gpu:
    """Return the first GPU that this process may use.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
        DeviceNotFoundError: No driver, an old one, or no GPU.
    """
    cuda = runtime()
    if call(cuda.cudaGetDeviceCount) < 1:
        raise DeviceNotFoundError(_NO_DEVICE.format(name="0 devices"))
    call(cuda.cudaSetDevice, 0)
    found = call(cuda.cudaGetDeviceProperties, 0)
    return Gpu(
        name=found.name.decode(errors="replace").rstrip("\0"),
        compute_capability=ComputeCapability(int(found.major), int(found.minor)),
        memory_bytes=int(found.totalGlobalMem),
        l2_bytes=int(found.l2CacheSize),
        driver_cuda=_version(call(cuda.cudaDriverGetVersion)),
        runtime_cuda=_version(call(cuda.cudaRuntimeGetVersion)),
    )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


class Stream:
    """A stream of its own, with two timing events. Freed by `close`."""

    def __init__(self) -> None:
        self._cuda = runtime()
        self.handle: Any = call(self._cuda.cudaStreamCreateWithFlags, self._cuda.cudaStreamNonBlocking)
        self._begin: Any = call(self._cuda.cudaEventCreate)
        self._end: Any = call(self._cuda.cudaEventCreate)
        self._graph: Any = None

    @property
    def number(self) -> int:
        """The handle as TensorRT takes it."""
        return int(self.handle)

    def synchronize(self) -> None:
        """Wait for everything on the stream."""
        call(self._cuda.cudaStreamSynchronize, self.handle)

    def time(self, work: Callable[[], None]) -> float:
        """Enqueue `work`, wait for it, and return the milliseconds between events before and after it."""
        call(self._cuda.cudaEventRecord, self._begin, self.handle)
        work()
        call(self._cuda.cudaEventRecord, self._end, self.handle)
        call(self._cuda.cudaEventSynchronize, self._end)
        return float(call(self._cuda.cudaEventElapsedTime, self._begin, self._end))

    def capture(self, work: Callable[[], None]) -> None:
        """Record `work` as a CUDA graph for `replay`.

        Raises:
            BuildError: The work cannot be captured.
        """
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call(self._cuda.cudaStreamBeginCapture, self.handle, mode)
        try:
            work()
        finally:
            graph = call(self._cuda.cudaStreamEndCapture, self.handle)
        self._graph = call(self._cuda.cudaGraphInstantiate, graph, 0)
        call(self._cuda.cudaGraphDestroy, graph)

    def replay(self) -> None:
        """Enqueue what `capture` recorded."""
        call(self._cuda.cudaGraphLaunch, self._graph, self.handle)

    def drop_graph(self) -> None:
        """Free the recorded graph, if there is one."""
        if self._graph is not None:
            call(self._cuda.cudaGraphExecDestroy, self._graph)
            self._graph = None

    def close(self) -> None:
        """Free everything."""
        self.drop_graph()
        for event in (self._begin, self._end):
            call(self._cuda.cudaEventDestroy, event)
        call(self._cuda.cudaStreamDestroy, self.handle)


class Buffer:
    """Device memory with a page-locked twin on the host, of `size` bytes. Freed by `close`.

    Page-locked memory makes copies truly asynchronous, which a captured graph needs.
    """

    def __init__(self, size: int) -> None:
        self._cuda = runtime()
        self.size = max(size, 1)
        self.device: Any = call(self._cuda.cudaMalloc, self.size)
        self.host: Any = call(self._cuda.cudaMallocHost, self.size)

    def upload(self, stream: Stream) -> None:
        """Enqueue the copy host to device."""
        self._copy(self.device, self.host, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)

    def download(self, stream: Stream) -> None:
        """Enqueue the copy device to host."""
        self._copy(self.host, self.device, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)

    def fill(self, stream: Stream) -> None:
        """Enqueue writing zeros over the device memory."""
        call(self._cuda.cudaMemsetAsync, self.device, 0, self.size, stream.handle)

    def _copy(self, to: Any, source: Any, kind: Any, stream: Stream) -> None:
        call(self._cuda.cudaMemcpyAsync, to, source, self.size, kind, stream.handle)

    def close(self) -> None:
        """Free both."""
        call(self._cuda.cudaFree, self.device)
        call(self._cuda.cudaFreeHost, self.host)
