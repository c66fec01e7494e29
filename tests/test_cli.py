"""The command line from outside: documents, tables, exit codes and messages, with real engines on a tiny model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from autocompress.cli import main
from autocompress.evaluation import profiler
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.protocol import Protocol
from autocompress.prediction.table import LatencyTable
from autocompress.runs.directory import RunDirectory
from autocompress.tasks.cifar_models import CIFAR_MODELS
from tests.exploration import tiny

RUN_FILES = {
    "config.yaml", "env.json", "study.db", "trials.jsonl", "pareto.json", "summary.json", "report.html",
    "baseline", "best", "artifacts",
}  # fmt: skip
ARTIFACT_FILES = {
    "engine.json", "record.json", "policy.json", "latency.json", "weights.safetensors", "model.onnx",
    "reference.safetensors", "model.xml", "model.bin",
}  # fmt: skip


@dataclass(frozen=True)
class Finished:
    path: Path
    stdout: str
    stderr: str


@pytest.fixture
def done(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(*tiny.finished(tmp_path_factory.mktemp))


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in this process, in a folder of its own, as a terminal of 80 columns would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "path", list(sys.path))
    # What a user's task module changes (see `tiny.TASK`) stays in this test.
    for name in ("standard", "trial"):
        monkeypatch.setattr(Protocol, name, Protocol.__dict__[name])
    monkeypatch.delitem(sys.modules, "tiny_task", raising=False)

    def run(*words: object) -> Result:
        return CliRunner().invoke(main, [str(word) for word in words], prog_name="autocompress")

    return run


def refused(result: Result, *said: str, code: int = 2) -> None:
    """Check a user's error: its code, every word expected, no traceback, nothing on stdout."""
    assert result.exit_code == code, (result.stderr, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.stderr and result.stdout == ""
    for words in said:
        assert words in result.stderr, result.stderr


# -- search -----------------------------------------------------------------------------------------------------------


def test_search_prints_one_json_document_with_every_key(done: Finished) -> None:
    summary = json.loads(done.stdout)  # one document: anything beside it would not parse
    assert summary["schema_version"] == 1
    assert summary["run_dir"] == "run" and summary["engine"] == "openvino" and summary["device"]
    assert (summary["threads"], summary["batch_size"], summary["n_trials"], summary["n_failed"]) == (1, 1, 3, 0)
    assert {"accuracy", "latency_ms", "size_bytes", "dtype"} <= summary["baseline"].keys()
    best = summary["best"]
    assert {"trial", "accuracy", "accuracy_drop_pp", "latency_ms", "latency_ratio", "size_bytes"} <= best.keys()
    assert {"macs_ratio", "feasible", "verified", "path"} <= best.keys()
    assert best["feasible"] is True and best["verified"] is True
    drop = 100 * (summary["baseline"]["accuracy"] - best["accuracy"])
    assert best["accuracy_drop_pp"] == pytest.approx(drop)
    assert (done.path.parent / best["path"]).is_file()
    seconds = summary["seconds"]
    assert {"total", "profile", "proxy", "build", "measure", "recovery"} <= seconds.keys()
    assert sum(seconds.values()) - seconds["total"] == pytest.approx(seconds["total"], rel=0.01)
    assert json.loads((done.path / "summary.json").read_text()) == summary


def test_progress_goes_to_stderr(done: Finished) -> None:
    assert "Run directory: run" in done.stderr and "baseline val. acc." in done.stderr
    assert done.stderr.count("trial    ") >= 3 and "Fine-tuning trial" in done.stderr
    assert "Plan for 90 s" in done.stderr and "Steered by KL divergence of class scores" in done.stderr
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr


def test_the_run_directory_has_every_file(done: Finished) -> None:
    assert {p.name for p in done.path.iterdir()} >= RUN_FILES
    assert [p.name for p in done.path.glob("**/.*")] == [".lock"] and not (done.path / "validation.npy").exists()
    for folder in (done.path / "baseline", done.path / "best", *(done.path / "artifacts").iterdir()):
        # The baseline is the one that the others' samples are kept against; kernels are told of what a trial built.
        expected = ARTIFACT_FILES | (set() if folder.name == "baseline" else {"samples.npz"})
        assert {p.name for p in folder.iterdir()} - {"recovered", "kernels.json"} == expected, folder
        assert folder.parent.name != "artifacts" or (folder / "kernels.json").exists(), folder
    assert len(list((done.path / "artifacts").iterdir())) == 3
    lines = (done.path / "trials.jsonl").read_text().splitlines()
    assert {json.loads(line)["number"] for line in lines} == {0, 1, 2}


# -- stopping and going on --------------------------------------------------------------------------------------------


def test_a_killed_and_an_interrupted_search_go_on_and_miss_an_unreachable_target(tmp_path: Path) -> None:
    tiny.write_task(tmp_path)
    run = RunDirectory(tmp_path / "out")

    def finished(count: int) -> Callable[[], bool]:
        return lambda: len(run.history()) >= count

    words = ("--target-latency", "0.01x", "--n-trials", "50", "--space", "prune-only", "--out", "out")
    sets = ("--set", "recovery.enabled=false", "--set", "dense_dtype=fp32")
    start = ("search", "--task", "tiny_task:wide", *words, *sets)
    # A trial is recorded first and copied to best/ then; a death in between is what resuming repairs.
    best = run.best / "record.json"
    code, _, _ = tiny.stopped(start, tmp_path, signal.SIGKILL, lambda: finished(1)() and best.exists())
    assert code == -signal.SIGKILL
    first = run.history()
    assert first and best.exists()

    code, stdout, stderr = tiny.stopped((*start, "--resume"), tmp_path, signal.SIGINT, finished(len(first) + 1))
    assert code == 130 and stdout == "", stderr
    assert "Interrupted." in stderr and "autocompress search --out out --resume" in stderr
    assert "The best so far is in out/best" in stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["best"]["accuracy"] is None and "interrupted" in summary["lost"][-1]
    assert (tmp_path / "out/report.html").exists()
    assert "Traceback" not in stderr and "baseline" in stderr
    second = run.history()
    assert second[: len(first)] == first and len(second) > len(first)

    # The run file is remembered; only what changes is given. The target cannot be reached: the closest is offered.
    more = str(len(second) + 1)
    answer = tiny.run("search", "--out", "out", "--resume", "--n-trials", more, cwd=tmp_path)
    assert answer.returncode == 3, answer.stderr
    last = answer.stderr.splitlines()[-1]
    assert last.startswith("NoFeasibleTrialError: No candidate met every limit. The closest, trial ")
    assert "% over the target of" in last and "out/best" in last and "--resume" in last
    assert "limits not met" in answer.stdout and "✗ at most" in answer.stdout
    assert max(len(line) for line in answer.stdout.splitlines()) <= 80
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["best"]["feasible"] is False and summary["n_trials"] == len(second) + 1
    assert (tmp_path / summary["best"]["path"]).is_file()
    third = run.history()
    # The last line is the closest one measured again.
    assert third[: len(second)] == second and third[-1].number == summary["best"]["trial"]
    assert len({r.policy for r in third}) == len({r.number for r in third}) == len(second) + 1


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_what_a_scheduler_or_a_closed_terminal_stops_is_saved(how: signal.Signals, code: int, tmp_path: Path) -> None:
    tiny.write_task(tmp_path)
    run = RunDirectory(tmp_path / "a [run]")
    words = ("search", "--task", "tiny_task:wide", "--n-trials", "50", "--space", "prune-only", "--out", "a [run]")
    sets = ("--set", "recovery.enabled=false", "--set", "dense_dtype=fp32")
    found, stdout, stderr = tiny.stopped((*words, *sets), tmp_path, how, lambda: len(run.history()) >= 1)
    assert (found, stdout) == (code, "") and "Traceback" not in stderr, stderr
    assert f"Interrupted by {how.name}." in stderr
    assert "Go on with: autocompress search --out 'a [run]' --resume" in stderr
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["n_trials"] == len(run.records()) and "interrupted" in summary["lost"][-1]
    assert run.report_file.exists() and not list(run.path.glob(".owner*"))


# -- looking at a run -------------------------------------------------------------------------------------------------


def test_pareto_fits_80_columns_and_states_its_conditions(done: Finished, call: Callable[..., Result]) -> None:
    result = call("pareto", done.path)
    assert result.exit_code == 0, result.stderr
    assert max(len(line.rstrip()) for line in result.stdout.splitlines() if "Report" not in line) <= 80
    for words in ("Pareto front", "base", "★", "val. acc.", "openvino on", "1 thread, batch 1", "result: limits met"):
        assert words in result.stdout, words


def test_pareto_as_json_and_html(done: Finished, call: Callable[..., Result]) -> None:
    front = json.loads(call("pareto", done.path, "--json").stdout)
    assert front["axes"] == ["latency_ratio", "accuracy"]
    assert front["front"] == [r["number"] for r in front["records"]] != []
    result = call("pareto", done.path, "--html")
    assert result.stdout.strip() == str(done.path / "report.html")
    assert (done.path / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")


def test_deploy_benchmark_and_refusal_to_overwrite(
    done: Finished, call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All files in one process at one moment, where rows have their rounds in common: of several occasions each row
    # leaves out its own disturbed rounds.
    moment = Protocol(warm_up_s=0.01, min_iterations=20, min_seconds=0.05, max_seconds=0.1, rounds=5)
    monkeypatch.setattr(Protocol, "standard", classmethod(lambda cls, **_: moment))
    trial = json.loads(done.stdout)["best"]["trial"]
    result = call("deploy", done.path, "--trial", trial, "--to", "shipped", "--json")
    if result.exit_code == 6:  # a network this small is no faster; the protocol may see that it is slower
        pytest.skip(result.stderr)
    assert result.exit_code == 0, result.stderr
    manifest = json.loads(result.stdout)
    assert manifest == json.loads((tmp_path / "shipped/manifest.json").read_text())
    assert manifest["trial"] == trial and manifest["verification"]
    refused(call("deploy", done.path, "--to", "shipped"), "shipped already exists", "nothing is overwritten")
    result = call("benchmark", done.path / "baseline", "shipped", "--seconds", "0.05", "--json")
    rows = json.loads(result.stdout)
    assert [r["engine"] for r in rows] == ["openvino"] * 2 and rows[0]["ratio"] == 1.0
    assert rows[1]["baseline_ms"] == pytest.approx(rows[0]["latency_ms"])


def test_benchmark_prints_a_table(done: Finished, call: Callable[..., Result]) -> None:
    result = call("benchmark", done.path / "baseline", "--seconds", "0.05")
    assert result.exit_code == 0 and "Latency, measured interleaved" in result.stdout and "1 thread" in result.stdout


def test_benchmark_of_throughput(done: Finished, call: Callable[..., Result]) -> None:
    words = ["benchmark", done.path / "baseline", done.path / "baseline", "--seconds", "0.05", "--throughput"]
    result = call(*words, "--streams", 1, "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [(row["mode"], row["streams"]) for row in rows] == [("throughput", 1)] * 2
    assert all(row["throughput_per_s"] > 0 for row in rows)
    assert rows[1]["verdict"] in ("faster", "slower", "equal", "unsure") and isinstance(rows[1]["noise"], list)
    shown = call(*words).stdout
    assert "Throughput, measured interleaved" in shown and "samples/s" in shown and "stream" in shown
    assert max(map(len, shown.splitlines())) <= 80
    refused(call("benchmark", done.path / "baseline", "--streams", 2), "2 streams", "--throughput")
    refused(call(*words, "--streams", 9999), "9999 streams", "--streams")


# -- profile ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def profiled(call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run ``profile`` on the tiny task, with timing cut short."""
    tiny.write_task(tmp_path)
    brief = Protocol(
        warm_up_s=0.002, min_iterations=10, min_seconds=0.004, max_seconds=0.004, rounds=3, noise_limit=10, patience_s=0
    )
    monkeypatch.setattr(Protocol, "quick", classmethod(lambda cls, **_: brief))
    monkeypatch.setattr(profiler, "_KERNEL_SECONDS", 0.01)
    words = ("profile", "--task", "tiny_task:make", "--tables", "tables", "--set", "dense_dtype=fp32")
    return lambda *more: call(*words, *more)


def test_profile_writes_a_table_goes_on_and_shows_it(
    profiled: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("--show measured something")

    refused(profiled("--show"), "No latency table knows this model", "openvino.csv", "autocompress profile")
    result = profiled("--networks", 2, "--json")
    assert result.exit_code == 0, result.stderr
    first = json.loads(result.stdout)
    assert (first["networks"], first["added"], first["unsupported"], first["held_out_error"]) == (2, 2, 0, None)
    path = Path(first["table"])
    assert path.name == "openvino.csv" and tmp_path / "tables" in (tmp_path / path).parents
    assert len(LatencyTable.load(tmp_path / path).of_network(first["network"]).networks) == 2

    result = profiled("--networks", 4)
    assert result.exit_code == 0, result.stderr
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    for words in ("latency table", "openvino.csv", "4; 2 of them in", "uncompressed", "too few networks"):
        assert words in result.stdout.replace("\n", ""), result.stdout
    known = LatencyTable.load(tmp_path / path)

    monkeypatch.setattr(EngineWorker, "_ask", refuse)
    result = profiled("--show")
    assert result.exit_code == 0, result.stderr
    page = Path(result.stdout.strip())
    assert page.suffix == ".html" and "<!doctype html>" in (tmp_path / page).read_text()[:200].lower()
    assert LatencyTable.load(tmp_path / path) == known


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine", "opnvino"], ["'opnvino'", "Did you mean 'openvino'?"]),
        (["--budget", "8"], ["budget '8' has no unit", "'25m'"]),
        (["--budget", "soon"], ["budget 'soon'"]),
        (["--networks", "many"], ["--networks", "'many'"]),
        (["--space", "prun-only"], ["'prun-only'", "Did you mean 'prune-only'?"]),
        (["--task", "digitz"], ["'digitz'", "Did you mean 'digits'?"]),
        (["--threads", "0"], ["threads", "0"]),
        (["--set", "dense_dtype=fp8"], ["dense_dtype"]),
        (["no.yaml"], ["no.yaml", "does not exist"]),
    ],
    ids=" ".join,
)
def test_a_bad_option_of_profile_is_named(
    words: list[str], said: list[str], call: Callable[..., Result], tmp_path: Path
) -> None:
    refused(call("profile", "--tables", "tables", *words), *said)
    assert not list(tmp_path.iterdir())


def test_a_damaged_table_is_named_and_kept(profiled: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / json.loads(profiled("--networks", 1, "--json").stdout)["table"]
    text = path.read_text().replace("network", "netwrk", 1)
    path.write_text(text)
    refused(profiled("--networks", 2), "openvino.csv")
    assert path.read_text() == text


CHATTY = """
import tiny_task
print("on import")


class Net(tiny_task.Net):
    def forward(self, inputs):
        print("in forward")
        return super().forward(inputs)


def make():
    print("in the factory")
    return tiny_task.make(Net)
"""


def test_what_a_users_module_prints_is_no_data(call: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "tiny_task.py").write_text(tiny.TASK)
    (tmp_path / "chatty_task.py").write_text(CHATTY)
    shown = call("inspect", "--task", "chatty_task:make", "--json")
    assert "layers" in json.loads(shown.stdout)
    for where in ("on import", "in the factory", "in forward"):
        assert where in shown.stderr


def test_inspect_lists_layers_and_groups(call: Callable[..., Result], tmp_path: Path) -> None:
    tiny.write_task(tmp_path)
    table = call("inspect", "--task", "tiny_task:make")
    assert table.exit_code == 0, table.stderr
    assert max(map(len, table.stdout.splitlines())) <= 80
    assert "Layers" in table.stdout and "3x3" in table.stdout and "Groups" in table.stdout
    found = json.loads(call("inspect", "--task", "tiny_task:make", "--json").stdout)
    assert list(found["layers"]) == ["0", "3", "8"] and found["macs"] > 0 and found["groups"]


def test_devices_and_env(call: Callable[..., Result]) -> None:
    found = json.loads(call("devices", "--json").stdout)
    assert "fp32" in found["engines"]["openvino"]["capabilities"]
    assert "openvino" in call("devices").stdout
    assert json.loads(call("env").stdout)


def test_help_says_what_each_command_does_in_full(call: Callable[..., Result]) -> None:
    text = call("--help").stdout
    assert "..." not in text.partition("Commands:")[2]
    for name in ("benchmark", "deploy", "devices", "env", "inspect", "pareto", "profile", "search"):
        assert name in text and call(name, "--help").exit_code == 0
    assert "autocompress search --task digits" in call("search", "--help").stdout


# -- what cannot be used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "digitz"], ["'digitz'", "Did you mean 'digits'?"]),
        (["--task", "no_such_module:make"], ["no_such_module:make", "cannot be imported"]),
        (["--task", "json:nothing"], ["'nothing'", "has no attribute"]),
        (["--task", "torchvision:resnet81"], ["resnet81", "Did you mean 'resnet"]),
        (["--task", "cifar10", "--set", "task.model=resnet21"], ["'resnet21'", "Did you mean 'resnet"]),
        (["--engine", "opnvino"], ["'opnvino'", "Did you mean 'openvino'?"]),
        (["--sampler", "tpee"], ["'tpee'", "Did you mean 'tpe'?"]),
        (["--space", "prun-only"], ["'prun-only'", "Did you mean 'prune-only'?"]),
        (["--space", "no.yaml"], ["no.yaml", "does not exist"]),
        (["--target-latency", "5"], ["'5'", "no unit", "'5ms'"]),
        (["--target-latency", "-5ms"], ["'-5ms'", "positive"]),
        (["--target-latency", "0x"], ["'0x'", "positive"]),
        (["--target-latency", "nan"], ["'nan'", "'5ms'"]),
        (["--target-latency", "5parsecs"], ["'5parsecs'", "parsecs"]),
        (["--max-drop", "1"], ["'1'", "'1pp'"]),
        (["--max-size", "20"], ["'20'", "no unit"]),
        (["--timeout", "25"], ["'25'", "'25m'"]),
        (["--n-trials", "0"], ["n_trials", "0"]),
        (["--n-trials", "many"], ["--n-trials", "'many'"]),
        (["--threads", "0"], ["threads", "0"]),
        (["--set", "recovery.epochs"], ["'recovery.epochs'", "key=value"]),
        (["--set", "=5"], ["'=5'", "key=value"]),
        (["--set", "recovery.epochs=[1"], ["recovery.epochs=[1"]),
        (["--set", "recovry.epochs=1"], ["'recovry'", "Did you mean 'recovery'?"]),
        (["--set", "recovery.epoch=1"], ["'recovery.epoch'", "Did you mean 'epochs'?"]),
        (["--set", "seed.x=1"], ["seed", "'x'"]),
        (["--trials", "5"], ["--trials"]),
        (["no.yaml"], ["no.yaml", "does not exist"]),
        (["--resume"], ["--resume needs --out"]),
        (["--out", "nothing", "--resume"], ["no run in nothing"]),
    ],
    ids=" ".join,
)
def test_a_bad_option_is_named(words: list[str], said: list[str], call: Callable[..., Result], tmp_path: Path) -> None:
    refused(call("search", *words), *said)
    # Nothing is left that would stand in the way of the corrected command.
    assert not [p for p in tmp_path.glob("**/*") if p.is_file()]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (": [", "cannot be read"),
        ("- 1", "must be a mapping"),
        ("targt_latency: 5ms", "Did you mean 'target_latency'?"),
        ("target_latency: 5", "'5' has no unit"),
        ("recovery: {epochs: -1}", "recovery.epochs"),
    ],
)
def test_a_bad_run_file_is_named(text: str, said: str, call: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    result = call("search", "run.yaml")
    refused(result, said)
    assert "run.yaml" in result.stderr or "target latency" in result.stderr


def test_a_binary_run_file(call: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    refused(call("search", "run.yaml"), "run.yaml", "cannot be read")


def test_data_that_is_missing_or_empty(call: Callable[..., Result], tmp_path: Path) -> None:
    save_file(CIFAR_MODELS["resnet20"]().state_dict(), tmp_path / "w.safetensors")
    words = ("search", "--task", "cifar10", "--set", "task.model=resnet20", "--set", "task.weights=w.safetensors")
    refused(call(*words, "--set", "task.data=nowhere"), "nowhere")
    (tmp_path / "hollow").mkdir()
    refused(call(*words, "--set", "task.data=hollow"), "hollow")


def torch_pickle(path: Path) -> None:
    torch.save({"fc.weight": torch.ones(2, 2)}, path)


def truncated(path: Path) -> None:
    save_file({"fc.weight": torch.ones(64, 64)}, path)
    path.write_bytes(path.read_bytes()[:1000])


def without_keys(path: Path) -> None:
    save_file({"fc.weight": torch.ones(2, 2)}, path)


def not_finite(path: Path) -> None:
    save_file({"fc.weight": torch.full((2, 2), float("nan"))}, path)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (torch_pickle, "PyTorch pickle"),
        (truncated, "not a whole safetensors file"),
        (without_keys, "missing in the file"),
        (not_finite, "NaN"),
    ],
)
def test_weights_that_cannot_be_used(
    write: Callable[[Path], None], said: str, call: Callable[..., Result], tmp_path: Path
) -> None:
    write(tmp_path / "weights.safetensors")
    tiny.write_task(tmp_path)
    result = call("search", "--task", "tiny_task:weighted", "--set", "task.weights=weights.safetensors")
    refused(result, said, "weights.safetensors")


