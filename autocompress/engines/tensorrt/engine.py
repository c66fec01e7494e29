"""NVIDIA TensorRT and TensorRT for RTX: ONNX to a serialized engine to `Runner`, one module for both flavours.

Beside an engine ``model.trt.engine`` (RTX: ``model.rtx.engine``) lies ``.json``, which says what built it for which
GPU, and ``.log``, what the library said. dtypes are in the graph: layers without Q/DQ are converted to
`EngineOptions.dtype` before they are parsed. This project's own tests have no GPU: they build engines with TensorRT-RTX
and reach everything else up to the first call of the driver.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from autocompress.engines.base import Array, Engine, EngineFile, EngineOptions, Runner, Settings
from autocompress.engines.kernel_attribution import KernelTime
from autocompress.engines.rules import MONOTONE, QdqRules
from autocompress.engines.tensorrt import compute_capability as table
from autocompress.engines.tensorrt.builder import Built, NetworkBuilder
from autocompress.engines.tensorrt.compute_capability import ComputeCapability
from autocompress.engines.tensorrt.cuda import Gpu, current_gpu
from autocompress.engines.tensorrt.library import FLAVOURS, BuildLog, Flavour
from autocompress.engines.tensorrt.locked_cache import LockedCache, file_name
from autocompress.engines.tensorrt.options import TensorRTOptions
from autocompress.engines.tensorrt.profile import kernel_times
from autocompress.engines.tensorrt.runner import TensorRTRunner, description_of
from autocompress.environment import cache_directory
from autocompress.errors import BuildError, ConfigError, UnsupportedDtypeError
from autocompress.files import write_bytes, write_json, write_text

_DENSE = ("fp32", "bf16", "fp16")
_LEAST_REPEATS, _MOST_REPEATS = 10, 1000


class TensorRTEngine(Engine):
    """TensorRT 10 or 11 on the GPU that is here. Stateless."""

    flavour: Flavour = FLAVOURS[table.TENSORRT]
    name = flavour.name
    suffix = flavour.suffix
    extra = flavour.extra
    uses_gpu = True
    qdq_rules = QdqRules(
        hoist=MONOTONE, signed_only=True, hoist_concat=True, share_residual=True, least_channels=16,
        dense_depthwise=True, whole_attention=True,
    )  # fmt: skip

    def version(self) -> str:
        """Return the library's version."""
        return self.flavour.version()

    def device(self) -> str:
        """Return the GPU's name and compute capability.

        Raises:
            DeviceNotFoundError: No driver or no GPU; says what to do.
        """
        self.flavour.library()
        gpu = current_gpu()
        return f"{gpu.name} (compute capability {gpu.compute_capability})"

    def capabilities(self) -> Sequence[str]:
        """Return the dtypes that the GPU here runs, dense dtypes first, and ``"2:4"`` where it skips such zeros.

        Raises:
            DeviceNotFoundError: No driver or no GPU; says what to do.
        """
        self.flavour.library()
        return table.capabilities(self.name, [current_gpu().compute_capability])

    def describe(self, settings: Settings = ()) -> tuple[str, Sequence[str]]:
        """Return the device and its dtypes under these settings, which may name GPUs that are not here."""
        chosen = TensorRTOptions.from_settings(dict(settings)).compute_capability
        if not chosen:
            return self.device(), self.capabilities()
        self._check_targets(chosen)
        self.flavour.library()
        listed = ", ".join(map(str, chosen))
        return f"compute capability {listed}, ahead of time", table.capabilities(self.name, chosen)

    def runs_here(self, settings: Settings = ()) -> bool:
        """Return False for engines that are built ahead of time for GPUs named in the settings."""
        return self.flavour.needs_gpu_to_build or not TensorRTOptions.from_settings(dict(settings)).compute_capability

    def build(self, onnx: Path, options: EngineOptions, output: Path) -> EngineFile:
        """Build the engine, its description and its log.

        Raises:
            BuildError: The library refused the graph; carries its own words.
            UnsupportedDtypeError: A dtype of the options or of the graph does not run on a GPU it is built for.
            ConfigError: An engine option is unknown or does not fit this flavour.
            DeviceNotFoundError: A GPU is needed and is not here.
        """
        settings = TensorRTOptions.from_settings(dict(options.settings))
        path = output.with_suffix(self.suffix)
        log = BuildLog()
        targets, gpu = self._targets(settings)
        self._check_dense(options, targets)
        try:
            cache = self._timing_cache(settings, gpu, log)
            built = NetworkBuilder(self.flavour, settings, log).build(onnx, options, targets, cache)
        except BuildError:
            if onnx.exists():
                write_text(path.with_suffix(".log"), log.text())
            raise
        write_text(path.with_suffix(".log"), log.text())
        write_json(description_of(path), self._description(built, targets, gpu, settings))
        write_bytes(path, built.data)
        return EngineFile(self.name, path, options)

    def open(self, file: EngineFile, threads: int | None = None) -> Runner:
        """Return a runner of an engine file, or of an ONNX file that is built when it is entered.

        `threads` are the processor's, of which running on a GPU needs one.
        """
        settings = TensorRTOptions.from_settings(dict(file.options.settings))
        if file.path.suffix == ".onnx":
            self._check_dense(file.options, settings.compute_capability)
            return _BuildingRunner(self, file)
        return TensorRTRunner(self.flavour, file.path, file.options, settings, self._runtime_cache(settings))

    def kernel_times(self, file: EngineFile, inputs: Array, seconds: float) -> list[KernelTime]:
        """Return the engine's layers in their order, with the times that the library's profiler reported.

        Raises:
            BuildError: The file is damaged, or takes other inputs.
            DeviceNotFoundError: No driver or no GPU.
        """
        settings = TensorRTOptions.from_settings(dict(file.options.settings))
        runner = TensorRTRunner(self.flavour, file.path, file.options, settings, self._runtime_cache(settings))
        with runner:
            runner.prepare(inputs)
            begun = time.perf_counter()
            runner.run()
            once = max(time.perf_counter() - begun, 1e-6)
            repeats = min(max(round(seconds / once), _LEAST_REPEATS), _MOST_REPEATS)
            return kernel_times(runner.layers(), runner.profile(repeats), repeats)

    # -- details ------------------------------------------------------------------------------------------------

    def _targets(self, settings: TensorRTOptions) -> tuple[Sequence[ComputeCapability], Gpu | None]:
        """Return what to build for, and the GPU here where one is needed."""
        self._check_targets(settings.compute_capability)
        if settings.compute_capability and not self.flavour.needs_gpu_to_build:
            return settings.compute_capability, None
        gpu = current_gpu()
        if settings.compute_capability and settings.compute_capability != (gpu.compute_capability,):
            raise ConfigError(
                f"TensorRT builds for the GPU it runs on, {gpu.name} with compute capability {gpu.compute_capability}; "
                f"leave compute_capability away, or build for {', '.join(map(str, settings.compute_capability))} there."
            )
        return (gpu.compute_capability,), gpu

    def _check_targets(self, targets: Sequence[ComputeCapability]) -> None:
        """Nothing to refuse before the GPU is known."""

    def _check_dense(self, options: EngineOptions, targets: Sequence[ComputeCapability]) -> None:
        if options.dtype not in _DENSE:
            raise UnsupportedDtypeError(
                f"TensorRT does not run layers without Q/DQ in {options.dtype!r}; choose fp32, bf16 or fp16. (Other "
                "dtypes are expressed by Q/DQ in the graph.)"
            )
        table.require(self.name, [options.dtype], targets)

    def _description(
        self, built: Built, targets: Sequence[ComputeCapability], gpu: Gpu | None, settings: TensorRTOptions
    ) -> dict[str, Any]:
        return {
            "engine": self.name,
            "engine_version": self.version(),
            "compute_capability": [str(t) for t in targets],
            "gpu": gpu.name if gpu else None,
            "dtypes": list(built.dtypes),
            "fp32_nodes": list(built.fp32_nodes),
            "batch": list(built.batch),
            "hardware_compatible": settings.hardware_compatible,
            "version_compatible": settings.version_compatible,
            "sparse_weights": settings.sparse_weights,
            "refit": settings.refit,
            "bytes": len(built.data),
            "sha256": hashlib.sha256(built.data).hexdigest(),
        }

    def _timing_cache(self, settings: TensorRTOptions, gpu: Gpu | None, log: BuildLog) -> LockedCache | None:
        """Return the timing cache of this version and GPU, or None."""
        if gpu is None or settings.timing_cache == "off":
            return None
        return self._cache("timing", settings, gpu, lambda text: log.add("WARNING", text))

    def _runtime_cache(self, settings: TensorRTOptions) -> Callable[[Gpu, Callable[[str], None]], LockedCache | None]:
        """Return what makes a cache of kernels compiled when an engine is opened; TensorRT compiles none."""
        return lambda gpu, tell: None

    def _cache(self, kind: str, settings: TensorRTOptions, gpu: Gpu, tell: Callable[[str], None]) -> LockedCache:
        if settings.timing_cache != "auto":
            return LockedCache(Path(settings.timing_cache), tell)
        name = file_name(self.name, kind, self.version(), gpu.name, str(gpu.compute_capability))
        return LockedCache(cache_directory() / "tensorrt" / f"{name}.cache", tell)


