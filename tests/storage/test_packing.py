"""`pack` and `unpack` from Python and from the command line: real files, real sizes, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import nn

import autocompress
from autocompress.cli import main
from autocompress.errors import CompressionError, ConfigError
from autocompress.storage.quantizers import QUANTIZERS
from tests.exploration import tiny


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 64), nn.Linear(64, 10))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file(network().state_dict(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def command(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="autocompress", env={"COLUMNS": "100"})


# -- Python -------------------------------------------------------------------------------------------------------


def test_lossless_of_a_file_a_model_and_a_state_dict(weights: Path, tmp_path: Path) -> None:
    sources = (weights, network(), network().state_dict())
    packed = [autocompress.pack(source, tmp_path / f"packed-{i}") for i, source in enumerate(sources)]
    assert packed[1].path.read_bytes() == packed[2].path.read_bytes()
    for one in packed:
        assert one.lossless and one.size_bytes == one.path.stat().st_size
        assert one.original_bytes == weights.stat().st_size and one.ratio > 1
    back = autocompress.unpack(packed[0].path)
    assert all(torch.equal(back[name], value) for name, value in network().state_dict().items())
    network().load_state_dict(back)


def test_pruned_and_shared(weights: Path, tmp_path: Path) -> None:
    packed = autocompress.pack(weights, tmp_path / "packed", sparsity=0.9, weight_bits=3)
    back, before = autocompress.unpack(packed.path), load_file(weights)
    assert not packed.lossless and packed.ratio > 15
    for name in ("0.weight", "3.weight", "4.weight"):
        kept = back[name] != 0
        assert int(kept.sum()) == before[name].numel() - round(0.9 * before[name].numel())
        assert 1 < len(back[name][kept].unique()) <= 8
        assert float(before[name][kept].abs().min()) >= float(before[name][~kept].abs().max())
        assert float((back[name] - before[name])[kept].abs().max()) < float(before[name].abs().max()) / 4
    for name in ("0.bias", "1.weight", "1.running_var", "1.num_batches_tracked", "3.bias"):
        assert torch.equal(back[name], before[name])


def test_per_name_and_globally(weights: Path, tmp_path: Path) -> None:
    autocompress.pack(weights, tmp_path / "a", sparsity={"3.weight": 0.5}, weight_bits={"4.bias": 1})
    back, before = autocompress.unpack(tmp_path / "a"), load_file(weights)
    assert int((back["3.weight"] == 0).sum()) == 288 * 32 and torch.equal(back["4.weight"], before["4.weight"])
    assert len(back["4.bias"].unique()) == 2
    autocompress.pack(weights, tmp_path / "b", sparsity=0.5, scope="global")
    back = autocompress.unpack(tmp_path / "b")
    zeros = {name: float((back[name] == 0).float().mean()) for name in ("0.weight", "3.weight", "4.weight")}
    # The small layers have fewer inputs, so larger weights.
    assert zeros["0.weight"] < zeros["4.weight"] < zeros["3.weight"]


@pytest.mark.parametrize("scheme", QUANTIZERS)
def test_every_quantizer(scheme: str, weights: Path, tmp_path: Path) -> None:
    bits = None if len(QUANTIZERS[scheme].BITS) == 1 else 3
    packed = autocompress.pack(weights, tmp_path / "packed", weight_bits=bits, scheme=scheme)
    assert all(one.levels is not None and one.levels <= 8 for one in packed.tensors if one.name == "3.weight")
    assert packed.ratio > 6


def test_what_cannot_be_packed(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    (tmp_path / "folder").mkdir()
    cases: list[tuple[object, dict[str, object], str]] = [
        (weights, {"weight_bits": 9}, "not 9"),
        (weights, {"sparsity": 1.0}, r"\[0, 1\)"),
        (weights, {"scheme": "uniform"}, "needs weight_bits"),
        (weights, {"scheme": "jpeg"}, "Unknown quantizer 'jpeg'"),
        (weights, {"weight_bits": {"9.weight": 2}}, "'9.weight'"),
        (weights, {"coders": ("zip",)}, "Unknown coder 'zip'"),
        (tmp_path / "folder", {}, "weights.safetensors"),
        (tmp_path / "nowhere", {}, "does not exist"),
    ]
    for source, options, said in cases:
        with pytest.raises(ConfigError, match=said):
            autocompress.pack(source, tmp_path / "packed", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="exists already"):
        autocompress.pack(weights, tmp_path / "there")
    state = {"w": torch.tensor([[1.0, float("nan")]])}
    with pytest.raises(CompressionError, match=r"'w'.*NaN"):
        autocompress.pack(state, tmp_path / "packed", weight_bits=2)
    assert (tmp_path / "there").read_text() == "mine" and not (tmp_path / "packed").exists()
    autocompress.pack(state, tmp_path / "packed")  # as it is, it can be kept
    with pytest.raises(ConfigError, match="exists already"):
        autocompress.unpack(tmp_path / "packed", tmp_path / "there")


# -- the command line ---------------------------------------------------------------------------------------------


def test_a_scale_for_every_channel(weights: Path, tmp_path: Path) -> None:
    words = ("pack", weights, "--bits", 4, "--quantizer", "asymmetric", "--granularity")
    packed = command(*words, "channel", "--out", tmp_path / "channel", "--json")
    assert packed.exit_code == 0, packed.stderr
    forms = {one["name"]: one["form"] for one in json.loads(packed.stdout)["tensors"]}
    assert forms["3.weight"] == "scaled"
    assert command(*words, "32", "--out", tmp_path / "group").exit_code == 0
    assert command("unpack", tmp_path / "channel", "--out", tmp_path / "back.safetensors").exit_code == 0
    back = load_file(tmp_path / "back.safetensors")["3.weight"]
    assert all(len(row.unique()) <= 16 for row in back) and len(back.unique()) > 256
    refused = command(*words, "48", "--out", tmp_path / "none")
    assert refused.exit_code == 2 and "granularity 48" in refused.stderr and not (tmp_path / "none").exists()


def test_pack_and_unpack_a_file(weights: Path, tmp_path: Path) -> None:
    packed = command("pack", weights, "--out", tmp_path / "packed", "--sparsity", "0.8", "--bits", "4")
    assert packed.exit_code == 0, packed.stderr
    size = (tmp_path / "packed").stat().st_size
    for word in ("3.weight", "kept as", "original", "pruned", "shared", "coded", f"{size:,}", "header"):
        assert word in packed.stdout, packed.stdout
    assert "accuracy was not measured" in packed.stderr
    answer = command("unpack", tmp_path / "packed", "--out", tmp_path / "back.safetensors")
    assert answer.exit_code == 0 and "back.safetensors" in answer.stdout
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(back[name], one) for name, one in autocompress.unpack(tmp_path / "packed").items())


def test_pack_prints_json(weights: Path, tmp_path: Path) -> None:
    answer = command("pack", weights, "--out", tmp_path / "packed", "--coder", "huffman", "--json")
    found = json.loads(answer.stdout)
    assert answer.stderr == "" and found["lossless"] is True
    assert found["size_bytes"] == (tmp_path / "packed").stat().st_size
    assert found["ratio"] == pytest.approx(weights.stat().st_size / found["size_bytes"])
    assert {one["name"] for one in found["tensors"]} == set(network().state_dict())
    answer = command("unpack", tmp_path / "packed", "--out", tmp_path / "back.safetensors", "--json")
    assert json.loads(answer.stdout)["tensors"]["3.weight"] == {"shape": [64, 288], "dtype": "float32"}


def refused(answer: Result, code: int, said: str) -> None:
    assert answer.exit_code == code and said in answer.stderr and answer.stdout == "", answer.output


def test_refusals_have_exit_codes(weights: Path, tmp_path: Path) -> None:
    refused(command("pack", weights, "--out", tmp_path / "x", "--bits", "9"), 2, "not 9")
    refused(command("pack", weights, "--out", weights), 2, "exists already")
    refused(command("unpack", weights, "--out", tmp_path / "y"), 2, "no packed file")
    assert command("pack", weights, "--out", tmp_path / "packed").exit_code == 0
    data = (tmp_path / "packed").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-7])
    (tmp_path / "bad").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(command("unpack", tmp_path / "cut", "--out", tmp_path / "y"), 6, "cut short")
    refused(command("unpack", tmp_path / "bad", "--out", tmp_path / "y"), 6, "checksum")
    assert not (tmp_path / "y").exists()


def test_the_result_of_a_search_is_packed(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    run, _, _ = tiny.finished(tmp_path_factory.mktemp)
    for source in (run, run / "best"):
        packed = autocompress.pack(source, tmp_path / source.name)
        assert packed.original_bytes == (run / "best" / "weights.safetensors").stat().st_size
        back, before = autocompress.unpack(packed.path), load_file(run / "best" / "weights.safetensors")
        assert all(torch.equal(back[name], one) for name, one in before.items())
