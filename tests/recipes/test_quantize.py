"""Post-training quantization without a search: in Python, as a command, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import autocompress
from autocompress.cli import main
from autocompress.compress import CompressionContext, apply_policy, rewrite
from autocompress.compress.quantization import activation_ranges
from autocompress.config import QuantizationConfig
from autocompress.errors import CompressionError, ConfigError
from autocompress.policy import CompressionPolicy
from autocompress.recipes.quantize import QuantizationOptions, quantize
from autocompress.recovery.ptq_stages import RUNGS
from autocompress.tasks import ClassificationTask, Task
from tests import networks
from tests.exploration import tiny

# No metric is this good, so that every rung is tried.
OUT_OF_REACH = -2.0


@pytest.fixture(scope="module")
def task() -> Task:
    return tiny.made("make")


def test_the_first_rung_is_enough_for_an_easy_task(task: Task) -> None:
    found = autocompress.quantize(task)
    assert [rung.name for rung in found.rungs] == ["bias_correction"] and found.feasible
    assert found.policy.int8_layers == ("0", "3", "8") and found.skipped == {}
    assert found.baseline - 0.01 <= found.rung.metric + 1e-9
    assert 0 <= found.test <= 1 and found.baseline_test > 0.8


def test_all_rungs_are_tried_where_none_is_enough(task: Task) -> None:
    stages: list[str] = []
    found = quantize(task, QuantizationOptions(OUT_OF_REACH, steps=20), stage=stages.append)
    assert tuple(rung.name for rung in found.rungs) == RUNGS and len(stages) == 3
    assert not found.feasible and found.rung.metric == max(rung.metric for rung in found.rungs)
    assert all(rung.seconds > 0 for rung in found.rungs)


def test_what_is_written_is_what_was_scored(task: Task, tmp_path: Path) -> None:
    found = autocompress.quantize(
        task, to=tmp_path / "out", skip=["0"], engine="onnxruntime", sets=["quantization.calibration=minmax"]
    )
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"policy.json", "weights.safetensors", "model.onnx", "quantize.json"}
    policy = CompressionPolicy.from_dict(json.loads((out / "policy.json").read_text()))
    assert policy.int8_layers == ("3", "8")
    again = apply_policy(rewrite(task.model()), policy, CompressionContext(task.example_inputs(2)))
    again.load_state_dict(load_file(out / "weights.safetensors"))
    assert activation_ranges(again) == activation_ranges(found.model)
    inputs = task.example_inputs(1)
    with torch.no_grad():
        wanted = again(inputs)
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    (given,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(given), wanted, rtol=5e-3, atol=5e-3)
    said = json.loads((out / "quantize.json").read_text())
    assert (said["engine"], said["calibration"], said["taken"]) == ("onnxruntime", "minmax", "bias_correction")
    assert said["skipped"] == {"0": "it was to be left out"}
    ops = [node.op_type for node in ir.load(out / "model.onnx").graph]
    # Both layers read int8, and what the first gives is rounded for ONNX Runtime.
    assert ops.count("QuantizeLinear") == 3


def test_calibration_changes_the_ranges(task: Task) -> None:
    scales = {
        name: activation_ranges(quantize(task, None, QuantizationConfig(calibration=name)).model)["3"].scale
        for name in ("minmax", "mse", "percentile", "entropy")
    }
    assert max(scales, key=lambda name: scales[name]) == "minmax" and len(set(scales.values())) > 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"skip": ["9"]}, "There is no layer '9' to skip"),
        ({"skip": ["0", "3", "8"]}, "No layer can be int8"),
        ({"max_drop": "1"}, "maximum drop '1'"),
        ({"engine": "openvin"}, "Unknown engine 'openvin'"),
        ({"rate": 1}, "unknown key 'rate'"),
    ],
)
def test_what_cannot_be_done_is_said(task: Task, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        autocompress.quantize(task, **values)
    with pytest.raises(ConfigError, match="0 steps of AdaRound"):
        QuantizationOptions(steps=0)


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [(0.5, ConfigError, "Every value"), (float("nan"), CompressionError, "NaN or an infinite .*'conv1'")],
)
def test_calibration_data_that_say_nothing(value: float, error: type[Exception], said: str) -> None:
    images, labels = torch.full((64, 3, 8, 8), value), torch.zeros(64, dtype=torch.long)
    made = ClassificationTask(networks.randomize(networks.Plain()), *[(images, labels)] * 3)
    with pytest.raises(error, match=said):
        quantize(made)


def test_the_command_shows_the_rungs_and_says_when_the_limit_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    words = ["quantize", "--task", "tiny_task:make", "--calibration", "entropy", "--skip", "0"]
    shown = CliRunner().invoke(main, [*words, "--to", "out"])
    assert shown.exit_code == 0, shown.stderr
    assert "bias correction" in shown.stdout and "calibrated by entropy" in shown.stdout
    assert "it was to be left out" in shown.stdout and "2 layers are int8" in shown.stdout
    assert (tmp_path / "out" / "model.onnx").exists() and max(map(len, shown.stdout.splitlines())) <= 80
    again = CliRunner().invoke(main, [*words, "--to", "out"])
    assert again.exit_code == 2 and "nothing is overwritten" in again.stderr
    found = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert found["feasible"] and found["rungs"][0]["name"] == "bias_correction"
    monkeypatch.setattr("autocompress.recipes.quantize.metric_of", _falling())
    missed = CliRunner().invoke(main, [*words, "--set", "max_drop=1pp"])
    assert missed.exit_code == 3 and "loses 30.00% at best" in missed.stderr
    assert "equalization" in missed.stdout and "adaround" in missed.stdout


def _falling() -> Any:
    """What every call to the metric gives: the uncompressed model, three rungs, test data of both."""
    given = iter([0.9, 0.5, 0.6, 0.55, 0.5, 0.9])
    return lambda *_: next(given)