class TensorRTRTXEngine(TensorRTEngine):
    """TensorRT for RTX: builds for any RTX GPU, without one when `compute_capability` is set. Stateless."""

    flavour: Flavour = FLAVOURS[table.TENSORRT_RTX]
    name = flavour.name
    suffix = flavour.suffix
    extra = flavour.extra

    def _check_targets(self, targets: Sequence[ComputeCapability]) -> None:
        table.rtx_targets(targets)

    def _targets(self, settings: TensorRTOptions) -> tuple[Sequence[ComputeCapability], Gpu | None]:
        if settings.version_compatible:
            raise ConfigError(
                "TensorRT-RTX has no version_compatible engines (its wheel lacks the lean runtime); build again for "
                "each version, which takes seconds, or use --engine tensorrt."
            )
        targets, gpu = super()._targets(settings)
        self._check_targets(targets)
        if settings.refit and gpu is None:
            # 1.7 fails with CUDA_SUCCESS checks deep in its compiler; on a GPU this is for the user to find out.
            raise ConfigError(
                "TensorRT-RTX cannot build a refittable engine without a GPU. Leave refit away, or build on the GPU "
                "without compute_capability."
            )
        return targets, gpu

    def _timing_cache(self, settings: TensorRTOptions, gpu: Gpu | None, log: BuildLog) -> LockedCache | None:
        """Return None: RTX times nothing while it builds, and asking it for a timing cache makes it look for a GPU."""
        return None

    def _runtime_cache(self, settings: TensorRTOptions) -> Callable[[Gpu, Callable[[str], None]], LockedCache | None]:
        if settings.timing_cache == "off":
            return super()._runtime_cache(settings)
        return lambda gpu, tell: self._cache("runtime", settings, gpu, tell)


