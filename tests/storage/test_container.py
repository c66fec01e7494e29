"""The container: exact to the bit for any tensor, honest about its size, and clear about a file that is not whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from autocompress.errors import ConfigError, VerificationError
from autocompress.storage import read_container, write_container
from tests.storage.reader import read_independently


def shared_and_sparse(shape: tuple[int, ...] = (60, 50), dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randn(12, generator=generator)
    values = levels[torch.randint(0, 12, shape, generator=generator)]
    return values.masked_fill(torch.rand(shape, generator=generator) > 0.1, 0.0).to(dtype)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) / 20


def odd() -> dict[str, Tensor]:
    """Return what weights may be besides plain matrices."""
    return {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "nothing but zeros": torch.zeros(33, 5),
        "one value": torch.full((10,), 0.1),
        "minus zero and nan": torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45]),
        "bool": torch.tensor([True, False, True]),
        "int64": torch.arange(-3, 4),
        "uint8": torch.arange(256).to(torch.uint8),
        "float64": noise(4, 3).double(),
        "transposed": noise(6, 4).T,
        "channels last": noise(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "fp8": noise(20).to(torch.float8_e4m3fn),
    }


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


WEIGHTS = {
    "sparse.weight": shared_and_sparse((150, 100)),
    "conv.weight": shared_and_sparse((8, 4, 3, 3)),
    "bf16": shared_and_sparse((40, 40), torch.bfloat16),
    "fp16": noise(50, 40).half(),
    "dense": noise(40, 30),
    # A run of zeros is one gap; columns of them are, when columns are read one after the other.
    "columns": torch.cat([torch.zeros(300, 380), noise(300, 20).sign()], 1),
    "pruned": noise(50, 50).masked_fill(noise(50, 50) < 0.05, 0.0),
    "shared": torch.linspace(-1, 1, 16)[torch.arange(2000) * 7919 % 16].reshape(40, 50),
    **odd(),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("container") / "packed"
    write_container(WEIGHTS, path)
    return path


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(found) == list(expected) and all(
        found[name].dtype == expected[name].dtype
        and found[name].shape == expected[name].shape
        and bits(found[name]) == bits(expected[name])
        for name in expected
    )


def test_round_trip_to_the_bit(file: Path) -> None:
    assert same(read_container(file), WEIGHTS)


@pytest.mark.parametrize("coder", ["raw", "huffman", "ans", "ans16"])
def test_every_coder_alone(coder: str, tmp_path: Path) -> None:
    write_container(WEIGHTS, tmp_path / "packed", (coder,))
    assert same(read_container(tmp_path / "packed"), WEIGHTS)
    assert same(read_independently(tmp_path / "packed"), WEIGHTS)


def test_a_reader_written_from_the_document_alone_reads_it(file: Path) -> None:
    assert same(read_independently(file), WEIGHTS)


def test_forms_are_what_suits_the_tensor(tmp_path: Path) -> None:
    sizes = {one.name: one for one in write_container(WEIGHTS, tmp_path / "packed")}
    forms = {name: one.form for name, one in sizes.items()}
    assert forms["pruned"] == forms["columns"] == "sparse"
    assert forms["dense"] == forms["fp16"] == "planes" and forms["shared"] == "shared" and forms["bool"] == "raw"
    one = sizes["sparse.weight"]
    assert one.original == 60_000 and one.levels == 12 and one.nonzero == int((WEIGHTS["sparse.weight"] != 0).sum())
    assert one.original > one.pruned > one.shared > one.coded > 0
    assert sizes["dense"].pruned == sizes["dense"].shared == sizes["dense"].original > sizes["dense"].coded


def test_columns_are_read_where_that_is_shorter(tmp_path: Path) -> None:
    write_container(WEIGHTS, tmp_path / "packed")
    with safe_open(tmp_path / "packed", "np") as opened:
        described = json.loads(opened.metadata()["tensors"])
    assert described["columns"]["order"] == "columns" and described["pruned"]["order"] == "rows"


def test_sizes_by_hand(tmp_path: Path) -> None:
    # Four of 40 weights stay, of two values: gaps 3, 20, 5 and 8.
    weight = torch.zeros(40)
    weight[[3, 24, 30, 39]] = torch.tensor([0.5, -1.0, 0.5, -1.0])
    (one,) = write_container({"w": weight}, tmp_path / "packed")
    # An alphabet of 8 has them as 3, 7 7 6, 5 and 7 1: seven symbols of three bits, three bytes; no other needs fewer.
    assert one.original == 160 and one.pruned == 3 + 4 * 4
    # Two levels of four bytes, and a bit for each weight.
    assert one.shared == 2 * 4 + 3 + 1


def test_of_equal_weights_the_same_file(file: Path, tmp_path: Path) -> None:
    write_container(WEIGHTS, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


def test_large_shared_weights_come_near_their_entropy(tmp_path: Path) -> None:
    weight = shared_and_sparse((400, 400))
    (one,) = write_container({"w": weight}, tmp_path / "packed")
    kept = one.nonzero / weight.numel()
    positions = -kept * np.log2(kept) - (1 - kept) * np.log2(1 - kept)
    entropy = (weight.numel() * positions + one.nonzero * np.log2(12)) / 8
    assert entropy < one.coded < entropy * 1.03


# -- files that are not whole -------------------------------------------------------------------------------------


def changed(file: Path, to: Path, **metadata: str) -> Path:
    with safe_open(file, "np") as opened:
        save_file({"payload": opened.get_tensor("payload")}, to, {**opened.metadata(), **metadata})
    return to


def test_cut_short(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    for length in (len(data) - 1, len(data) // 2, 200):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(VerificationError, match="cut short"):
            read_container(tmp_path / "cut")


def test_one_bit_flipped(file: Path, tmp_path: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    (tmp_path / "flipped").write_bytes(data)
    with pytest.raises(VerificationError, match="checksum"):
        read_container(tmp_path / "flipped")


def test_wrong_checksum_and_descriptions(file: Path, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="checksum"):
        read_container(changed(file, tmp_path / "a", sha256="0" * 64))
    with safe_open(file, "np") as opened:
        text = opened.metadata()["tensors"]
    with pytest.raises(VerificationError, match="checksum"):
        read_container(changed(file, tmp_path / "b", tensors=text.replace("F32", "I32", 1)))


def test_another_version(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"version 2 .* reads 1"):
        read_container(changed(file, tmp_path / "new", version="2"))


RAW = {"dtype": "U8", "shape": [3], "size": 3, "form": "raw"}


@pytest.mark.parametrize(
    ("form", "error", "said"),
    [
        ({**RAW, "form": "fractal"}, ConfigError, "'fractal'"),
        ({**RAW, "dtype": "F7"}, ConfigError, "'F7'"),
        ({**RAW, "shape": [4]}, VerificationError, "4 bytes wanted"),
        ({**RAW, "size": 2}, VerificationError, "does not fit"),
        ({"dtype": "U8", "shape": [3]}, VerificationError, "size"),
        (
            {**RAW, "form": "shared", "levels": 1, "indices": {"coder": "zip", "size": 2}},
            ConfigError,
            "Unknown coder 'zip'",
        ),
        (
            {**RAW, "form": "shared", "levels": 2, "indices": {"coder": "huffman", "size": 1}},
            VerificationError,
            "huffman",
        ),
    ],
)
def test_descriptions_that_make_no_sense(
    form: dict[str, object], error: type[Exception], said: str, tmp_path: Path
) -> None:
    from autocompress.storage.container import FORMAT, _checksum

    text, payload = json.dumps({"w": form}), b"\x01\x02\x03"
    metadata = {"format": FORMAT, "version": "1", "sha256": _checksum(text, payload), "tensors": text}
    save_file({"payload": np.frombuffer(payload, np.uint8)}, tmp_path / "odd", metadata)
    with pytest.raises(error, match=said):
        read_container(tmp_path / "odd")


def test_what_is_no_container(tmp_path: Path) -> None:
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "weights.safetensors")
    (tmp_path / "text").write_text("nothing of the kind, but longer than eight bytes")
    for name, said in (
        ("weights.safetensors", "no packed file"),
        ("text", "no packed file"),
        ("none", "does not exist"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_container(tmp_path / name)
    with pytest.raises(ConfigError, match="folder"):
        read_container(tmp_path)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="complex64"):
        write_container({"w": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "packed")
    with pytest.raises(ConfigError, match="'lzma'"):
        write_container({}, tmp_path / "packed", ("lzma",))
    assert not (tmp_path / "packed").exists()
