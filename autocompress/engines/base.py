"""The `Engine` and `Runner` interfaces: an ONNX file becomes an engine file, which becomes something that runs.

Engines run in the child process of `measurement`, which imports numpy and the runtime alone: nothing in this package
imports torch. Adding an engine is one new module with `ENGINE_CLASSES`; it is found by itself.
"""

from __future__ import annotations

import abc
import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, ClassVar, Self

from numpy.typing import NDArray
from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from autocompress.documents import validated
from autocompress.engines.kernel_attribution import KernelTime
from autocompress.engines.rules import QdqRules
from autocompress.errors import ConfigError, UnavailableError
from autocompress.policy import DENSE_DTYPES

Array = NDArray[Any]
Settings = Sequence[tuple[str, Any]]
_Scalar = bool | int | float | str | None


@with_config(ConfigDict(extra="forbid"))
class _OptionsDocument(TypedDict, total=False):
    """The JSON form of `EngineOptions`."""

    dtype: Annotated[str, Field(max_length=32)]
    threads: Annotated[int, Field(ge=1, le=4096)]
    batch_size: Annotated[int, Field(ge=1, le=2**20)]
    settings: dict[str, _Scalar | list[_Scalar]]


@dataclass(frozen=True)
class EngineOptions:
    """How an engine file is built and opened.

    Attributes:
        dtype: What layers without Q/DQ run in: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        threads: Threads of one inference call.
        batch_size: Samples of one inference call; the graph's batch axis is fixed to it.
        settings: What this engine alone has, by name (`tensorrt_options.TensorRTOptions`); given as a mapping or pairs.
    """

    dtype: str = "fp32"
    threads: int = 1
    batch_size: int = 1
    settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        # Options are keys of caches: whatever mapping or JSON list came in becomes sorted pairs.
        pairs = self.settings.items() if isinstance(self.settings, Mapping) else self.settings
        object.__setattr__(self, "settings", tuple(sorted((str(k), _frozen(v)) for k, v in pairs)))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        data = asdict(self)
        # Left out when empty, so that what CPU engines write stays as every release reads it.
        settings = dict(data.pop("settings"))
        return {**data, "settings": settings} if settings else data

    @classmethod
    def from_dict(cls, data: Any, source: object) -> Self:
        """Read the JSON form.

        Raises:
            ConfigError: It is not that; names `source`.
        """
        found: dict[str, Any] = dict(validated(_OptionsDocument, data, source))
        return cls(**found)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class EngineFile:
    """A built engine on disk.

    Attributes:
        engine: Name of the engine that built it.
        path: The file to open; companions (weights beside a graph) share its stem and lie beside it.
        options: What it was built with, and must be opened with to give the measured latency.
    """

    engine: str
    path: Path
    options: EngineOptions

    def files(self) -> tuple[Path, ...]:
        """Return every file of this engine, `path` first."""
        others = sorted(p for p in self.path.parent.glob(f"{glob.escape(self.path.stem)}.*") if p != self.path)
        # `model.onnx` beside `model.xml` is the graph the engine was built from, not a part of it.
        return (self.path, *(p for p in others if p.suffix in COMPANION_SUFFIXES.get(self.path.suffix, ())))

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(p.stat().st_size for p in self.files())


# Which files belong to an engine file of this suffix.
COMPANION_SUFFIXES: Mapping[str, tuple[str, ...]] = {".xml": (".bin",), ".engine": (".json",)}


def dense_dtypes(capabilities: Sequence[str], wanted: str, engine: str) -> tuple[str, ...]:
    """Return the dense dtypes among an engine's capabilities, or the one that is wanted unless that is ``"best"``.

    Raises:
        ConfigError: The one wanted is not among them.
    """
    available = tuple(dtype for dtype in capabilities if dtype in DENSE_DTYPES)
    if wanted == "best":
        return available
    if wanted not in available:
        raise ConfigError(f"dense_dtype {wanted!r} does not run on {engine}; it runs {', '.join(available)}.")
    return (wanted,)


