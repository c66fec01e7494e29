"""Corrections layer by layer, and the ladder of them."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.quantization import activation_ranges, calibrate, quantization_mode
from autocompress.config import QuantizationConfig
from autocompress.errors import CompressionError
from autocompress.graph.builder import Ranges, exported
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.recovery.bias_correction import FloatOutputs, correct
from autocompress.recovery.ptq_stages import RUNGS, PtqStage, best_stage, run_stages
from autocompress.tasks import ClassificationTask
from tests import networks

EVERY = CompressionPolicy(layers={n: LayerPolicy("int8") for n in ("conv1", "conv2", "fc")})


def made(model: nn.Module, inputs: Tensor, policy: CompressionPolicy = EVERY) -> nn.Module:
    config = QuantizationConfig(calibration="minmax")
    found = apply_policy(model, policy, CompressionContext(inputs[:2], quantization=config))
    calibrate(found, [inputs])
    return found


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# -- layer by layer ---------------------------------------------------------------------------------------------------


def test_the_mean_that_rounding_takes_goes_to_the_bias_by_hand() -> None:
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.27, 0.004]]))
        layer.bias.fill_(1.0)
    # The second input is always 100: 0.4 is lost, since 0.004 is less than half a step of 0.01.
    inputs = torch.stack([torch.zeros(8), torch.full((8,), 100.0)], 1)
    model = made(nn.Sequential(layer), inputs, CompressionPolicy(layers={"0": LayerPolicy("int8")}))
    assert correct(model, inputs, FloatOutputs.of(model, inputs)) == {}
    assert float(model.get_parameter("0.bias").detach()) == pytest.approx(1.4, rel=1e-5)
    with torch.no_grad():
        assert float(model(inputs)[0]) == pytest.approx(1.4, rel=1e-5)


@pytest.mark.parametrize("steps", [0, 100])
def test_means_are_right_behind_biases_and_batch_norms(steps: int) -> None:
    inputs = networks.images(64)
    original = networks.randomize(networks.Plain())
    model = made(original, inputs)
    wanted = FloatOutputs.of(model, inputs)
    assert wanted.norms == {"conv1": "bn1"}
    means = {}

    def means_of(name: str) -> None:
        layer = model.get_submodule(name)
        layer.register_forward_hook(
            lambda _m, _i, output: means.__setitem__(name, output.movedim(1, -1).flatten(0, -2))
        )

    for name in ("bn1", "fc"):
        means_of(name)
    with torch.no_grad():
        with quantization_mode(model, "off"):
            model(inputs)
        before = {name: rows.mean(0) for name, rows in means.items()}
        assert correct(model, inputs, wanted, steps=steps) == {}
        model(inputs)
    for name, mean in before.items():
        torch.testing.assert_close(means[name].mean(0), mean, rtol=0.02, atol=0.02)


def test_learned_rounding_brings_the_network_nearer_to_itself() -> None:
    inputs = networks.images(128)
    original = networks.randomize(networks.Residual())
    names = ("same.conv1", "same.conv2", "wider.conv1", "wider.conv2", "fc")
    model = made(original, inputs, CompressionPolicy(layers={n: LayerPolicy("int8") for n in names}))
    wanted = FloatOutputs.of(model, inputs)
    other = networks.images(64, seed=5)
    errors = []
    for steps in (0, 200):
        tried = copy.deepcopy(model)
        correct(tried, inputs, wanted, steps=steps)
        with torch.no_grad():
            errors.append(relative(tried(other), original(other)))
    assert errors[1] < errors[0] < 0.1


def test_layers_that_cannot_be_corrected_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.bare = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
            self.mirrored = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")

        def forward(self, x: Tensor) -> Tensor:
            x = self.bare(self.twice(self.twice(x)).relu())
            return self.mirrored(x[:, None])  # type: ignore[no-any-return]

    inputs = torch.randn(16, 4, 4)
    policy = CompressionPolicy(layers={n: LayerPolicy("int8") for n in ("twice", "bare", "mirrored")})
    model = made(Odd().eval(), inputs, policy)
    notes = correct(model, inputs, FloatOutputs.of(model, inputs))
    assert notes["twice"] == "runs more than once"
    assert "neither a bias" in notes["bare"] and "padding" in notes["mirrored"]


# -- the ladder -------------------------------------------------------------------------------------------------------


def uneven(model: nn.Module) -> nn.Module:
    """Make one channel of eight 300 times as large, and have it read 300 times less: the same function."""
    with torch.no_grad():
        for tensor in (model.get_parameter("bn1.weight"), model.get_parameter("bn1.bias")):
            tensor[0] *= 300
        model.get_parameter("conv2.weight")[:, 0] /= 300
    return model


@pytest.fixture(scope="module")
def inputs(task: ClassificationTask) -> Tensor:
    return next(task.calibration(128))


@pytest.fixture(scope="module")
def agreement(task: ClassificationTask, inputs: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"outputs": task.model()(inputs)}


def nearness(model: nn.Module, inputs: Tensor, wanted: Tensor) -> float:
    with torch.no_grad():
        return 1 - relative(model(inputs), wanted)


def test_rungs_are_climbed_until_the_metric_is_met(
    task: ClassificationTask, inputs: Tensor, agreement: dict[str, Tensor], tmp_path: Path
) -> None:
    original = uneven(task.model())
    model = made(original, inputs)
    before = copy.deepcopy(model.state_dict())
    stages: list[str] = []

    def score(tried: nn.Module) -> float:
        return nearness(tried, inputs, agreement["outputs"])

    rungs = run_stages(model, inputs, score, steps=150, stage=stages.append)
    assert tuple(rung.name for rung in rungs) == RUNGS and len(stages) == 3
    plain, equal, rounded = (rung.metric for rung in rungs)
    assert equal > plain + 0.1 and rounded > equal
    assert score(model) < plain
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [r.name for r in run_stages(model, inputs, score, plain, steps=150)] == ["bias_correction"]
    assert [r.name for r in run_stages(model, inputs, score, equal - 1e-6, steps=150)] == list(RUNGS[:2])
    # The exporter stores the very codes that were learned.
    x = next(task.validation(32))[0]
    graph = exported(rungs[-1].model, x, Ranges(activation_ranges(rungs[-1].model)), "onnxruntime").model
    ir.save(graph, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert relative(torch.from_numpy(found), rungs[-1].model(x)) < 5e-3


def test_the_first_rung_that_is_good_enough_is_taken_else_the_best() -> None:
    rungs = [PtqStage(name, nn.Identity(), metric, 0.0) for name, metric in zip(RUNGS, (0.7, 0.8, 0.8), strict=True)]
    assert best_stage(rungs, 0.75).name == "equalization"
    assert best_stage(rungs, 0.6).name == "bias_correction"
    assert best_stage(rungs, 0.9).name == "equalization"


def test_a_model_without_int8_and_data_that_say_nothing(inputs: Tensor, task: ClassificationTask) -> None:
    with pytest.raises(CompressionError, match="no int8 layer"):
        run_stages(task.model(), inputs, lambda model: 1.0)
    broken = made(task.model(), inputs)
    with torch.no_grad():
        broken.get_parameter("fc.weight")[0, 0] = torch.nan
    with pytest.raises(CompressionError, match=r"'fc.weight' holds NaN"):
        run_stages(broken, inputs, lambda model: 1.0)
    with pytest.raises(CompressionError, match=r"nothing but zeros.*'conv1'"):
        run_stages(made(task.model(), inputs), torch.zeros_like(inputs), lambda model: 1.0)
