from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autocompress.errors import ConfigError
from autocompress.tasks.weights import load_weights


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), *(nn.Conv2d(4, 4, 1) for _ in range(4)))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(network().state_dict(), path)
    return path


def rewrite(file: Path, **changes: torch.Tensor | None) -> None:
    state = {**network().state_dict(), **{key.replace("__", "."): value for key, value in changes.items()}}
    save_file({key: value for key, value in state.items() if value is not None}, file)


def test_weights_arrive_in_the_model(tmp_path: Path) -> None:
    source, target = network(), network()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    load_weights(target, tmp_path / "model.safetensors")
    assert all(bool((target.state_dict()[key] == value).all()) for key, value in source.state_dict().items())


def test_a_missing_batch_counter_is_forgiven(file: Path) -> None:
    rewrite(file, **{"1__num_batches_tracked": None})
    load_weights(network(), file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.safetensors does not exist"):
        load_weights(network(), tmp_path / "absent.safetensors")
    with pytest.raises(ConfigError, match="is a folder"):
        load_weights(network(), tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 40, -7])
def test_a_truncated_file_is_named_with_its_size(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=rf"model\.safetensors \({file.stat().st_size} bytes\) is not a whole"):
        load_weights(network(), file)


def test_bytes_of_something_else_are_refused(file: Path) -> None:
    file.write_bytes(b"<html>not found</html>" * 10)
    with pytest.raises(ConfigError, match="not a whole safetensors"):
        load_weights(network(), file)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.pt"
    model = network()
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConfigError, match="is a PyTorch pickle") as caught:
        load_weights(model, path)
    command = re.search(r'python -c "(.*)"$', str(caught.value))
    assert command is not None
    exec(command.group(1), {})
    load_weights(model, tmp_path / "model.safetensors")


def test_missing_and_unexpected_names_are_counted_and_five_listed(file: Path) -> None:
    missing: dict[str, None] = {f"{i}__{kind}": None for i in (2, 3, 4) for kind in ("weight", "bias")}
    rewrite(file, **missing, stray=torch.zeros(1))
    with pytest.raises(ConfigError) as caught:
        load_weights(network(), file)
    message = str(caught.value)
    assert "6 missing in the file: 2.weight, 2.bias, 3.weight, 3.bias, 4.weight, ..." in message
    assert "1 unexpected in the file: stray" in message


def test_another_shape_is_shown_on_both_sides(file: Path) -> None:
    rewrite(file, **{"0__weight": torch.zeros(8, 1, 3, 3)})
    with pytest.raises(ConfigError, match=r"0\.weight is \(8, 1, 3, 3\) in the file, \(4, 1, 3, 3\) in the model"):
        load_weights(network(), file)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(file: Path, value: float) -> None:
    rewrite(file, **{"3__bias": torch.tensor([0, value, 0, 0])})
    with pytest.raises(ConfigError, match=r"tensor '3\.bias' holds NaN or infinite"):
        load_weights(network(), file)


def test_a_refused_file_leaves_the_model_alone(file: Path) -> None:
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rewrite(file, stray=torch.zeros(1))
    with pytest.raises(ConfigError):
        load_weights(model, file)
    assert all(bool((model.state_dict()[key] == value).all()) for key, value in before.items())
