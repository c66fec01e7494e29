from __future__ import annotations

from pathlib import Path

import pytest

from autocompress.deploy.artifacts import resolve
from autocompress.deploy.package import deploy
from autocompress.engines.base import EngineOptions
from autocompress.errors import ConfigError
from autocompress.measurement.measure import Protocol
from autocompress.runs.directory import RunDirectory

OPTIONS = EngineOptions("bf16", threads=2)


def test_everything_that_names_an_engine(run: RunDirectory, tmp_path: Path, quick: Protocol) -> None:
    deploy(run, tmp_path / "shipped", protocol=quick)
    for path, expected in (
        (run.path, run.best / "model.xml"),
        (run.baseline, run.baseline / "model.xml"),
        (run.artifact(5), run.artifact(5) / "model.xml"),
        (tmp_path / "shipped", tmp_path / "shipped" / "model.xml"),
        (run.best / "model.xml", run.best / "model.xml"),
    ):
        file = resolve(path, None, OPTIONS)
        # An artefact keeps what it was measured with.
        assert (file.engine, file.path, file.options) == ("openvino", expected, EngineOptions("fp32"))
        assert resolve(path, "openvino", OPTIONS) == file


def test_bare_files_take_the_options(run: RunDirectory, tmp_path: Path) -> None:
    onnx = run.best / "model.onnx"
    assert resolve(onnx, None, OPTIONS).engine == "openvino"
    assert resolve(onnx, "onnxruntime", OPTIONS).engine == "onnxruntime"
    assert resolve(onnx, None, OPTIONS).options == OPTIONS
    bare = tmp_path / "net.xml"
    bare.write_bytes((run.best / "model.xml").read_bytes())
    assert resolve(bare, None, OPTIONS).path == bare


def test_what_cannot_be_opened(run: RunDirectory, tmp_path: Path) -> None:
    bare, other = tmp_path / "net.xml", tmp_path / "net.pt"
    bare.write_text("")
    other.write_text("")
    (tmp_path / "empty").mkdir()
    for path, engine, said in (
        (tmp_path / "nothing", None, "does not exist"),
        (tmp_path / "empty", None, "holds nothing to open"),
        (bare, "onnxruntime", "cannot be opened by onnxruntime"),
        (other, None, r"\.onnx \(onnxruntime or openvino or tensorrt"),
        (run.path, "onnxruntime", "was built for openvino, not onnxruntime"),
        (run.best / "model.xml", "openvinos", "Did you mean 'openvino'"),
    ):
        with pytest.raises(ConfigError, match=said):
            resolve(path, engine, OPTIONS)
    (run.best / "engine.json").write_text('{"engine": "openvino"}')
    with pytest.raises(ConfigError, match=r"engine\.json is not what"):
        resolve(run.path, None, OPTIONS)
    (run.best / "engine.json").unlink()
    with pytest.raises(ConfigError, match="run without a result"):
        resolve(run.path, None, OPTIONS)
