"""Codes times a scale per channel or group: found from the bits, kept small, read back to the bit by anyone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import autocompress
from autocompress.errors import ConfigError, VerificationError
from autocompress.storage.container import read_container, write_container
from autocompress.storage.quantizers import QUANTIZERS, quantizer
from autocompress.storage.scaled import GROUPS, find_scaled
from tests.storage.reader import read_independently


def rows(scales: list[float], codes: list[list[int]]) -> np.ndarray:
    return np.array(codes, np.float32) * np.array(scales, np.float32)[:, None]


def weight(shape: tuple[int, ...] = (24, 40, 3, 3), seed: int = 0) -> torch.Tensor:
    """Return weights whose channels differ in size as much as those of real networks."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=generator)
    return made * torch.logspace(-2, 0, shape[0]).reshape(-1, *[1] * (len(shape) - 1))


def test_scales_are_found_from_bits() -> None:
    # The second row has no code of 1: its scale is a third of its least magnitude. The third is zero.
    values = rows([0.1, 0.7, 1.0], [[1, -3, 0, 2], [3, 6, -7, 0], [0, 0, 0, 0]])
    found = find_scaled(values.view(np.uint32).reshape(-1), 4)
    assert found is not None and found.slice == 4
    assert found.codes.reshape(3, 4).tolist() == [[1, -3, 0, 2], [3, 6, -7, 0], [0, 0, 0, 0]]
    assert found.scales.tolist() == pytest.approx([0.1, 0.7, 1.0])
    assert (found.patterns() == values.view(np.uint32).reshape(-1)).all()


@pytest.mark.parametrize(
    "values",
    [[0.1, 0.25, 3.14159, 2.71828], [1.0, -0.0, 2.0, 3.0], [1.0, float("nan"), 2.0, 1.0], [1.0, 300.0, 7.0, 1.0]],
)
def test_what_is_nothing_of_the_kind(values: list[float]) -> None:
    assert find_scaled(np.array(values, np.float32).view(np.uint32), 4) is None


@pytest.mark.parametrize("granularity", ["channel", 16, 64])
@pytest.mark.parametrize("scheme", [name for name, kind in QUANTIZERS.items() if kind.SCALED])
def test_every_quantizer_with_a_scale_of_its_own(scheme: str, granularity: str | int, tmp_path: Path) -> None:
    bits = QUANTIZERS[scheme].BITS
    width = 4 if 4 in bits else bits[0]
    before = weight()
    packed = autocompress.pack(
        {"w": before}, tmp_path / "packed", weight_bits=width, scheme=scheme, granularity=granularity
    )
    # Where few levels come of it, as of powers of two, one table of all of them is smaller.
    assert packed.tensors[0].form in (["scaled"] if scheme in ("uniform", "asymmetric") else ["scaled", "shared"])
    back = autocompress.unpack(tmp_path / "packed")["w"]
    assert torch.equal(read_independently(tmp_path / "packed")["w"], back)
    # Each slice is what the quantizer makes of it alone.
    length = before[0].numel() if granularity == "channel" else int(granularity)
    for given, found in zip(before.flatten().split(length), back.flatten().split(length), strict=True):
        assert torch.equal(quantizer(scheme).fit(given, width).values(), found)


def test_channels_of_different_size_lose_less_by_scales_of_their_own(tmp_path: Path) -> None:
    before, errors, sizes = weight((64, 576)), {}, {}
    for granularity in ("tensor", "channel", 64):
        path = tmp_path / str(granularity)
        packed = autocompress.pack({"w": before}, path, weight_bits=4, scheme="uniform", granularity=granularity)
        off = autocompress.unpack(path)["w"] - before
        errors[granularity] = float(((off**2).mean(1) / (before**2).mean(1)).mean())
        sizes[granularity] = packed.size_bytes
    assert errors[64] < errors["channel"] < 0.2 * errors["tensor"]
    # Four bits a weight, and four bytes for each scale.
    assert sizes["channel"] < 64 * 576 / 2 + 64 * 4 + 700 and sizes[64] < 64 * 576 / 2 + 576 * 4 + 700


def test_asymmetric_wastes_no_codes_on_one_sided_weights() -> None:
    # 2 bits from 0 to 3: codes 0 to 3; symmetric ones are -3, 0 and 3.
    values = torch.tensor([0.2, 1.1, 1.9, 3.0])
    assert quantizer("asymmetric").fit(values, 2).values().tolist() == pytest.approx([0.0, 1.0, 2.0, 3.0])
    assert quantizer("uniform").fit(values, 2).values().tolist() == pytest.approx([0.0, 0.0, 3.0, 3.0])
    # From -1 to 2 in three steps of 1, zero among them.
    found = quantizer("asymmetric").fit(torch.tensor([-1.0, 2.0, 0.4, 0.6]), 2).values()
    assert found.tolist() == pytest.approx([-1.0, 2.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scheme": "codebook", "weight_bits": 4, "granularity": "channel"}, "table of levels.*asymmetric"),
        ({"scheme": "uniform", "weight_bits": 4, "granularity": "row"}, "granularity 'row'.*'channel'.*16, 32"),
        ({"scheme": "uniform", "weight_bits": 4, "granularity": 48}, "granularity 48"),
    ],
)
def test_what_has_no_scale_of_its_own(options: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        autocompress.pack({"w": weight()}, tmp_path / "packed", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "packed").exists() and 48 not in GROUPS


def test_a_damaged_description_is_refused(tmp_path: Path) -> None:
    values = torch.from_numpy(rows([0.1 * n + 0.013 for n in range(1, 90)], [[1, 2, -3, 5]] * 89))
    assert write_container({"w": values}, tmp_path / "packed")[0].form == "scaled"
    data = (tmp_path / "packed").read_bytes()
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    form = json.loads(metadata["tensors"])["w"]
    from autocompress.storage.streams import decode

    payload = data[8 + size :]
    assert (decode(form, payload, (89, 4), 4).view(np.float32) == values.numpy().reshape(-1)).all()
    for change in ({"slice": 0}, {"slice": 5}, {"low": None}):
        with pytest.raises(VerificationError):
            decode({**form, **change}, payload, (89, 4), 4)
    assert torch.equal(read_container(tmp_path / "packed")["w"], values)
