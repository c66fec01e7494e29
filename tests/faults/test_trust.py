"""Opening somebody's run, artefact or deployed directory runs nothing of it, unless one says so."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from autocompress import api, open_run
from autocompress.api import settings
from autocompress.config import RunConfig, load_config
from autocompress.deploy.artifacts import resolve
from autocompress.deploy.package import deploy
from autocompress.engines.base import EngineOptions
from autocompress.errors import ConfigError
from autocompress.files import read_json, write_json
from autocompress.runs.directory import RunDirectory
from autocompress.runs.trust import Trust, code_of, remember, trust_of

EARLIER = Path(__file__).parents[1] / "fixtures" / "earlier"
TRAP = "from pathlib import Path\nPath('TRAPPED').write_text('ran')\ndef make(): raise SystemExit('ran')\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Somebody's run, and a module that its run file names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    shutil.copytree(EARLIER / "run", tmp_path / "run")
    (tmp_path / "trap_task.py").write_text(TRAP)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["task"] = {"name": "trap_task:make"}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "run"


def _with_settings(folder: Path, **values: Any) -> None:
    engine = read_json(folder / "engine.json")
    write_json(folder / "engine.json", {**engine, "options": {**engine["options"], "settings": values}})


def test_which_code_a_run_file_names() -> None:
    assert code_of(RunConfig()) == ()
    assert code_of(load_config(None, {"task.name": "torchvision:resnet18"})) == ()
    assert code_of(load_config(None, {"task.name": "mine.tasks:make"})) == ("task mine.tasks:make",)
    options = {"plugins": ["a.so", "b.so"], "version_compatible": True, "workspace": "1GB"}
    assert code_of(RunConfig(engine_options=options)) == ("plugin a.so", "plugin b.so", "version_compatible")
    assert code_of(RunConfig(engine_options={"plugins": "a.so,b.so"})) == ("plugin a.so", "plugin b.so")


def test_looking_at_a_run_imports_nothing_of_it(run: Path) -> None:
    opened = open_run(run)
    assert len(opened.front) and opened.best and opened.summary and opened.report().exists()
    assert not (run.parent / "TRAPPED").exists()


def test_what_needs_the_task_says_so(run: Path) -> None:
    for action in (
        lambda: open_run(run).task,
        lambda: open_run(run).load_model(),
        lambda: api.build(run, "onnxruntime", run.parent / "built"),
        lambda: api.search(out=run, resume=True),
    ):
        with pytest.raises(ConfigError, match=r"names code that would run here: 'task trap_task:make'.*--trust"):
            action()
    assert not (run.parent / "TRAPPED").exists()
    with pytest.raises(ConfigError, match="raised SystemExit: ran"):
        _ = open_run(run, trust=True).task


def test_code_that_is_named_again_is_trusted(run: Path) -> None:
    directory = RunDirectory.open(run)

    def check(**changes: Any) -> None:
        given: dict[str, Any] = {"task": None, "named": False, "said": ((), {}), "trust": False}
        settings.check_trusted(directory.config(), directory, **{**given, **changes})

    with pytest.raises(ConfigError, match="names code"):
        check()
    with pytest.raises(ConfigError, match="names code"):
        check(task="another:make")
    check(task="trap_task:make")
    check(task=object())
    check(said=(("task.name=trap_task:make",), {}))
    check(named=True)
    check(trust=True)


def test_a_run_that_was_begun_here_goes_on_and_its_copy_does_not(run: Path) -> None:
    remember(run, ("task trap_task:make",))
    assert trust_of(run) == Trust(code=frozenset({"task trap_task:make"}))
    assert trust_of(run / "artifacts" / "trial-00001") == trust_of(run)
    with pytest.raises(ConfigError, match="raised SystemExit: ran"):
        _ = open_run(run).task
    shutil.copytree(run, run.parent / "copy")
    with pytest.raises(ConfigError, match="names code"):
        _ = open_run(run.parent / "copy").task
    # Begun with one thing, it does not run another that was written into it since.
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["task"]["name"] = "other_task:make"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match="'task other_task:make'"):
        _ = open_run(run).task


@pytest.mark.parametrize(
    "values", [{"plugins": ["/tmp/evil.so"]}, {"plugins": "/tmp/evil.so"}, {"version_compatible": True}]
)
def test_libraries_that_a_folder_names_are_refused(run: Path, values: dict[str, Any]) -> None:
    for folder in (run / "best", run / "baseline"):
        _with_settings(folder, **values)
    for path in (run, run / "best", run / "best" / "model.onnxruntime.onnx"):
        with pytest.raises(ConfigError, match="names code that would run here"):
            resolve(path, None, EngineOptions())
        assert resolve(path, None, EngineOptions(), trust=True).options.settings
    with pytest.raises(ConfigError, match="names code that would run here"):
        deploy(RunDirectory.open(run), run.parent / "out", force=True)


@pytest.mark.parametrize("name", ["../baseline/model.onnxruntime.onnx", "/etc/passwd", 'a");import os#', "a'b", "a\nb"])
def test_an_engine_file_of_no_plain_name_is_refused(run: Path, name: str) -> None:
    engine = read_json(run / "best" / "engine.json")
    write_json(run / "best" / "engine.json", {**engine, "file": name})
    with pytest.raises(ConfigError, match="only plain file names are allowed"):
        resolve(run, None, EngineOptions())
    with pytest.raises(ConfigError, match="only plain file names are allowed"):
        deploy(RunDirectory.open(run), run.parent / "out", force=True)
