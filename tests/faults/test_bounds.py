"""What a file says of itself is bounded by the bytes it has: nothing is allocated before that is known."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from autocompress.deploy.artifacts import input_ports
from autocompress.errors import AutoCompressError, ConfigError, VerificationError
from autocompress.storage import pack, read_container, unpack
from autocompress.storage.container import FORMAT, _checksum, _safetensors
from autocompress.tasks import images
from autocompress.tasks.images import Preprocess, read_images

EMPTY = {"coder": "raw", "size": 0}
SPARSE = {
    "dtype": "F32", "size": 0, "form": "sparse", "order": "rows", "values": {"form": "raw"},
    "gaps": {"alphabet": 8, "symbols": 0, **EMPTY},
}  # fmt: skip
SHARED = {"dtype": "F32", "size": 4, "form": "shared", "levels": 1, "indices": {"coder": "ans", "size": 0}}


def crafted(folder: Path, form: dict[str, Any], payload: bytes = b"", copies: int = 1) -> Path:
    """Write a container with a right checksum."""
    text = json.dumps({f"w{index}": form for index in range(copies)})
    data = payload * copies
    metadata = {"format": FORMAT, "version": "1", "sha256": _checksum(text, data), "tensors": text}
    path = folder / "crafted"
    path.write_bytes(_safetensors(metadata, data))
    return path


@pytest.mark.parametrize(
    "shape",
    [[2**40], [2**62, 4], [2**63 - 1], [2**32, 2**32], [2**32, 2**32, 2**32], [-1], [-1, -4], [0.5], "8", None, [None]],
)
@pytest.mark.parametrize("form", [SPARSE, SHARED])
def test_a_small_file_asks_for_no_large_memory(tmp_path: Path, shape: Any, form: dict[str, Any]) -> None:
    path = crafted(tmp_path, {**form, "shape": shape}, b"1234" * (form is SHARED))
    tracemalloc.start()
    try:
        with pytest.raises(VerificationError, match="crafted"):
            unpack(path)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def test_many_small_tensors_are_bounded_together(tmp_path: Path) -> None:
    path = crafted(tmp_path, {**SPARSE, "shape": [1000, 1000]}, copies=1000)
    with pytest.raises(VerificationError, match="which they cannot"):
        unpack(path)


@pytest.mark.parametrize(
    "change",
    [
        {"gaps": {"alphabet": 2**40, "symbols": 0, **EMPTY}}, {"gaps": {"alphabet": 8, "symbols": 2**50, **EMPTY}},
        {"gaps": {"alphabet": 0, "symbols": 0, **EMPTY}}, {"form": "scaled", "slice": 2**50, "low": 0, "codes": 2**50},
        {"form": "scaled", "slice": 0, "low": 0, "codes": 2, "indices": EMPTY},
        {"form": "scaled", "slice": -1, "low": 0, "codes": 2, "indices": EMPTY},
        {"form": "shared", "levels": 2**50, "indices": EMPTY}, {"form": "shared", "levels": -1, "indices": EMPTY},
        {"form": "planes", "bytes": []}, {"form": "planes", "bytes": [EMPTY] * 9}, {"size": -1}, {"size": 2**60},
    ],
)  # fmt: skip
def test_every_number_of_a_description_is_bounded(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(AutoCompressError, match="crafted"):
        unpack(crafted(tmp_path, {**SPARSE, "shape": [16], **change}))


@pytest.mark.parametrize("coder", ["raw", "huffman", "ans", "ans16"])
@pytest.mark.parametrize("byte", [0, 1, 255])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 6, 40])
def test_streams_of_nonsense_end_nothing(tmp_path: Path, coder: str, byte: int, size: int) -> None:
    form = {"dtype": "U8", "shape": [64], "size": 3 + size, "form": "shared", "levels": 3}
    path = crafted(tmp_path, {**form, "indices": {"coder": coder, "size": size}}, b"\1\2\3" + bytes([byte]) * size)
    try:
        unpack(path)
    except AutoCompressError as error:
        assert "crafted" in str(error)


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_what_is_the_same_throughout_comes_back(tmp_path: Path, value: float) -> None:
    state = {"w": torch.full((3000, 3000), value), "b": torch.zeros(10)}
    packed = pack(state, tmp_path / "packed")
    assert packed.ratio > 30
    assert all(torch.equal(state[name], found) for name, found in read_container(tmp_path / "packed").items())


def test_inputs_that_no_memory_holds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.xml").write_text(
        '<net><layers><layer name="x" type="Parameter"><data shape="1,9999999,99999999" element_type="f32"/></layer>'
        "</layers></net>"
    )
    with pytest.raises(ConfigError, match="does not fit into memory"):
        input_ports(tmp_path / "m.xml", 1)


# -- archives -------------------------------------------------------------------------------------------------------


def archive(path: Path, *extra: tarfile.TarInfo, mode: str = "w:gz", zeros: bool = False) -> Path:
    with tarfile.open(path, mode, format=tarfile.GNU_FORMAT) as file:  # type: ignore[call-overload]
        for split in ("train", "test"):
            for name in ("a", "b"):
                buffer = io.BytesIO()
                Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
                member = tarfile.TarInfo(f"{split}/{name}/0.png")
                member.size = buffer.tell()
                buffer.seek(0)
                file.addfile(member, buffer)
        for member in extra:
            file.addfile(member, _Zeros(member.size))
    return path


class _Zeros(io.RawIOBase):
    """So many zeros, without holding them."""

    def __init__(self, size: int) -> None:
        self._left = size

    def read(self, size: int = -1) -> bytes:
        size = self._left if size < 0 else min(size, self._left)
        self._left -= size
        return bytes(size)


def member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.type = size, kind
    return made


def test_a_whole_archive_is_read(tmp_path: Path) -> None:
    assert len(read_images(archive(tmp_path / "data.tar.gz"), Preprocess(8)).classes) == 2


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (member("train/a/big.png", 100 * 2**20), "has 104857600 bytes; at most 67108864 are read"),
        (member("notes.txt", 64 * 2**20), "unpack to more than"),
        (member("x", 30 * 2**20, tarfile.GNUTYPE_LONGNAME), "a header of 31457280 bytes"),
    ],
)
def test_an_archive_is_bounded_as_it_unpacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: tarfile.TarInfo, said: str
) -> None:
    if "unpack" in said:
        monkeypatch.setattr(images, "_FREE", 2**20)
    path = archive(tmp_path / "data.tar.gz", extra)
    assert path.stat().st_size < 2**20
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=said):
            read_images(path, Preprocess(8))
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("field", [b"99999999999\x00", b"\x80" + b"\x7f" * 11, b"\xff" * 12, b"-1\x00", b"abc\x00"])
def test_sizes_of_members_are_not_believed(tmp_path: Path, field: bytes) -> None:
    path = archive(tmp_path / "data.tar", mode="w")
    data = bytearray(path.read_bytes())
    data[124 : 124 + len(field)] = field
    header = bytes(data[:148]) + b" " * 8 + bytes(data[156:512])
    data[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"data\.tar"):
        read_images(path, Preprocess(8))
