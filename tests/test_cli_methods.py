"""`autocompress methods` and `autocompress prune` from outside."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autocompress.catalogue import list_methods
from autocompress.cli import main
from tests.exploration import tiny


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in this process, in a folder that holds the tiny task."""
    tiny.write_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "tiny_task", raising=False)

    def run(*words: object, width: int = 80) -> Result:
        monkeypatch.setenv("COLUMNS", str(width))
        return CliRunner().invoke(main, [str(word) for word in words], prog_name="autocompress")

    return run


@pytest.mark.parametrize("width", [80, 120])
def test_methods_fits_the_terminal_and_leaves_nothing_out(call: Callable[..., Result], width: int) -> None:
    text = call("methods", width=width).stdout
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    words = " ".join(text.split())
    for method in list_methods():
        assert f" {method.name} " in words and method.family in words
        assert method.summary.split()[0] in words
        assert method.source.split()[0] in words


def test_methods_of_a_family_as_json(call: Callable[..., Result]) -> None:
    found = json.loads(call("methods", "--family", "importance", "--json").stdout)
    assert {"magnitude", "apoz", "fisher", "random"} <= {method["name"] for method in found}
    assert all(set(m) == {"name", "family", "summary", "source", "speeds_up"} for m in found)
    refused = call("methods", "--family", "importances")
    assert refused.exit_code == 2 and "Did you mean 'importance'?" in refused.stderr


def test_prune_shows_what_it_did_and_writes_it(call: Callable[..., Result], tmp_path: Path) -> None:
    words = ("prune", "--task", "tiny_task:make", "--importance", "bn_scale", "--ratio", "0.5", "--to", "out")
    answer = call(*words)
    assert answer.exit_code == 0, answer.stderr
    assert max(map(len, answer.stdout.splitlines())) <= 80
    assert "0.50x" in answer.stdout and "16 → " in answer.stdout and "Test data" in answer.stdout
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"policy.json", "weights.safetensors", "model.onnx", "prune.json"}
    again = call(*words)
    assert again.exit_code == 2 and "nothing is overwritten" in again.stderr


def test_prune_reads_the_run_file(call: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("task: {name: tiny_task:make}\nimportance: apoz\nrecovery: {batch_size: 32}\n")
    words = ("prune", "run.yaml", "--macs", "0.5", "--schedule", "gradual", "--steps", "2", "--epochs", "1", "--json")
    found = json.loads(call(*words).stdout)
    assert len(found["steps"]) == 2 and found["steps"][1]["macs"] <= 0.5
    assert all(step["finetuned"] is not None for step in found["steps"])
    # Behind the average pool nothing is zero, and that is said.
    assert list(found["notes"]) == ["3"]


def test_prune_distils_as_the_run_file_says(call: Callable[..., Result]) -> None:
    words = ("prune", "--task", "tiny_task:make", "--ratio", "0.5", "--epochs", "1", "--set", "recovery.batch_size=32")
    answer = call(*words, "--set", "recovery.distill=[logits, attention, features]")
    assert answer.exit_code == 0, answer.stderr
    assert "Distilling logits; attention at 2, 5; features at 2, 5" in " ".join(answer.stdout.split())
    found = json.loads(
        call(*words, "--set", "recovery.distill_at=['4']", "--set", "recovery.distill=features", "--json").stdout
    )
    assert found["distilled"] == ["Distilling features at 4"]
    assert json.loads(call(*words, "--json").stdout)["distilled"] == []


ATTENTION = ["--ratio", "0.5", "--epochs", "1", "--set", "recovery.distill=attention"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ratio", "0.5", "--set", "recovery.distill=attentoin"], "Did you mean 'attention'?"),
        ([*ATTENTION, "--set", "recovery.distill_at=[a]"], "the teacher has no module 'a'"),
        ([*ATTENTION, "--set", "recovery.distill_at=['6']"], "'attention' needs a module"),
        (["--ratio", "0.99"], "more than may go"),
        (["--ratio", "0.5", "--macs", "0.5"], "either a ratio"),
        ([], "either a ratio"),
        (["--ratio", "0.5", "--importance", "lamb"], "Did you mean 'lamp'?"),
        (["--ratio", "0.5", "--scope", "world"], "Unknown scope 'world'"),
        (["--ratio", "0.5", "--set", "recovery.epoch=1"], "unknown key 'recovery.epoch'"),
    ],
)
def test_what_cannot_be_done_is_said(call: Callable[..., Result], words: list[str], said: str) -> None:
    answer = call("prune", "--task", "tiny_task:make", *words)
    assert answer.exit_code == 2 and said in answer.stderr
    assert "Traceback" not in answer.stderr and answer.stdout == ""


def test_search_refuses_an_unknown_importance_at_once(call: Callable[..., Result], tmp_path: Path) -> None:
    answer = call("search", "--task", "tiny_task:make", "--importance", "apox", "--out", "run")
    assert answer.exit_code == 2 and "Did you mean 'apoz'?" in answer.stderr
    assert not (tmp_path / "run").exists()


def test_search_refuses_a_distillation_that_cannot_be(call: Callable[..., Result], tmp_path: Path) -> None:
    words = ("search", "--task", "tiny_task:make", "--out", "run", "--set", "recovery.distill=attention")
    # After global pooling there is one position, and no map to speak of.
    answer = call(*words, "--set", "recovery.distill_at=['6']")
    assert answer.exit_code == 2 and "'attention' needs a module" in answer.stderr, answer.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [("prune", "--ratio", "0.3"), ("quantize", "--max-drop", "20pp")])
def test_methods_without_labels_are_measured_by_agreement(call: Callable[..., Result], words: tuple[str, ...]) -> None:
    answer = call(*words, "--task", "tiny_task:make", "--metric", "cosine")
    assert answer.exit_code == 0, answer.stderr
    # The uncompressed model agrees with itself.
    assert "100.00%" in answer.stdout or "1.0000" in answer.stdout
    assert "Did you mean" in call(*words, "--task", "tiny_task:make", "--set", "task.metrics=cosine").stderr
