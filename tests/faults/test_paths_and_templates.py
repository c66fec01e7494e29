"""No path or name is pasted into a language: not SQLAlchemy's, not rich's, not Python's, not protobuf's."""

from __future__ import annotations

import io
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from rich.console import Console

from autocompress.cli import runs, terminal
from autocompress.config import RunConfig
from autocompress.deploy.manifest import Manifest
from autocompress.deploy.run_script import run_script
from autocompress.deploy.triton import _BACKENDS, config_text
from autocompress.engines.base import EngineOptions
from autocompress.engines.ports import Port
from autocompress.errors import ConfigError
from autocompress.exploration.study import load_study, open_study
from autocompress.report.live import LiveObserver
from autocompress.runs.directory import RunDirectory

EARLIER = Path(__file__).parents[1] / "fixtures" / "earlier"
CONFIG = RunConfig(sampler="random")
ODD = [
    "a?b=c",
    "x[/b]",
    "x#y",
    "a%41b",
    "a%20b",
    "{0}",
    "a@b:c",
    "a b",
    "[bold]",
    "é",
    "a&b;c",
    "mode=ro",
    "a'b",
    'a"b',
]


@pytest.mark.parametrize("name", ODD)
def test_the_database_of_a_run_lies_in_the_run(name: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / name)
    run.path.mkdir(parents=True)
    open_study(run, CONFIG, {"a": 1})
    assert sorted(path.name for path in run.path.iterdir()) == ["identity.json", "study.db"]
    assert [path.name for path in tmp_path.iterdir()] == [Path(name).parts[0]]
    assert load_study(run).user_attrs["identity"]["a"] == 1


@pytest.mark.parametrize("name", ODD)
def test_a_run_of_an_odd_name_is_shown_as_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(EARLIER / "run", tmp_path / name)
    run, written = RunDirectory.open(tmp_path / name), io.StringIO()
    run.report_file.write_text("")
    monkeypatch.setattr(terminal.out, "file", written)
    monkeypatch.setattr(terminal.out, "width", 1000)
    runs._print_run(run)
    assert f"Report: {run.report_file}" in written.getvalue()


def test_what_a_message_says_is_no_markup() -> None:
    buffer = io.StringIO()
    console = Console(file=buffer, force_terminal=True, width=200, markup=False, color_system=None)
    with LiveObserver(console) as observer:
        observer.stage("Fine-tuning [/b] [bold]")
        observer.progress(0.5, "[/nothing] [red]")
        observer.warn("[/b]")
    assert "[/b]" in buffer.getvalue()


def test_locked_damaged_and_foreign_databases_are_said_in_our_words(
    tmp_path: Path,
) -> None:
    foreign = ("sqlalchemy", "sqlite3.", "background on this error", "sqlalche.me")
    run = RunDirectory(tmp_path)

    def said(*words: str) -> None:
        with pytest.raises(ConfigError) as raised:
            load_study(run)
        # Whoever goes on with the run has it set aside.
        messages: list[str] = []
        open_study(run, CONFIG, {"a": 1}, on_message=messages.append)
        for text in (str(raised.value), *messages):
            assert "study.db" in text and not any(word in text.lower() for word in foreign)
            assert any(word in text for word in words), text
        assert len(messages) == 1 and load_study(run).trials == []

    run.study_file.write_bytes(b"no database " * 1000)
    said("is damaged")
    run.study_file.unlink()
    with sqlite3.connect(run.study_file) as database:
        database.execute("CREATE TABLE studies (number INTEGER)")
    said("is not the study of a run")
    run.study_file.unlink()
    open_study(run, CONFIG, {"a": 1})
    whole = bytearray(run.study_file.read_bytes())
    whole[5000:20000] = b"\xff" * 15000
    run.study_file.write_bytes(whole)
    said("is damaged", "is not the study of a run")
    with closing(sqlite3.connect(run.study_file)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ConfigError, match=r"is locked by another process"):
            load_study(run)
        assert run.study_file.exists()


# -- templates ------------------------------------------------------------------------------------------------------


def manifest(file: str, engine: str = "onnxruntime") -> Manifest:
    return Manifest(
        1, "2026", None, engine, '1.0\n"""', EngineOptions().to_dict(), file, {}, {}, "hash", 1, None, None, None, None,
        None, {}, 1, {},
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "tensorrt"])
@pytest.mark.parametrize("file", ['m")#.onnx', 'a"""\nimport os\n"""', "../m.onnx", "m'.onnx", "m\n.onnx"])
def test_a_script_holds_no_name_that_is_no_plain_one(file: str, engine: str) -> None:
    with pytest.raises(ValueError, match="only plain file names are allowed"):
        run_script(manifest(file, engine), [Port("x", (1, 3), np.float32)])


@pytest.mark.parametrize("name", ['"); import os#', '"""', "\\", "a\nb", "\x00"])
def test_a_script_holds_no_input_whose_name_ends_its_words(name: str) -> None:
    ports = [Port(name, (1, 3), np.float32), Port("y", (1, 3), np.int64)]
    with pytest.raises(ConfigError, match="cannot be named"):
        run_script(manifest("m.onnx"), ports)


@pytest.mark.parametrize("name", ["it's", "{0}", "a {b} c", "%s", "x.1", "/in/Add:0", "$(id)"])
def test_a_script_quotes_the_names_of_inputs(name: str, tmp_path: Path) -> None:
    ports = [Port(name, (1, 3), np.float32), Port("y", (1, 3), np.int64)]
    script = run_script(manifest("m.onnx"), ports)
    compile(script, "run.py", "exec")
    assert repr(name) in script
    # Its last word, without arguments that it knows, is the names themselves and nothing that they do.
    (tmp_path / "run.py").write_text(script.replace("import onnxruntime\n", ""))
    answer = subprocess.run([sys.executable, "run.py", "x"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.stderr.strip() == f"Give a .npz file of {name}, y." and answer.returncode == 1


def test_a_triton_config_quotes_names(tmp_path: Path) -> None:
    name = 'x" } ] parameters { key: "evil\\\n'
    graph = helper.make_graph(
        [], "g", [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("é", TensorProto.FLOAT, [1, 3])],
    )  # fmt: skip
    text = config_text("model", _BACKENDS["onnxruntime"], manifest("m.onnx"), graph, tmp_path)
    assert r'name: "x\042 } ] parameters { key: \042evil\134\012"' in text and r'name: "\303\251"' in text
    assert text.splitlines()[0].startswith("# onnxruntime 1.0") and text.splitlines()[1] == 'name: "model"'
