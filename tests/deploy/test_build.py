"""Engines built without being run, from a run and from an ONNX file, by Python and by the command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import autocompress
from autocompress.cli import main
from autocompress.errors import ConfigError, UnsupportedDtypeError
from autocompress.measurement.client import EngineWorker
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.tasks import Task
from tests.engines import graphs
from tests.exploration import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> autocompress.Run:
    """A finished run of OpenVINO. Read only."""
    names: dict[str, Any] = {}
    exec(tiny.TASK, names)
    task: Task = names["make"]()
    return autocompress.open_run(tiny.finished(tmp_path_factory.mktemp)[0], task)


def test_a_runs_best_for_another_engine(run: autocompress.Run, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (made,) = autocompress.build(run, "onnxruntime", tmp_path / "out")
    assert made.file is not None
    assert made.trial == run.best.number
    assert made.file.path.parent.name == f"trial-{made.trial:05d}"
    # The same model in another runtime: as near as the roundings of both engines let it be.
    inputs = run.task.example_inputs(1).numpy()
    with EngineWorker() as worker:
        found = worker.infer(made.file, inputs)
    model = run.load_model(made.trial)
    import torch

    with torch.no_grad():
        expected = model(torch.from_numpy(inputs)).numpy()
    assert np.abs(found - expected).max() <= 0.1 * np.abs(expected).max()


def test_2_4_sparse_models_are_built_as_such(run: autocompress.Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    shutil.copytree(run.path, tmp_path / "run")
    copied = autocompress.open_run(tmp_path / "run", run.task)
    plain = next(
        r for r in copied.records
        if r.state == "complete" and r.policy.is_structural_identity and "3" not in r.policy.int8_layers
    )  # fmt: skip
    layers = {**plain.policy.layers, "3": LayerPolicy(sparsity="2:4")}
    copied.directory.append(replace(plain, policy=CompressionPolicy(plain.policy.dense_dtype, layers=layers)))
    settings = {"compute_capability": "8.9"}
    for source, sparse in ((run, False), (copied, True)):
        to = tmp_path / f"sparse-{sparse}"
        (made,) = autocompress.build(source, "tensorrt-rtx", to, settings=settings, trials=[plain.number])
        assert made.error is None and made.file is not None
        described = json.loads(made.file.path.with_suffix(".json").read_text())
        assert described["sparse_weights"] is sparse


def test_a_runs_models_for_a_gpu_that_is_not_here(run: autocompress.Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    numbers = [r.number for r in run.records if r.state == "complete"]
    settings = {"compute_capability": "8.9"}
    made = autocompress.build(run, "tensorrt-rtx", tmp_path / "out", settings=settings, trials=numbers)
    assert [b.trial for b in made] == numbers
    assert [b.error for b in made] == [None] * len(numbers)
    described = json.loads((tmp_path / "out" / f"trial-{numbers[0]:05d}" / "model.rtx.json").read_text())
    assert described["compute_capability"] == ["8.9"]
    assert "fp16" in described["dtypes"]


def test_a_model_that_does_not_build_is_returned_with_its_error(run: autocompress.Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    made = autocompress.build(
        run, "tensorrt-rtx", tmp_path / "out", dtype="bf16", settings={"compute_capability": "7.5"}
    )
    assert made[0].file is None
    assert "bf16" in str(made[0].error)


def test_what_cannot_be_built(run: autocompress.Run, tmp_path: Path) -> None:
    graph = graphs.convnet(tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match="no finished trial 999"):
        autocompress.build(run, "openvino", tmp_path / "out", trials=[999])
    with pytest.raises(ConfigError, match="not an empty directory"):
        autocompress.build(graph, "openvino", tmp_path)
    with pytest.raises(ConfigError, match="has no engine_options, but workspace"):
        autocompress.build(graph, "openvino", tmp_path / "out", settings={"workspace": "1GB"})
    with pytest.raises(ConfigError, match="Unknown engine"):
        autocompress.build(graph, "openvin", tmp_path / "out")
    with pytest.raises(UnsupportedDtypeError):
        autocompress.build(graph, "onnxruntime", tmp_path / "out", dtype="fp16")


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("kind", ["external", "lookup"])
def test_what_is_built_of_a_file_of_ones_own_opens_again(engine: str, kind: str, tmp_path: Path) -> None:
    """Weights that lie in a file beside, and several inputs of their own dtypes."""
    pytest.importorskip(engine)
    graph = getattr(graphs, kind)(tmp_path / "mine.onnx")
    (made,) = autocompress.build(graph, engine, tmp_path / "out")
    assert made.file is not None
    (tmp_path / "weights.bin").unlink(missing_ok=True)  # what was built is whole
    files, (measured,) = autocompress.benchmark([tmp_path / "out"], engine=None)
    assert files[0].engine == engine and measured.latency_ms > 0


def test_weights_that_are_not_where_they_were_are_named(tmp_path: Path) -> None:
    graph = graphs.external(tmp_path / "mine.onnx")
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ConfigError, match=r"mine\.onnx cannot be read: .*weights\.bin.* beside it"):
        autocompress.build(graph, "onnxruntime", tmp_path / "out")


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = graphs.quantized(tmp_path / "model.onnx")
    words = ["build", str(graph), "--engine", "tensorrt-rtx", "--compute-capability", "8.6,12.0"]
    said = CliRunner().invoke(main, [*words, "--option", "optimization_level=4", "--to", str(tmp_path / "a"), "--json"])
    assert said.exit_code == 0, said.output
    (row,) = json.loads(said.stdout)
    assert Path(row["file"]).exists()
    plain = CliRunner().invoke(main, [*words, "--to", str(tmp_path / "b")])
    assert "model.rtx.engine" in plain.stdout
    turing = [*words[:-1], "7.5", "--to", str(tmp_path / "c")]
    refused = CliRunner().invoke(main, turing)
    assert refused.exit_code == 4
    assert "7.5" in refused.stderr
    assert CliRunner().invoke(main, [*turing, "--option", "fast"]).exit_code == 2
