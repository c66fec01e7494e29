"""What is read back gives a validated value or an error of ours that names file, key and value."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from autocompress.config import load_config
from autocompress.deploy.artifacts import input_ports
from autocompress.documents import (
    MAX_DEPTH,
    PlainName,
    RelativeFolder,
    parse_json,
    parse_yaml,
    read_bytes,
    reading,
    shown,
    validated,
)
from autocompress.errors import ConfigError, VerificationError
from autocompress.files import read_json, write_json, write_text
from autocompress.report.run_view import read_run
from autocompress.runs.directory import RunDirectory
from autocompress.runs.records import TrialRecord

EARLIER = Path(__file__).parents[1] / "fixtures" / "earlier"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(EARLIER / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "NaN", "[Infinity]", "-Infinity", "1e999", "9" * 400, "9" * 5000, str(2**63), "[" * 200_000, b"\xff",
        b'"\xed\xa0\x80"', "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
    ],
)  # fmt: skip
def test_json_past_its_bounds_is_refused_by_name(text: str | bytes) -> None:
    with pytest.raises(ConfigError, match=r"^x\.json cannot be read: "):
        parse_json(text, "x.json")


@pytest.mark.parametrize(
    "text", ["[" * 5000, "a: [", "seed: 2001-99-99", "!!python/object/apply:os.getcwd []", b"\xff"]
)
def test_yaml_past_its_bounds_is_refused_by_name(text: str | bytes) -> None:
    with pytest.raises(ConfigError, match=r"^x\.yaml cannot be read: "):
        parse_yaml(text, "x.yaml")


def test_a_document_that_names_one_part_over_and_over_takes_no_time() -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]
    bomb = parse_yaml("\n".join(lines), "x.yaml")
    assert len(shown(bomb)) < 5000


@dataclass(frozen=True)
class Named:
    """A document."""

    file: PlainName
    folder: RelativeFolder = "a"
    count: int = 0


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", ".x", "a b", 'a"b', "a'b", "a\nb", "a" * 300, "é", "a*"],
)
def test_names_from_a_file_are_plain(name: str) -> None:
    with pytest.raises(ConfigError, match=r"file is .*only plain file names are allowed"):
        validated(Named, {"file": name}, "x.json")
    with pytest.raises(ConfigError, match="folder is"):
        validated(Named, {"file": "a", "folder": f"a/{name.removeprefix('a/b') or '..'}" if name else ""}, "x.json")


def test_an_error_names_file_key_value_and_mend() -> None:
    with pytest.raises(ConfigError, match=r"^x\.json cannot be read: count is 'many': .*\. Copy it again\.$"):
        validated(Named, {"file": "a", "count": "many"}, "x.json", "Copy it again.")
    with pytest.raises(ConfigError, match="file: Field required"):
        validated(Named, {}, "x.json")


@pytest.mark.parametrize(
    "error", [KeyError("a"), RecursionError(), MemoryError(), OverflowError("big"), IsADirectoryError()]
)
def test_whatever_a_library_raises_becomes_an_error_of_ours(error: BaseException) -> None:
    with pytest.raises(VerificationError, match=r"^x cannot be read: "), reading("x", error=VerificationError):
        raise error


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="no regular file"):
        read_bytes(tmp_path / "pipe")


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [b"null", b"[]", b"{}", b"3", b'"x"', b"{", b'{"a": "\xff"}', b"[" * 100_000, b'{"number": ' + b"9" * 5000 + b"}"],
)
def test_damaged_lines_of_the_log_are_set_aside_and_named(run: Path, line: bytes) -> None:
    log = run / "trials.jsonl"
    whole = log.read_bytes().splitlines()
    log.write_bytes(b"\n".join([whole[0], line, *whole[1:]]) + b"\n")
    found = RunDirectory.open(run).log()
    assert len(found.values) == len(whole) and len(found.damaged) == 1
    assert found.damaged[0].startswith(f"{log}, line 2")
    assert read_run(RunDirectory.open(run)).damaged == found.damaged


def test_what_was_left_out_is_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from click.testing import CliRunner

    from autocompress.cli import main

    with (run / "trials.jsonl").open("a") as file:
        file.write("null\n")
    answer = CliRunner().invoke(main, ["pareto", str(run)])
    assert answer.exit_code == 0 and "Left out:" in answer.stderr and "line 4" in answer.stderr


def _changed(path: Path, change: dict[str, Any]) -> Path:
    write_json(path, {**read_json(path), **change})
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"number": -1}, "number is -1"),
        ({"state": "lost"}, "state is 'lost'"),
        ({"artifact": "../../elsewhere"}, "artifact is '../../elsewhere'"),
        ({"artifact": "/etc"}, "artifact is '/etc'"),
        ({"measurement": {}}, "measurement.latency_ms: Field required"),
        ({"measurement": 3}, "measurement is 3"),
        ({"policy": None}, "A policy is a mapping"),
        ({"seconds": {"build": "long"}}, "seconds.build is 'long'"),
    ],
)
def test_a_record_that_cannot_be_is_refused_by_name(run: Path, change: dict[str, Any], said: str) -> None:
    path = _changed(run / "best" / "record.json", change)
    with pytest.raises(ConfigError, match=said) as raised:
        TrialRecord.read(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    "text", ["{}", "null", "[]", "3", '{"best": 3}', '{"best": {"stage": "x"}}', '{"missed": [3]}']
)
def test_a_damaged_summary_costs_the_summary_alone(run: Path, text: str) -> None:
    from click.testing import CliRunner

    from autocompress.cli import main

    (run / "summary.json").write_text(text)
    answer = CliRunner().invoke(main, ["pareto", str(run)])
    assert answer.exit_code in (0, 2), answer.output
    assert answer.exception is None or isinstance(answer.exception, SystemExit)


@pytest.mark.parametrize("keep", [0, 1, 20, 200])
def test_graphs_cut_short_are_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes((EARLIER / "run" / "best" / "model.onnx").read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"m\.onnx"):
        input_ports(path, 1)
    (tmp_path / "m.xml").write_bytes(b"<net><layers>\xff"[:keep])
    with pytest.raises(ConfigError, match=r"m\.xml"):
        input_ports(tmp_path / "m.xml", 1)


# -- options and result files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["max_size", "target_latency", "timeout"])
@pytest.mark.parametrize("number", ["1e308", "inf", "nan", "1e999", "-1"])
def test_no_limit_is_infinite(key: str, number: str) -> None:
    unit = {"max_size": "GB", "target_latency": "s", "timeout": "h"}[key]
    with pytest.raises(ConfigError, match=r"\."):
        load_config(None, {key: number + unit})


@pytest.mark.parametrize(
    "text", ["recovery.epochs=.inf", "recovery.learning_rate=.nan", "quantization.percentile=.nan"]
)
def test_no_number_of_the_run_file_is_infinite(text: str) -> None:
    with pytest.raises(ConfigError, match="finite"):
        load_config(None, {}, [text])


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_result_files_honour_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "x", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_records_written_are_read(run: Path) -> None:
    lines = (run / "trials.jsonl").read_text().splitlines()
    for line in lines:
        assert TrialRecord.from_dict(TrialRecord.from_dict(json.loads(line)).to_dict()).to_dict()
