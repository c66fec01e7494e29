"""A reader of containers written from docs/storage.md, in plain Python: it shares no code with the package's."""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import struct
from bisect import bisect_right
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


def read_independently(path: Path) -> dict[str, Tensor]:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata, begin, end = header["__metadata__"], *header["payload"]["data_offsets"]
    payload = data[start + begin : start + end]
    assert metadata["format"] == "autocompress-storage" and metadata["version"] == "1"
    assert hashlib.sha256(metadata["tensors"].encode() + payload).hexdigest() == metadata["sha256"]
    found, at = {}, 0
    for name, form in json.loads(metadata["tensors"]).items():
        found[name] = tensor(form, payload[at : at + form["size"]])
        at += form["size"]
    return found


def tensor(form: dict[str, Any], data: bytes) -> Tensor:
    dtype, shape = DTYPES[form["dtype"]], form["shape"]
    size, count = torch.empty(0, dtype=dtype).element_size(), math.prod(shape)
    values: list[bytes]
    if form["form"] == "sparse":
        gaps = form["gaps"]
        symbols = stream(gaps, data[: gaps["size"]], gaps["symbols"], gaps["alphabet"])
        places, place = [], -1
        for symbol in symbols:
            place += symbol
            if symbol < gaps["alphabet"] - 1:
                place += 1
                places.append(place)
        values = [bytes(size)] * count
        for place, value in zip(places, plain(form["values"], data[gaps["size"] :], len(places), size), strict=True):
            turned = place % shape[0] * (count // shape[0]) + place // shape[0]
            values[turned if form["order"] == "columns" else place] = value
    elif form["form"] == "scaled":
        slices = math.ceil(count / form["slice"])
        scales = struct.unpack(f"<{slices}f", data[: 4 * slices])
        symbols = stream(form["indices"], data[4 * slices :], count, form["codes"])
        # In double precision the product of a single and a small integer is exact; packing rounds it once.
        products = [(symbol + form["low"]) * scales[i // form["slice"]] for i, symbol in enumerate(symbols)]
        values = [struct.pack("<f", product) for product in products]
    else:
        values = plain(form, data, count, size)
    flat = torch.tensor(list(b"".join(values)), dtype=torch.uint8)
    return flat.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def plain(form: dict[str, Any], data: bytes, count: int, size: int) -> list[bytes]:
    if form["form"] == "raw":
        return [data[i * size : (i + 1) * size] for i in range(count)]
    if form["form"] == "shared":
        levels = [data[i * size : (i + 1) * size] for i in range(form["levels"])]
        return [levels[i] for i in stream(form["indices"], data[len(levels) * size :], count, len(levels))]
    planes = []
    for one in form["bytes"]:
        planes.append(stream(one, data[: one["size"]], count, 256))
        data = data[one["size"] :]
    return [bytes(value) for value in zip(*planes, strict=True)]


def stream(one: dict[str, Any], data: bytes, count: int, alphabet: int) -> list[int]:
    assert len(data) == one["size"]
    if one["coder"] == "raw":
        width = max(1, (alphabet - 1).bit_length())
        number = int.from_bytes(data, "big") >> (len(data) * 8 - count * width)
        return [number >> (count - 1 - i) * width & (1 << width) - 1 for i in range(count)]
    wide = 2 if one["coder"] == "ans16" else 1
    table = [int.from_bytes(data[i * wide : (i + 1) * wide], "little") for i in range(alphabet)]
    rest = data[alphabet * wide :]
    return huffman(table, rest, count) if one["coder"] == "huffman" else ans(table, rest, count)


def huffman(table: list[int], data: bytes, count: int) -> list[int]:
    nodes = [(frequency, i) for i, frequency in enumerate(table)]
    heapq.heapify(nodes)
    children: dict[int, tuple[int, int]] = {}
    while len(nodes) > 1:
        (low, zero), (high, one) = heapq.heappop(nodes), heapq.heappop(nodes)
        children[len(table) + len(children)] = (zero, one)
        heapq.heappush(nodes, (low + high, len(table) + len(children) - 1))
    found, number, root = [], int.from_bytes(data, "little"), nodes[0][1]
    for _ in range(count):
        node = root
        while node in children:
            node, number = children[node][number & 1], number >> 1
        found.append(node)
    return found


def ans(table: list[int], data: bytes, count: int) -> list[int]:
    table = table if len(table) > 1 else [*table, 0]
    scale = (2**24 - len(table)) / float(sum(table)) if sum(table) else 0.0
    lefts = [int(sum(table[:i]) * scale) + i for i in range(len(table))] + [2**24]
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
    state, found = 0, []
    for _ in range(min(2, len(words))):
        state = state << 32 | words.pop()
    for _ in range(count):
        quantile = state & 2**24 - 1
        symbol = bisect_right(lefts, quantile) - 1
        found.append(symbol)
        state = (state >> 24) * (lefts[symbol + 1] - lefts[symbol]) + quantile - lefts[symbol]
        if state < 2**32 and words:
            state = state << 32 | words.pop()
    assert state == 0 and not words
    return found