def test_out_that_is_in_the_way(call: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(call("search", "--out", "file"), "--out file is a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    refused(call("search", "--out", "full"), "--out full is not empty", "--resume")
    refused(call("search", "--out", "full", "--resume"), "holds no run")
    assert (tmp_path / "full/thesis.tex").read_text() == "x"


def test_a_task_without_data_is_refused_before_a_run_is_made(tmp_path: Path) -> None:
    tiny.write_task(tmp_path)
    answer = tiny.run("search", "--task", "tiny_task:empty", "--out", "out", cwd=tmp_path)
    assert answer.returncode == 2 and "Traceback" not in answer.stderr and "found inputs (0, 1, 8, 8)" in answer.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_that_decides_on_values_cannot_be_exported(tmp_path: Path) -> None:
    tiny.write_task(tmp_path)
    answer = tiny.run("search", "--task", "tiny_task:decides", "--out", "out", cwd=tmp_path)
    assert answer.returncode == 5, answer.stderr
    last = answer.stderr.splitlines()[-1]
    assert (
        last.startswith("ExportError: ") and "data-dependent control flow" in last and "Traceback" not in answer.stderr
    )


def test_an_engine_that_is_not_installed_names_its_extra(tmp_path: Path) -> None:
    """A finder put before all others by ``sitecustomize`` hides the package from every process."""
    tiny.write_task(tmp_path)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'openvino':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    answer = tiny.run("search", "--task", "tiny_task:make", "--out", "out", cwd=tmp_path, path=str(hidden))
    assert answer.returncode == 4, answer.stderr
    assert "pip install 'autocompress[openvino]'" in answer.stderr and "Traceback" not in answer.stderr
    assert not (tmp_path / "out").exists()
    devices = json.loads(tiny.run("devices", "--json", cwd=tmp_path, path=str(hidden)).stdout)
    assert "autocompress[openvino]" in devices["engines"]["openvino"]["error"]


@pytest.mark.parametrize("words", [["pareto", "x"], ["deploy", "x", "--to", "y"], ["benchmark", "x"]], ids=" ".join)
def test_a_run_that_is_not_there(words: list[str], call: Callable[..., Result]) -> None:
    refused(call(*words), "x")


def test_debug_shows_the_traceback(call: Callable[..., Result]) -> None:
    result = call("--debug", "pareto", "x")
    assert result.exit_code == 1 and type(result.exception).__name__ == "ConfigError"


def test_what_libraries_print_from_c_does_not_get_between_the_data(tmp_path: Path) -> None:
    script = tmp_path / "noisy.py"
    script.write_text(
        "import os, click\n"
        "from autocompress.cli import main\n"
        "@main.command()\n"
        "def noisy():\n"
        "    os.write(1, b'from C')\n"
        "    click.echo('{}')\n"
        "main()\n"
    )
    for words, told in ((["noisy"], ""), (["--debug", "noisy"], "from C")):
        answer = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=True)
        assert json.loads(answer.stdout) == {} and answer.stderr == told
