from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autocompress.config import TaskConfig
from autocompress.errors import ConfigError
from autocompress.tasks import ClassificationTask, load_task
from autocompress.tasks.image_task import switch_on
from tests.tasks.conftest import MakeFolder, save_weights, seeded_model

timm = pytest.importorskip("timm")
NAME = "test_resnet"  # 0.5 M parameters, 160 pixels


def test_weights_and_data_of_the_users(make_folder: MakeFolder, tmp_path: Path) -> None:
    model = seeded_model(lambda: timm.create_model(NAME, num_classes=3)).eval()
    weights = save_weights(model, tmp_path / "w.safetensors")
    folder = make_folder(classes=3, train=12, test=4, side=32)
    task = load_task(TaskConfig(name=f"timm:{NAME}", weights=str(weights), data=str(folder), calibration_size=16))
    assert isinstance(task, ClassificationTask)
    assert task.classes == 3
    x, _ = next(task.test(4))
    assert x.shape == (4, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(task.model()(x), model(x))


def test_random_weights_switch_nothing_off() -> None:
    # timm begins with residual branches of scale zero.
    model = switch_on(timm.create_model(NAME, zero_init_last=True))
    off = [n for n, p in model.named_parameters() if not n.endswith("bias") and float(p.detach().abs().max()) < 1e-3]
    assert off == []


def test_what_cannot_be_found_is_told() -> None:
    with pytest.raises(ConfigError, match=r"unknown timm model 'resnet81'.*resnet18"):
        load_task(TaskConfig(name="timm:resnet81", weights="random"))
    with pytest.raises(ConfigError, match="not a file"):
        load_task(TaskConfig(name=f"timm:{NAME}", weights="a1_in1k", data=".", metric="agreement"))
