"""The doctor on engines that are here, on one that is not, and on a GPU that is not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from autocompress.cli import main
from autocompress.errors import ConfigError
from autocompress.measurement.doctor import FAILED, NOTE, OK, SKIPPED, Check, _clocks, examine


def states(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.state for check in checks}


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_cpu_engine_is_built_run_and_timed(engine: str) -> None:
    pytest.importorskip(engine)
    checks = list(examine(engine))
    assert set(states(checks).values()) == {OK}
    assert {"library", "device", "dtypes", "fp32", "int8 in fp32"} <= set(states(checks))
    assert all("median" in c.detail for c in checks if c.name in ("fp32", "int8 in fp32"))


def test_settings_that_an_engine_does_not_have() -> None:
    pytest.importorskip("openvino")
    with pytest.raises(ConfigError, match="'openvino' has no engine_options"):
        list(examine("openvino", {"compute_capability": "8.9"}))


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    (check,) = examine("tensorrt")
    assert (check.state, check.remedy) == (FAILED, "pip install 'autocompress[tensorrt]'")


def test_a_gpu_that_is_not_here() -> None:
    pytest.importorskip("tensorrt_rtx")
    from tests.engines.tensorrt.test_engine import has_gpu

    if has_gpu():
        pytest.skip("there is a GPU here")
    checks = list(examine("tensorrt-rtx"))
    assert states(checks) == {"library": OK, "device": FAILED, "networks": SKIPPED}
    assert "nvidia-smi" in checks[1].detail
    ahead = list(examine("tensorrt-rtx", {"compute_capability": "8.9"}))
    assert states(ahead) == dict.fromkeys(("library", "device", "dtypes", "fp32", "bf16", "fp16", "int8 in fp16"), OK)
    assert "not run" in ahead[-1].detail


def test_the_command() -> None:
    pytest.importorskip("onnxruntime")
    said = CliRunner().invoke(main, ["doctor", "--engine", "onnxruntime", "--json"])
    assert said.exit_code == 0
    assert [c["state"] for c in json.loads(said.stdout)] == [OK] * 5
    table = CliRunner().invoke(main, ["doctor", "--engine", "onnxruntime"])
    assert "What works here" in table.stdout
    assert CliRunner().invoke(main, ["doctor", "--engine", "openvin"]).exit_code == 2


def test_the_command_fails_where_something_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    assert CliRunner().invoke(main, ["doctor", "--engine", "tensorrt"]).exit_code == 4


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ("echo '1410, 1980, 41, Disabled, 0x0000000000000000, 580.65.06'", {"clocks": OK, "persistence mode": NOTE}),
        ("echo '1410, 1980, 41, Enabled, 0x4, 580.65.06'", {"clocks": OK, "locked clocks": NOTE}),
        ("exit 9", {"clocks": NOTE}),
        ("echo nothing", {"clocks": NOTE}),
    ],
)
def test_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, expected: dict[str, str]) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{says}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = list(_clocks())
    assert expected.items() <= states(found).items()
    assert all(c.remedy for c in found if c.state == NOTE)
