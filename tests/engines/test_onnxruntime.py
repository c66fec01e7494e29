from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autocompress.engines import Engine, EngineFile, get_engine
from autocompress.engines.onnxruntime import ONNXRuntimeEngine
from autocompress.errors import BuildError, MissingDependencyError
from tests.engines import graphs
from tests.engines.contract import FP32, EngineContract

pytest.importorskip("onnxruntime")


class TestONNXRuntime(EngineContract):
    @pytest.fixture
    def engine(self) -> Engine:
        return ONNXRuntimeEngine()

    def test_file_is_the_graph_itself(self, built: EngineFile) -> None:
        assert built.path.name == "model.onnxruntime.onnx"
        assert built.path.read_bytes() == built.path.with_name("model.onnx").read_bytes()

    def test_nameless_batch_axis_is_refused(self, engine: Engine, tmp_path: Path) -> None:
        graph = graphs.convnet(tmp_path / "model.onnx", batch=None)
        with pytest.raises(BuildError, match="batch axis"):
            engine.build(graph, FP32, tmp_path / "model")

    def test_prints_nothing(self, engine: Engine, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(BuildError):
            engine.build(graphs.convnet(tmp_path / "model.onnx", activation="Flurb"), FP32, tmp_path / "model")
        assert capfd.readouterr() == ("", "")


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"autocompress\[onnxruntime\]"):
        get_engine("onnxruntime").capabilities()


def test_no_usage_events_are_gathered(tmp_path: Path) -> None:
    """The runtime's telemetry leaves an identifier in the temporary folder and a database in the home when it runs."""
    graph = graphs.convnet(tmp_path / "model.onnx")
    home = tmp_path / "home"
    home.mkdir()
    script = (
        "from pathlib import Path; from autocompress.engines import EngineFile, EngineOptions, get_engine;"
        f"engine = get_engine('onnxruntime'); file = EngineFile('onnxruntime', Path({str(graph)!r}), EngineOptions());"
        "engine.open(file).__enter__()"
    )
    kept = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    environment = {**kept, "HOME": str(home), "TMPDIR": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)
    assert list(home.iterdir()) == []