class Runner(abc.ABC):
    """An opened engine. A context manager: the device is not touched before ``__enter__``."""

    @abc.abstractmethod
    def __enter__(self) -> Self:
        """Load the engine on the device.

        Raises:
            BuildError: The file is damaged or from another runtime.
        """

    @abc.abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the device."""

    @abc.abstractmethod
    def infer(self, inputs: Array) -> Array:
        """Run ``(batch_size, ...)`` inputs and return ``(batch_size, ...)`` outputs, both float32."""

    @abc.abstractmethod
    def prepare(self, inputs: Array) -> None:
        """Bind inputs ``(batch_size, ...)`` once, so that `run` times inference alone."""

    @abc.abstractmethod
    def run(self) -> None:
        """Run one synchronous inference on the bound inputs and drop the outputs. This is what is timed."""

    def time_run(self, clock: Callable[[], int]) -> int:
        """Call `run` once and return how long it took, in ns: by `clock`, or by the device's own where it has one."""
        begin = clock()
        self.run()
        return clock() - begin

    def time_request(self, inputs: Array, clock: Callable[[], int]) -> int:
        """Answer one request as a deployed ``run.py`` does, inputs in and outputs out; return how long it took, in ns.

        Where the device has a clock of its own, transfers are left out.

        Args:
            inputs: ``(batch_size, ...)``, float32; other ones than the last request's.
            clock: Returns ns.
        """
        self.prepare(inputs)
        return self.time_run(clock)


class Engine(abc.ABC):
    """One inference runtime on this machine.

    Attributes:
        name: As users write it, ``"openvino"``.
        suffix: Of its engine files, ``".xml"``.
        extra: The package extra that installs the runtime.
        uses_gpu: Whether it runs on the GPU, whose energy and clocks then matter.
        opens: Suffixes of bare files that it opens.
        qdq_rules: How it wants its Q/DQ.
        kernels_in_order: Whether `kernel_times` gives kernels in the order in which they ran, and the engine converts a
            tensor (to another layout, to int8 and back) next to the kernel that reads it. What such a conversion costs
            is decided by that layer and what it reads.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    extra: ClassVar[str]
    uses_gpu: ClassVar[bool] = False
    opens: ClassVar[tuple[str, ...]] = (".onnx",)
    qdq_rules: ClassVar[QdqRules] = QdqRules()
    kernels_in_order: ClassVar[bool] = False

    @abc.abstractmethod
    def version(self) -> str:
        """Return the runtime's version."""

    @abc.abstractmethod
    def device(self) -> str:
        """Return the device's full name."""

    @abc.abstractmethod
    def capabilities(self) -> Sequence[str]:
        """Return the dtypes that the runtime really computes in on this device, dense dtypes first."""

    def describe(self, settings: Settings = ()) -> tuple[str, Sequence[str]]:
        """Return `device` and `capabilities` under these engine settings.

        Raises:
            ConfigError: The engine has no settings, and some were given.
        """
        if settings:
            given = ", ".join(name for name, _ in settings)
            raise ConfigError(f"The engine {self.name!r} has no engine_options, but {given} was given. Remove it.")
        return self.device(), self.capabilities()

    def runs_here(self, settings: Settings = ()) -> bool:
        """Return whether what is built under these settings can be run on this machine."""
        return True

    @abc.abstractmethod
    def build(self, onnx: Path, options: EngineOptions, output: Path) -> EngineFile:
        """Turn an ONNX file into an engine file at `output` (its suffix replaced by the engine's).

        Raises:
            BuildError: The runtime refused the graph; carries its own words.
            UnsupportedDtypeError: `options.dtype` is not among `capabilities`.
        """

    @abc.abstractmethod
    def open(self, file: EngineFile, threads: int | None = None) -> Runner:
        """Return a runner, not yet on the device, with `threads` in place of the options' when given."""

    def kernel_times(self, file: EngineFile, inputs: Array, seconds: float) -> list[KernelTime]:
        """Run an engine with the runtime's profiler for about `seconds` and return its kernels as they run.

        `inputs` ``(batch_size, ...)`` are of the file's batch size. Times are of one inference and comparable with
        each other; end to end there is the overhead of the call besides, which an empty graph has too.

        Raises:
            BuildError: The file is damaged, or takes other inputs.
            UnavailableError: This runtime does not tell.
        """
        raise UnavailableError(f"The engine {self.name!r} does not tell the times of single kernels.")
