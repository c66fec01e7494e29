"""What happens to files: flipped bits, cut ends, other types, huge numbers, deep nesting, wrong encodings.

A mutation is plain data drawn by hypothesis, applied to a valid file. Must know nothing of what the files mean.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import json
import struct
from collections.abc import Callable
from typing import Any

import yaml
from hypothesis import strategies as st

Document = dict[str, Any] | list[Any]

# What stands in for a value of a document.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 2**31, 2**40, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.0, 1e-320, 1e308, -1e308,
    float("nan"), float("inf"), "", " ", "x", "0", "-1", "1e999", "nan", "null", "x" * 5000, "\x00", "\u2028", "\ud800",
    "é", "a\nb", "'", '"', '"; import os; os.abort() #', "{0}", "%s", "[bold]", "[/b]", "..", "../../x", "/etc/passwd",
    "a/b", "a\\b", ".hidden", "con:factory", "os:abort", [], {}, [[]], [None], {"": None}, [0] * 300, {"a": {"b": {}}},
    ["x", 1, None], [[[[[[]]]]]],
)  # fmt: skip
BYTES: tuple[bytes, ...] = (
    b"\xff", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"null\n", b"{}\n", b"[]\n", b"\x80\x04", b"PK\x03\x04",
    b"{" * 2000,
    b"[" * 2000, b'"', b",", b"\xed\xa0\x80", b"9" * 5000, b"1e999", b"NaN", b"-", b"&a [*a]", b"!!python/object:x {}",
    b"<!ENTITY a 'b'>", b"\x7fELF",
)  # fmt: skip

_AT = st.integers(0, 2**31)
RAW = st.one_of(
    st.tuples(st.just("flip"), _AT, st.integers(0, 7)),
    st.tuples(st.just("cut"), _AT, st.just(0)),
    st.tuples(st.just("drop"), _AT, st.integers(1, 64)),
    st.tuples(st.just("insert"), _AT, st.integers(0, len(BYTES) - 1)),
    st.tuples(st.just("write"), _AT, st.integers(0, 255)),
    st.tuples(st.just("number"), _AT, st.integers(0, 2**63)),
    st.tuples(st.just("repeat"), _AT, st.integers(1, 2000)),
    st.tuples(st.just("replace"), st.just(0), st.integers(0, len(BYTES) - 1)),
)
TYPED = st.one_of(
    st.tuples(st.just("set"), _AT, st.integers(0, len(VALUES) - 1)),
    st.tuples(st.just("remove"), _AT, st.just(0)),
    st.tuples(st.just("add"), _AT, st.integers(0, len(VALUES) - 1)),
    st.tuples(st.just("swap"), _AT, _AT),
    st.tuples(st.just("nest"), _AT, st.integers(1, 3000)),
)
Mutation = tuple[str, int, int]
# Half of all cases keep the form of the file, so that they get past its parser.
CASES = st.one_of(
    st.tuples(st.just("raw"), st.lists(RAW, min_size=1, max_size=3)),
    st.tuples(st.just("typed"), st.lists(TYPED, min_size=1, max_size=3)),
)


def mutated(content: bytes, form: str, case: tuple[str, list[Mutation]]) -> bytes:
    """Return a file after a case's mutations; of a form without types, typed ones are of its bytes."""
    kind, steps = case
    if kind == "typed" and form in _FORMS:
        read, write = _FORMS[form]
        document = read(content)
        for step in steps:
            document = _typed(document, *step)
        return write(document)
    for step in steps:
        content = _raw(content, *step)
    return content


