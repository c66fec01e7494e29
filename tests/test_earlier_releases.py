"""What the release before the package was rebuilt left behind still opens, goes on, and deploys."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from autocompress import open_run, unpack
from autocompress.prediction.table import LatencyTable
from tests.exploration import tiny

onnxruntime = pytest.importorskip("onnxruntime")

EARLIER = Path(__file__).parent / "fixtures" / "earlier"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the run, beside the task that it is of."""
    shutil.copytree(EARLIER / "run", tmp_path / "run")
    return tiny.write_task(tmp_path) / "run"


def test_a_run_is_read(run: Path) -> None:
    opened = open_run(run)
    assert list(opened.front["trial"])[-1] == 0 and opened.best.number == 0
    assert [record.state for record in opened.records] == ["complete", "complete"]
    assert opened.report().exists()


def test_a_run_goes_on(run: Path) -> None:
    before = (run / "trials.jsonl").read_text()
    if '"onnxruntime": "' + onnxruntime.__version__ not in (run / "env.json").read_text():
        pytest.skip("the run is of another ONNX Runtime, which is another study")
    words = ("search", "--task", "tiny_task:make", "--engine", "onnxruntime", "--max-drop", "20pp", "--n-trials", "3")
    plain = (*tiny.QUICK, "--set", "first_candidates=false")
    answer = tiny.run(*words, "--timeout", "90s", *plain, "--out", "run", "--resume", cwd=run.parent)
    assert answer.returncode == 0, answer.stderr
    after = (run / "trials.jsonl").read_text()
    assert after.startswith(before) and '"number": 2' in after[len(before) :]


def test_a_run_is_deployed(run: Path) -> None:
    answer = tiny.run("deploy", "run", "--to", "deployed", "--force", cwd=run.parent)
    assert answer.returncode == 0, answer.stderr
    assert (run.parent / "deployed" / "model.onnxruntime.onnx").read_bytes() == (
        run / "best" / "model.onnxruntime.onnx"
    ).read_bytes()


def test_a_latency_table_is_read() -> None:
    (table,) = (EARLIER / "tables").glob("*/*.csv")
    assert list(LatencyTable.load(table).names.values()) == ["tiny"]


def test_packed_weights_are_unpacked(tmp_path: Path) -> None:
    unpack(EARLIER / "packed.safetensors", tmp_path / "weights.safetensors")
    found, original = load_file(tmp_path / "weights.safetensors"), EARLIER / "run" / "best" / "weights.safetensors"
    assert {n: a.shape for n, a in found.items()} == {n: a.shape for n, a in load_file(original).items()}
