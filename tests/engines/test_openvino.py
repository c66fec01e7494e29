from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autocompress.engines import Engine, EngineFile, EngineOptions, get_engine
from autocompress.engines.openvino import OpenVINOEngine, _core
from autocompress.errors import MissingDependencyError
from autocompress.measurement.client import EngineWorker
from tests.engines import graphs
from tests.engines.contract import EngineContract

pytest.importorskip("openvino")


class TestOpenVINO(EngineContract):
    @pytest.fixture
    def engine(self) -> Engine:
        return OpenVINOEngine()

    def test_weights_belong_to_the_file(self, built: EngineFile) -> None:
        assert [p.suffix for p in built.files()] == [".xml", ".bin"]

    def test_file_tells_its_dtype(self, engine: Engine, tmp_path: Path) -> None:
        graph = graphs.convnet(tmp_path / "model.onnx")
        for dtype in (d for d in engine.capabilities() if d != "int8"):
            built = engine.build(graph, EngineOptions(dtype), tmp_path / dtype)
            model = _core().read_model(built.path)
            assert model.get_rt_info(["autocompress", "dtype"]).astype(str) == dtype

    def test_half_precision_weights_take_half_the_bytes(self, engine: Engine, tmp_path: Path) -> None:
        if "bf16" not in engine.capabilities():
            pytest.skip("no bf16 here")
        graph = graphs.convnet(tmp_path / "model.onnx", channels=64, layers=2)
        single = engine.build(graph, EngineOptions("fp32"), tmp_path / "single").files()[1]
        half = engine.build(graph, EngineOptions("bf16"), tmp_path / "half").files()[1]
        assert half.stat().st_size < 0.55 * single.stat().st_size

    def test_dtype_is_what_the_plugin_runs(self, engine: Engine, tmp_path: Path) -> None:
        graph = graphs.convnet(tmp_path / "model.onnx")
        names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
        for dtype in (d for d in engine.capabilities() if d != "int8"):
            with engine.open(engine.build(graph, EngineOptions(dtype), tmp_path / dtype)) as runner:
                compiled = runner._request.get_compiled_model()  # type: ignore[attr-defined]
                assert names[dtype] in str(compiled.get_property("INFERENCE_PRECISION_HINT"))
                assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"autocompress\[openvino\]"):
        get_engine("openvino").capabilities()


_SIGNALS = """
import gc, signal, sys
from pathlib import Path
from autocompress.engines import EngineOptions, get_engine

signal.signal(signal.SIGUSR1, lambda *_: None)
for number in range(3):
    engines = [get_engine("openvino") for _ in range(2)]
    for index, engine in enumerate(engines):
        engine.build(Path(sys.argv[1]), EngineOptions(), Path(sys.argv[2]) / f"built-{number}-{index}")
    del engine
    while engines:
        engines.pop(0)
        gc.collect()
        for _ in range(3):
            signal.raise_signal(signal.SIGUSR1)
print("alive")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="stacks for signals are Linux' own")
def test_a_signal_after_engines_are_gone_ends_nothing(tmp_path: Path) -> None:
    # The plugin's core leaves a thread with a signal stack that is gone when cores come and go: one is kept for good.
    graph = graphs.convnet(tmp_path / "model.onnx")
    words = [sys.executable, "-X", "faulthandler", "-c", _SIGNALS, graph, tmp_path]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "alive\n"), ended.stderr


_SILENT = """
import multiprocessing, os, sys
from autocompress.engines import get_engine

def refuse(*_, **__):
    raise SystemExit("a process was started")

multiprocessing.Process.start = os.fork = refuse
print(get_engine("openvino").version())
assert "openvino.tools.ovc" in sys.modules and sys.modules["openvino_telemetry"] is None
"""


def test_the_runtime_reports_to_nobody() -> None:
    kept = {key: value for key, value in os.environ.items() if key != "CI"}
    ended = subprocess.run([sys.executable, "-c", _SILENT], env=kept, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and ended.stdout.strip(), ended.stderr


def test_only_dtypes_that_run_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The library may use less than the processor has; the plugin lists what the processor has.
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    graph = graphs.convnet(tmp_path / "model.onnx")
    with EngineWorker(time_limit_s=60) as worker:
        listed = worker.describe("openvino")["capabilities"]
        assert listed[0] == "fp32"
        for dtype in (dtype for dtype in listed if dtype != "int8"):
            worker.build("openvino", graph, EngineOptions(dtype), tmp_path / dtype)
