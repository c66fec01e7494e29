"""Learned steps: their gradient by hand, their bounds, and what is exported in the end."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from autocompress.compress import CompressionContext, apply_policy
from autocompress.compress.quantization import (
    activation_ranges,
    calibrate,
    learned_step,
    quantization_mode,
    quantized_layers,
)
from autocompress.compress.rounding import fake_quantize_weight
from autocompress.config import RecoveryConfig, RunConfig
from autocompress.graph.builder import Ranges, exported
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.recovery import recalibrate
from autocompress.recovery.budget import Budget
from autocompress.recovery.distillation import Teacher
from autocompress.recovery.finetune import finetune
from autocompress.recovery.lsq import learn_steps, settle
from autocompress.tasks import ClassificationTask
from tests.recovery.conftest import untrained

LSQ = RecoveryConfig(batch_size=64, learning_rate=0.1, qat="lsq", qat_fraction=0.5)
INT8 = CompressionPolicy(layers={n: LayerPolicy("int8") for n in ("conv1", "conv2", "fc")})


def student(task: ClassificationTask) -> nn.Module:
    model = apply_policy(untrained(5), INT8, CompressionContext(task.example_inputs(2)))
    with quantization_mode(model, "off"):
        recalibrate(model, task.calibration(64))
    calibrate(model, task.calibration(64))
    return model


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


def test_the_gradient_of_a_step_by_hand() -> None:
    x = torch.tensor([[0.7, -0.2, 9.0, -9.0]], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    rounded = learned_step(x, step, -4, 3, features=3)
    assert rounded.tolist() == [[0.5, 0.0, 1.5, -2.0]]
    rounded.sum().backward()
    # 1 - 1.4, 0 + 0.4, the largest code, the smallest; over sqrt(3 features x 3).
    assert step.grad is not None and float(step.grad) == pytest.approx((-0.4 + 0.4 + 3 - 4) / 3)
    assert x.grad is not None and x.grad.tolist() == [[1, 1, 0, 0]]


def test_steps_stay_within_their_bounds_and_weights_are_cut_off_where_they_end(task: ClassificationTask) -> None:
    model = student(task)
    before, names = activation_ranges(model), list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    learn_steps(model, optimizer)
    assert list(model.state_dict()) == names
    layers = dict(quantized_layers(model))
    conv = layers["conv2"]
    assert conv.learned is not None and conv.input_quantizer.learned is not None
    most = conv.largest_step()
    conv.input_quantizer.learned.grad = torch.tensor(-1e9)
    conv.learned.grad = torch.full_like(conv.learned, -1.0)
    conv.learned.grad[0] = float(most[0]) / 2
    optimizer.step()
    found = activation_ranges(model)
    assert found["conv2"].scale == pytest.approx(4 * before["conv2"].scale) and found["conv1"] == before["conv1"]
    # They would grow, but an exporter takes no step from beyond the largest weight.
    torch.testing.assert_close(conv.learned.detach()[1:], most[1:])
    assert float(conv.learned[0].detach()) == pytest.approx(float(most[0]) / 2)
    x = task.example_inputs(8)
    learning = outputs(model, x)
    settle(model)
    assert conv.learned is None and conv.input_quantizer.learned is None
    torch.testing.assert_close(outputs(model, x), learning, rtol=1e-4, atol=1e-4)
    assert float(conv.largest_step()[0]) == pytest.approx(float(most[0]) / 2)
    unchanged = copy.deepcopy(model.state_dict())
    settle(model)
    assert all(torch.equal(tensor, unchanged[name]) for name, tensor in model.state_dict().items())


def test_a_trained_student_has_other_steps_and_the_exported_graph_agrees(
    task: ClassificationTask, tmp_path: Path
) -> None:
    teacher = Teacher(task.model(), torch.float32)
    models = {}
    for qat in ("straight_through", "lsq"):
        models[qat] = student(task)
        finetune(models[qat], teacher, task, LSQ.model_copy(update={"qat": qat}), Budget(4, 1000.0))
    # The first halves are the same, calibration included: what differs was learned.
    ranges = {qat: activation_ranges(model) for qat, model in models.items()}
    assert all(ranges["lsq"][n].scale != ranges["straight_through"][n].scale for n in ranges["lsq"])
    assert all(0.24 < ranges["lsq"][n].scale / r.scale < 4.1 for n, r in ranges["straight_through"].items())
    model = models["lsq"]
    x, y = next(task.validation(128))
    assert task.metric(outputs(model, x), y) > 0.85
    graph = exported(model, x, Ranges(activation_ranges(model)), "onnxruntime").model
    ir.save(graph, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (given,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    wanted = outputs(model, x)
    assert float((torch.from_numpy(given) - wanted).norm() / wanted.norm()) < 5e-3
    for name, layer in quantized_layers(model):
        torch.testing.assert_close(fake_quantize_weight(layer.weight), layer.used_weight(), msg=name)


@pytest.mark.parametrize("qat", ["straight_through", "lsq"])
def test_a_finished_checkpoint_brings_back_the_very_model(task: ClassificationTask, tmp_path: Path, qat: str) -> None:
    path, teacher = tmp_path / "checkpoint.safetensors", Teacher(task.model(), torch.float32)
    config = LSQ.model_copy(update={"qat": qat})
    model = student(task)
    finetune(model, teacher, task, config, Budget(2, 1000.0), checkpoint=path)
    again = student(task)
    finetune(again, teacher, task, config, Budget(2, 1000.0), checkpoint=path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    x = task.example_inputs(8)
    assert torch.equal(outputs(model, x), outputs(again, x))


def test_an_interrupted_one_goes_on_with_the_steps_it_had(task: ClassificationTask, tmp_path: Path) -> None:
    path, teacher = tmp_path / "checkpoint.safetensors", Teacher(task.model(), torch.float32)

    class Stopped(Exception):  # noqa: N818
        pass

    def stop(fraction: float, text: str) -> None:
        if fraction > 0.8:
            raise Stopped

    with pytest.raises(Stopped):
        finetune(student(task), teacher, task, LSQ, Budget(4, 1000.0), checkpoint=path, progress=stop)
    stored = load_file(path)
    seen: list[float] = []
    model = student(task)
    layer = dict(quantized_layers(model))["conv2"]
    model.register_forward_pre_hook(
        lambda *_: seen.append(float(layer.input_quantizer.scale)) if layer.learned is not None else None
    )
    report = finetune(model, teacher, task, LSQ, Budget(4, 1000.0), checkpoint=path)
    assert seen[0] == float(stored["conv2.input_quantizer.scale"]) != seen[-1]
    assert report.epochs == pytest.approx(4)


def test_the_run_file_says_which() -> None:
    assert RunConfig().recovery.qat == "straight_through"
    with pytest.raises(ValueError, match="straight_through"):
        RunConfig.model_validate({"recovery": {"qat": "lsqplus"}})