def _raw(data: bytes, kind: str, at: int, value: int) -> bytes:  # noqa: PLR0911 - one a kind
    at = at % (len(data) + 1)
    if kind == "flip":
        return data[:at] + bytes(byte ^ 1 << value for byte in data[at : at + 1]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "drop":
        return data[:at] + data[at + value :]
    if kind == "insert":
        return data[:at] + BYTES[value % len(BYTES)] + data[at:]
    if kind == "write":
        return data[:at] + bytes([value % 256]) + data[at + 1 :]
    if kind == "number":
        return data[:at] + struct.pack("<Q", value) + data[at + 8 :]
    if kind == "repeat":
        return data[:at] + data[at : at + 8] * value + data[at:]
    return BYTES[value % len(BYTES)]


def _typed(document: Any, kind: str, at: int, value: int) -> Any:
    places = _places(document)
    if not places:
        # A copy here as well: later steps change what they get.
        return copy.deepcopy(VALUES[value % len(VALUES)])
    holder, key = places[at % len(places)]
    if kind == "set":
        holder[key] = copy.deepcopy(VALUES[value % len(VALUES)])
    elif kind == "remove":
        del holder[key]
    elif kind == "add":
        _add(holder, copy.deepcopy(VALUES[value % len(VALUES)]))
    elif kind == "swap":
        other, where = places[value % len(places)]
        # Not copied, which recurses; a loop would be no document.
        if not isinstance(holder[key], dict | list) and not isinstance(other[where], dict | list):
            holder[key], other[where] = other[where], holder[key]
    else:
        inner: Any = 0
        for _ in range(value % 3000):
            inner = [inner]
        holder[key] = inner
    return document


def _add(holder: Any, value: Any) -> None:
    if isinstance(holder, dict):
        holder["added"] = value
    else:
        holder.append(value)


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Return every holder with every key of it, however deep an earlier step has nested them."""
    found, level = [], [document]
    while level:
        inner = []
        for holder in level:
            keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
            found += [(holder, key) for key in keys]
            inner += [holder[key] for key in keys]
        level = inner
    return found


# -- forms ----------------------------------------------------------------------------------------------------------


def _dumps(document: Any) -> bytes:
    text = _nested(document) if _is_deep(document) else json.dumps(document)
    return text.encode(errors="surrogatepass")


def _is_deep(document: Any) -> bool:
    level, depth = [document] if isinstance(document, dict | list) else [], 0
    while level and depth < 500:
        inner = (value for one in level for value in (one.values() if isinstance(one, dict) else one))
        level = [value for value in inner if isinstance(value, dict | list)]
        depth += 1
    return depth >= 500


def _nested(document: Any) -> str:
    """Write what is too deep for the library's own writer."""
    parts, stack = [], [("value", document)]
    while stack:
        kind, value = stack.pop()
        if kind == "text":
            parts.append(value)
        elif isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else ((None, one) for one in value)
            todo: list[tuple[str, Any]] = [("text", "{" if isinstance(value, dict) else "[")]
            for number, (key, one) in enumerate(pairs):
                todo.append(("text", ("," if number else "") + (f"{json.dumps(key)}:" if key is not None else "")))
                todo.append(("value", one))
            todo.append(("text", "}" if isinstance(value, dict) else "]"))
            stack.extend(reversed(todo))
        else:
            parts.append(json.dumps(value))
    return "".join(parts)


def _read_lines(content: bytes) -> list[Any]:
    return [json.loads(line) for line in content.splitlines() if line.strip()]


def _write_lines(lines: Any) -> bytes:
    return b"\n".join(map(_dumps, lines)) + b"\n" if isinstance(lines, list) else _dumps(lines)


def _read_table(content: bytes) -> list[Any]:
    return [list(row) for row in csv.reader(io.StringIO(content.decode()))]


def _write_table(rows: Any) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in rows if isinstance(rows, list) else [rows]:
        cells = row if isinstance(row, list) else [row]
        writer.writerow([cell if isinstance(cell, str) else _dumps(cell).decode(errors="replace") for cell in cells])
    return buffer.getvalue().encode(errors="surrogatepass")


def _write_yaml(document: Any) -> bytes:
    if _is_deep(document):
        return _dumps(document)
    return yaml.safe_dump(document, allow_unicode=True).encode(errors="surrogatepass")


def _read_packed(content: bytes) -> Any:
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    return {"tensors": json.loads(header["__metadata__"]["tensors"]), "data": list(content[8 + length :])}


def _write_packed(document: Any) -> bytes:
    """Write a container whose checksum is right, whatever it says."""
    listed = document.get("data") if isinstance(document, dict) else None
    data = bytes(one % 256 if isinstance(one, int) else 0 for one in (listed if isinstance(listed, list) else []))
    text = _dumps(document.get("tensors") if isinstance(document, dict) else document).decode(errors="replace")
    digest = hashlib.sha256(text.encode() + data).hexdigest()
    metadata = {"format": "autocompress-storage", "version": "1", "sha256": digest, "tensors": text}
    payload = {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": metadata, "payload": payload}).encode()
    return struct.pack("<Q", len(header)) + header + data


_FORMS: dict[str, tuple[Callable[[bytes], Any], Callable[[Any], bytes]]] = {
    "json": (json.loads, _dumps),
    "jsonl": (_read_lines, _write_lines),
    "yaml": (yaml.safe_load, _write_yaml),
    "csv": (_read_table, _write_table),
    "packed": (_read_packed, _write_packed),
}
