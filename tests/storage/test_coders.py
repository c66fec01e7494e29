"""Entropy coders: what goes in comes out, in about as many bits as theory says, and the smallest is chosen."""

from __future__ import annotations

import numpy as np
import pytest

from autocompress.errors import VerificationError
from autocompress.storage.coders import CODERS, Symbols, encode_smallest


def skewed(count: int, alphabet: int) -> Symbols:
    drawn = np.random.default_rng(0).geometric(0.4, count) - 1
    return np.minimum(drawn, alphabet - 1).astype(np.int64)


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize(
    ("count", "alphabet"), [(0, 3), (1, 1), (7, 1), (1, 256), (5, 2), (1000, 2), (999, 5), (4000, 16), (3000, 256)]
)
def test_round_trip_and_promised_size(name: str, count: int, alphabet: int) -> None:
    symbols = skewed(count, alphabet)
    data = CODERS[name].encode(symbols, alphabet)
    assert len(data) == CODERS[name].size(symbols, alphabet)
    assert np.array_equal(CODERS[name].decode(data, count, alphabet), symbols)


def test_raw_by_hand() -> None:
    # Alphabet of 5: three bits each; 1, 4, 2 are 001 100 010 and seven bits of padding.
    assert CODERS["raw"].encode(np.array([1, 4, 2]), 5) == bytes([0b00110001, 0b00000000])


def test_huffman_by_hand() -> None:
    # Frequencies 4, 2, 1, 1 take 1, 2, 3 and 3 bits: 4 + 4 + 3 + 3 = 14 bits after a table of four bytes.
    symbols = np.array([0, 0, 0, 0, 1, 1, 2, 3])
    data = CODERS["huffman"].encode(symbols, 4)
    assert list(data[:4]) == [255, 128, 64, 64] and len(data) == 4 + 2


@pytest.mark.parametrize(("name", "overhead"), [("ans", 1.005), ("ans16", 1.001), ("huffman", 1.10)])
def test_near_the_entropy(name: str, overhead: float) -> None:
    symbols = skewed(50_000, 16)
    shares = np.bincount(symbols) / len(symbols)
    entropy = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum() * len(symbols) / 8
    table = 32 if name == "ans16" else 16
    assert entropy < len(CODERS[name].encode(symbols, 16)) - table < entropy * overhead + 8


def test_wide_frequencies_pay_where_symbols_are_rare() -> None:
    symbols = np.concatenate([np.zeros(200_000, np.int64), np.arange(1, 200)])
    assert encode_smallest(symbols, 256, tuple(CODERS))[0] == "ans16"


def test_the_smallest_is_chosen() -> None:
    flat = np.arange(64) % 4
    assert encode_smallest(flat, 4, tuple(CODERS))[0] == "raw"
    long = skewed(5000, 16)
    name, data = encode_smallest(long, 16, ("raw", "huffman", "ans"))
    assert name == "ans" and len(data) == min(len(CODERS[one].encode(long, 16)) for one in ("raw", "huffman", "ans"))


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize("cut", [40, 1000])
def test_too_few_bytes(name: str, cut: int) -> None:
    symbols = skewed(1000, 16)
    data = CODERS[name].encode(symbols, 16)
    with pytest.raises(VerificationError, match=name):
        CODERS[name].decode(data[:-cut], 1000, 16)
