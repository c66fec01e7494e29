"""TensorRT up to the driver: engines are really built, ahead of time; running one needs a GPU and says so."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from autocompress.engines import EngineFile, EngineOptions, get_engine
from autocompress.engines.tensorrt.compute_capability import ComputeCapability
from autocompress.engines.tensorrt.cuda import Gpu
from autocompress.engines.tensorrt.engine import TensorRTEngine, TensorRTRTXEngine
from autocompress.engines.tensorrt.library import FLAVOURS
from autocompress.engines.tensorrt.runner import check_gpu, check_version, description_of
from autocompress.errors import (
    BuildError,
    ConfigError,
    DeviceNotFoundError,
    MissingDependencyError,
    UnsupportedDtypeError,
)
from autocompress.measurement.client import EngineWorker
from tests.engines import graphs

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX (tensorrt-rtx-cu13) is not installed")
Described = dict[str, Any]


def has_gpu() -> bool:
    from autocompress.engines.tensorrt.cuda import current_gpu

    try:
        current_gpu()
    except DeviceNotFoundError:
        return False
    return True


no_gpu = pytest.mark.skipif(has_gpu(), reason="there is a GPU here")


def options(dtype: str = "fp16", target: str = "8.9", batch_size: int = 1, **settings: Any) -> EngineOptions:
    return EngineOptions(dtype, 1, batch_size, {"compute_capability": target, **settings})  # type: ignore[arg-type]


@pytest.fixture
def engine() -> TensorRTRTXEngine:
    return TensorRTRTXEngine()


@pytest.fixture
def built(engine: TensorRTRTXEngine, tmp_path: Path) -> EngineFile:
    return engine.build(graphs.convnet(tmp_path / "model.onnx"), options(), tmp_path / "model.onnx")


def description(file: EngineFile) -> Described:
    found: Described = json.loads(description_of(file.path).read_text())
    return found


def test_is_registered() -> None:
    assert isinstance(get_engine("tensorrt"), TensorRTEngine)
    assert isinstance(get_engine("tensorrt-rtx"), TensorRTRTXEngine)
    assert get_engine("tensorrt-rtx").version() == trt.__version__


def test_an_engine_with_its_description_and_log(built: EngineFile) -> None:
    assert [p.name for p in built.files()] == ["model.rtx.engine", "model.rtx.json"]
    found = description(built)
    assert found["sha256"] == hashlib.sha256(built.path.read_bytes()).hexdigest()
    assert found["compute_capability"] == ["8.9"]
    assert found["dtypes"] == ["fp32", "fp16"]
    assert found["engine_version"] == trt.__version__
    log = (built.path.parent / "model.rtx.log").read_text()
    assert "PHASE" in log
    assert "Optimizing graph" in log


@pytest.mark.parametrize("target", ["8.0", "8.6", "8.9", "12.0", "8.6,8.9,12.0"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_dtype_builds_for_every_target(
    engine: TensorRTRTXEngine, tmp_path: Path, target: str, dtype: str
) -> None:
    file = engine.build(graphs.quantized(tmp_path / "model.onnx"), options(dtype, target), tmp_path / "model")
    assert set(description(file)["dtypes"]) == {"fp32", dtype, "int8"}


def test_turing_runs_fp16_alone(engine: TensorRTRTXEngine, tmp_path: Path) -> None:
    plain, quantized = graphs.convnet(tmp_path / "a.onnx"), graphs.quantized(tmp_path / "b.onnx")
    assert engine.describe((("compute_capability", "7.5"),))[1] == ("fp16",)
    assert engine.build(plain, options("fp16", "7.5"), tmp_path / "a").size_bytes > 1000
    for graph, dtype, said in (
        (plain, "fp32", "'fp32' on compute capability 7.5"),
        (plain, "bf16", "bf16 .* needs compute capability 8.0"),
        (quantized, "fp16", "int8 .* needs compute capability 8.0"),
    ):
        with pytest.raises(UnsupportedDtypeError, match=said):
            engine.build(graph, options(dtype, "7.5"), tmp_path / "c")
    assert not list(tmp_path.glob("c.*.engine"))


def test_settings_reach_the_builder(engine: TensorRTRTXEngine, tmp_path: Path) -> None:
    graph = graphs.convnet(tmp_path / "model.onnx", batch="n", channels=64, layers=2)
    settings: dict[str, Any] = {
        "workspace": "256MiB",
        "optimization_level": 1,
        "sparse_weights": True,
        "max_batch": 8,
        "tf32": False,
    }
    found = description(engine.build(graph, options(batch_size=2, **settings), tmp_path / "dynamic"))
    assert found["batch"] == [1, 2, 8]
    assert found["sparse_weights"]
    plain = engine.build(graph, options(batch_size=2), tmp_path / "fixed")
    assert description(plain)["batch"] == [2, 2, 2]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"compute_capability": "9.0"}, "builds for 7.5, 8.0"),
        ({"compute_capability": "fast"}, "no compute capability"),
        ({"optimization_level": 6}, "0 to 5"),
        ({"optimization_level": "high"}, "whole number"),
        ({"workspace": "lots"}, "2GB|quantity"),
        ({"refit": "yes"}, "true or false"),
        ({"plugins": "nowhere.so"}, "nowhere.so does not exist"),
        ({"refit": True}, "refittable engine without a GPU"),
        ({"version_compatible": True}, "no version_compatible"),
        ({"workspce": "1GB"}, "Did you mean 'workspace'"),
        ({"hardware_compatible": "all"}, "ampere_plus"),
    ],
)
def test_bad_settings(engine: TensorRTRTXEngine, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    graph = graphs.convnet(tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match=said):
        engine.build(graph, options(**{"target": "8.9", **settings}) if "compute_capability" not in settings
                     else EngineOptions("fp16", settings=settings), tmp_path / "model")  # type: ignore[arg-type]  # fmt: skip


def test_a_plugin_library_that_is_none(engine: TensorRTRTXEngine, tmp_path: Path) -> None:
    library = tmp_path / "plugin.so"
    library.write_bytes(b"not a library" * 99)
    with pytest.raises(BuildError, match=r"plugin\.so cannot be loaded.*ELF"):
        engine.build(graphs.convnet(tmp_path / "m.onnx"), options(plugins=[str(library)]), tmp_path / "m")


def test_sparse_weights_need_ampere(engine: TensorRTRTXEngine, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedDtypeError, match=r"2:4 sparse weights need compute capability 8\.0"):
        engine.build(graphs.convnet(tmp_path / "m.onnx"), options("fp16", "7.5", sparse_weights=True), tmp_path / "m")


def test_unknown_op_is_refused_in_the_runtimes_words(engine: TensorRTRTXEngine, tmp_path: Path) -> None:
    graph = graphs.convnet(tmp_path / "model.onnx", activation="Flurb")
    for dtype in ("fp32", "fp16"):
        with pytest.raises(BuildError, match=r"Flurb.*act0") as caught:
            engine.build(graph, options(dtype), tmp_path / "out" / "model")
        assert str(graph) in str(caught.value)
    # The log of a failed build is kept; nothing that looks like an engine is.
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.rtx.log"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_damaged_graph(engine: TensorRTRTXEngine, tmp_path: Path, dtype: str) -> None:
    graph = graphs.convnet(tmp_path / "model.onnx")
    graph.write_bytes(graph.read_bytes()[:100])
    with pytest.raises(BuildError, match=r"model\.onnx"):
        engine.build(graph, options(dtype), tmp_path / "model")
    with pytest.raises(BuildError, match=r"nowhere\.onnx"):
        engine.build(tmp_path / "nowhere.onnx", options(dtype), tmp_path / "model")


def test_shapes_that_no_profile_covers(engine: TensorRTRTXEngine, tmp_path: Path) -> None:
    free = graphs.convnet(tmp_path / "free.onnx", batch="n")
    model = onnx.load(free)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(model, free)
    with pytest.raises(BuildError, match="only the batch axis may be dynamic"):
        engine.build(free, options(), tmp_path / "m")
    with pytest.raises(BuildError, match="batch size is 1, but 4"):
        engine.build(graphs.convnet(tmp_path / "one.onnx"), options(batch_size=4), tmp_path / "m")
    with pytest.raises(BuildError, match="max_batch 8"):
        engine.build(graphs.convnet(tmp_path / "one.onnx"), options(max_batch=8), tmp_path / "m")


def test_several_inputs_of_their_own_dtypes_are_built(engine: TensorRTRTXEngine, tmp_path: Path) -> None:
    file = engine.build(graphs.lookup(tmp_path / "lookup.onnx"), options(), tmp_path / "one")
    assert file.size_bytes > 0
    many = engine.build(graphs.lookup(tmp_path / "free.onnx", batch="n"), options(max_batch=4), tmp_path / "many")
    assert json.loads(many.path.with_suffix(".json").read_text())["batch"] == [1, 1, 4]


def test_other_dtypes_are_refused(engine: TensorRTRTXEngine, tmp_path: Path) -> None:
    graph = graphs.convnet(tmp_path / "model.onnx")
    for dtype in ("int8", "fp8_e4m3", "float"):
        with pytest.raises(UnsupportedDtypeError, match=f"{dtype!r}.*fp32"):
            engine.build(graph, options(dtype), tmp_path / "model")
        with pytest.raises(UnsupportedDtypeError, match=dtype):
            engine.open(EngineFile(engine.name, graph, options(dtype)))


@pytest.mark.parametrize(("target", "refused"), [("8.6", True), ("8.9", False)])
def test_fp8_is_checked_against_the_target(
    engine: TensorRTRTXEngine, tmp_path: Path, target: str, *, refused: bool
) -> None:
    graph = fp8_product(tmp_path / "fp8.onnx")
    if refused:
        with pytest.raises(UnsupportedDtypeError, match=r"fp8_e4m3.*8\.9.*not 8\.6"):
            engine.build(graph, options("fp32", target), tmp_path / "m")
    else:
        assert "fp8_e4m3" in description(engine.build(graph, options("fp32", target), tmp_path / "m"))["dtypes"]


def fp8_product(path: Path) -> Path:
    fp8, single = TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["wq"]),
        helper.make_node("DequantizeLinear", ["wq", "s", "z"], ["wd"]),
        helper.make_node("MatMul", ["d", "wd"], ["output"]),
    ]
    made = [
        helper.make_tensor("s", single, [], [0.1]),
        helper.make_tensor("z", fp8, [], [0.0]),
        helper.make_tensor("w", single, [64, 64], [0.01 * (i % 7) for i in range(4096)]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("input", single, (1, 64))], [value("output", single, (1, 64))], made)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


# -- opening: everything up to the driver -----------------------------------------------------------------------------


@no_gpu
def test_opening_without_a_gpu_says_what_to_do(engine: TensorRTRTXEngine, built: EngineFile) -> None:
    runner = engine.open(built)
    with pytest.raises(BuildError, match="not open"):
        runner.infer(graphs.images(1))
    with pytest.raises(DeviceNotFoundError, match=r"nvidia-smi.*driver 580.*--compute-capability"), runner:
        pass
    for ask in (engine.device, engine.capabilities):
        with pytest.raises(DeviceNotFoundError, match="nvidia-smi"):
            ask()


@no_gpu
def test_building_without_a_gpu_names_the_option(engine: TensorRTRTXEngine, tmp_path: Path) -> None:
    graph = graphs.convnet(tmp_path / "model.onnx")
    with pytest.raises(DeviceNotFoundError, match="--compute-capability"):
        engine.build(graph, EngineOptions("fp16"), tmp_path / "model")
    with pytest.raises(DeviceNotFoundError), engine.open(EngineFile(engine.name, graph, EngineOptions("fp16"))):
        pass


@no_gpu
def test_the_worker_builds_and_hands_the_error_through(built: EngineFile, tmp_path: Path) -> None:
    with EngineWorker() as worker:
        told = worker.describe("tensorrt-rtx", {"compute_capability": "8.6,8.9"})
        assert told["capabilities"] == ["fp32", "bf16", "fp16", "int8", "int4", "2:4"]
        assert "8.6, 8.9" in told["device"]
        file = worker.build("tensorrt-rtx", tmp_path / "model.onnx", options(), tmp_path / "again")
        assert file.options == built.options
        with pytest.raises(DeviceNotFoundError, match="nvidia-smi"):
            worker.infer(file, graphs.images(1))
        with pytest.raises(DeviceNotFoundError, match="nvidia-smi"):
            worker.measure([file], graphs.images(1))
        with pytest.raises(DeviceNotFoundError, match="nvidia-smi"):
            worker.profile(file, graphs.images(1))


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_damaged_file_is_refused(engine: TensorRTRTXEngine, built: EngineFile, keep: float) -> None:
    data = built.path.read_bytes()
    built.path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(BuildError, match=r"model\.rtx\.engine is damaged"), engine.open(built):
        pass


def test_damaged_description_is_refused(engine: TensorRTRTXEngine, built: EngineFile) -> None:
    for text in ("", "[]", '{"engine": "tensorrt-rtx"}'):
        description_of(built.path).write_text(text)
        with pytest.raises(BuildError, match=r"model\.rtx\.json.*again"), engine.open(built):
            pass


def test_missing_file_is_refused(engine: TensorRTRTXEngine, tmp_path: Path) -> None:
    with (
        pytest.raises(BuildError, match="nowhere"),
        engine.open(EngineFile(engine.name, tmp_path / "nowhere", options())),
    ):
        pass


def test_another_version_is_refused_with_both(built: EngineFile) -> None:
    found, data, flavour = description(built), built.path.read_bytes(), FLAVOURS["tensorrt-rtx"]
    check_version(built.path, found, data, flavour)
    for change in ({"engine_version": "1.5.0.1"}, {"engine": "tensorrt"}):
        with pytest.raises(BuildError, match=rf"built by .*{next(iter(change.values()))}.*here is .*{trt.__version__}"):
            check_version(built.path, {**found, **change}, data, flavour)
    older = {**found, "engine_version": "1.0.0.1", "version_compatible": True}
    check_version(built.path, older, data, flavour)
    with pytest.raises(BuildError):
        check_version(built.path, {**older, "engine_version": "1.99.0.1"}, data, flavour)


def test_another_gpu_is_refused_with_both(built: EngineFile) -> None:
    def gpu(major: int, minor: int) -> Gpu:
        return Gpu("A Card", ComputeCapability(major, minor), 2**30, 2**20, "13.0", "13.0")

    found = description(built)
    check_gpu(built.path, found, gpu(8, 9))
    with pytest.raises(BuildError, match=r"compute capability 8\.9 \(ahead of time\).*A Card with 12\.0"):
        check_gpu(built.path, found, gpu(12, 0))
    portable = {**found, "hardware_compatible": "ampere_plus"}
    check_gpu(built.path, portable, gpu(12, 0))
    with pytest.raises(BuildError, match=r"with 7\.5"):
        check_gpu(built.path, portable, gpu(7, 5))


@no_gpu
def test_what_ahead_of_time_means_for_tensorrt_itself() -> None:
    told = pytest.raises((DeviceNotFoundError, MissingDependencyError))
    with told:
        TensorRTEngine().build(Path("model.onnx"), options(), Path("model"))


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingDependencyError, match=r"autocompress\[tensorrt-rtx\]"):
        get_engine("tensorrt-rtx").version()


def test_every_name_used_is_in_the_published_bindings() -> None:
    used: dict[str, tuple[str, ...]] = {
        "IBuilderConfig": (
            "builder_optimization_level", "set_memory_pool_limit", "set_flag", "clear_flag", "progress_monitor",
            "hardware_compatibility_level", "profiling_verbosity", "add_optimization_profile", "create_timing_cache",
            "set_timing_cache", "get_timing_cache", "num_compute_capabilities", "set_compute_capability",
        ),
        "BuilderFlag": ("SPARSE_WEIGHTS", "REFIT", "VERSION_COMPATIBLE", "TF32"),
        "ICudaEngine": (
            "num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_shape", "get_tensor_dtype",
            "get_tensor_profile_shape", "create_execution_context", "create_runtime_config",
            "create_engine_inspector",
        ),
        "IExecutionContext": (
            "set_input_shape", "get_tensor_shape", "set_tensor_address", "execute_async_v3", "profiler",
        ),
        "IRuntimeConfig": ("cuda_graph_strategy", "create_runtime_cache", "set_runtime_cache"),
        "IRuntimeCache": ("serialize", "deserialize"),
        "ITimingCache": ("combine", "serialize"),
        "Runtime": ("deserialize_cuda_engine", "engine_host_code_allowed", "get_plugin_registry"),
        "EngineInspector": ("execution_context", "get_engine_information"),
        "CudaGraphStrategy": ("DISABLED", "WHOLE_GRAPH_CAPTURE"),
        "HardwareCompatibilityLevel": ("NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"),
        "LayerInformationFormat": ("JSON",),
        "TensorIOMode": ("INPUT",),
        "IProfiler": ("report_layer_time",),
    }  # fmt: skip
    missing = [f"{cls}.{name}" for cls, names in used.items() for name in names if not hasattr(getattr(trt, cls), name)]
    assert missing == []


def test_every_cuda_name_used_is_in_the_published_bindings() -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime")
    names = (
        "cudaGetDeviceCount", "cudaSetDevice", "cudaGetDeviceProperties", "cudaDriverGetVersion",
        "cudaRuntimeGetVersion", "cudaStreamCreateWithFlags", "cudaStreamNonBlocking", "cudaEventCreate",
        "cudaStreamSynchronize", "cudaEventRecord", "cudaEventSynchronize", "cudaEventElapsedTime",
        "cudaStreamCaptureMode", "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate",
        "cudaGraphDestroy", "cudaGraphLaunch", "cudaGraphExecDestroy", "cudaEventDestroy", "cudaStreamDestroy",
        "cudaMalloc", "cudaMallocHost", "cudaMemcpyKind", "cudaMemsetAsync", "cudaMemcpyAsync", "cudaFree",
        "cudaFreeHost",
    )  # fmt: skip
    assert [name for name in names if not hasattr(cuda, name)] == []
    assert hasattr(cuda.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")
    assert hasattr(cuda.cudaMemcpyKind, "cudaMemcpyHostToDevice")
    properties = cuda.cudaDeviceProp()
    assert all(hasattr(properties, name) for name in ("name", "major", "minor", "totalGlobalMem", "l2CacheSize"))