class _BuildingRunner(Runner):
    """A runner of an ONNX file: builds it into a temporary folder when entered."""

    def __init__(self, engine: TensorRTEngine, file: EngineFile) -> None:
        self._engine, self._file = engine, file
        self._folder: Path | None = None
        self._inner: Runner | None = None

    def __enter__(self) -> Self:
        """Build and open."""
        self._folder = Path(tempfile.mkdtemp(prefix="autocompress-tensorrt-"))
        try:
            built = self._engine.build(self._file.path, self._file.options, self._folder / "model")
            self._inner = self._engine.open(built).__enter__()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the GPU and remove the folder."""
        if self._inner is not None:
            self._inner.__exit__(kind, error, trace)
        self._inner = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _opened(self) -> Runner:
        if self._inner is None:
            raise BuildError(f"{self._file.path} is not open; use its runner as a context manager.")
        return self._inner

    def infer(self, inputs: Array) -> Array:
        """Run ``(batch_size, ...)`` inputs."""
        return self._opened.infer(inputs)

    def prepare(self, inputs: Array) -> None:
        """Bind inputs."""
        self._opened.prepare(inputs)

    def run(self) -> None:
        """Run once."""
        self._opened.run()

    def time_run(self, clock: Callable[[], int]) -> int:
        """Run once and return the GPU's nanoseconds."""
        return self._opened.time_run(clock)


ENGINE_CLASSES = (TensorRTEngine, TensorRTRTXEngine)
