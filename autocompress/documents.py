"""What is read back from disk: parsed, validated against a schema, and refused in our own words.

Whatever a file holds, its reader gives a validated value or raises an `AutoCompressError` that names file, key, value
and mend. Three pieces: `parse_json` and `parse_yaml` give plain data without NaN, infinity, numbers past 64 bits or
nesting that later code would choke on; `validated` makes a typed value of them; `reading` maps what a library raises
over damaged bytes. Must import nothing of the package but `errors`: everything that reads stands on it.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tokenize import TokenError
from typing import Annotated, Any, Generic, TypeVar, cast

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from autocompress.errors import AutoCompressError, ConfigError

T = TypeVar("T")

# Documents of ours take kilobytes; what is larger than this is no document, and parsing it would take all memory.
MAX_BYTES = 64 * 2**20
MAX_DEPTH = 64
_MAX_INTEGER = 2**63
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What parsers and arithmetic raise over bytes that nobody checked. `xml` raises a SyntaxError, numpy over the header of
# an array a TokenError.
RAW: tuple[type[Exception], ...] = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError, RecursionError, EOFError, SyntaxError,
    MemoryError, OSError, TokenError,
)  # fmt: skip


def plain_name(name: str) -> str:
    """Return a file name that another file gave, once it is known to be nothing but a name.

    Raises:
        ValueError: It has separators, quotes, blanks or control characters, begins with a dot, or is too long.
    """
    if not _NAME.fullmatch(name):
        raise ValueError("only plain file names are allowed: letters, digits, '_', '-', '+' and '.'")
    return name


def relative_folder(path: str) -> str:
    """Return a folder that another file gave relative to itself, once it is known to lie inside.

    Raises:
        ValueError: A part of it is no plain name, as ``..`` is none.
    """
    for part in path.split("/"):
        plain_name(part)
    return path


def _sha256(text: str) -> str:
    if not _SHA256.fullmatch(text):
        raise ValueError("a SHA-256 is 64 hex digits")
    return text


PlainName = Annotated[str, AfterValidator(plain_name)]
RelativeFolder = Annotated[str, AfterValidator(relative_folder)]
Sha256 = Annotated[str, AfterValidator(_sha256)]
Count = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]


@contextmanager
def reading(
    source: object,
    mend: str = "",
    error: type[AutoCompressError] = ConfigError,
    also: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Have whatever is raised over a damaged file become an error of ours that names the file.

    Args:
        source: The file, as messages name it; a text that ends with a colon says itself what is wrong.
        mend: A sentence: what to do.
        error: What to raise.
        also: A library's own errors, besides those of Python. Errors of ours pass as they are.

    Raises:
        AutoCompressError: As `error`.
    """
    try:
        yield
    except AutoCompressError:
        raise
    except FileNotFoundError as raised:
        raise error(_joined(f"{source} does not exist.", mend)) from raised
    except OSError as raised:
        raise error(_joined(f"{_refused(source)} {raised.strerror or raised}.", mend)) from raised
    except ValidationError as raised:
        raise error(_joined(f"{_refused(source)} {explained(raised)}.", mend)) from raised
    except (*RAW, *also) as raised:
        raise error(_joined(f"{_refused(source)} {_words(raised)}.", mend)) from raised


def shown(value: object) -> str:
    """Return a value for a message, short whatever it holds."""
    return _REPR.repr(value)


def explained(error: ValidationError) -> str:
    """Return what a schema has against a document: key, value, reason; the first few."""
    items = error.errors(include_url=False, include_context=False)
    lines = []
    for item in items[:_LISTED]:
        key = ".".join(shown(p).strip("'") if isinstance(p, str) else str(p) for p in item["loc"]) or "the document"
        given = "" if item["type"] == "missing" else f" is {shown(item['input'])}"
        lines.append(f"{key}{given}: {item['msg'].removeprefix('Value error, ')}")
    more = len(items) - len(lines)
    return "; ".join(lines) + (f"; and {more} more" if more else "")


def validated(kind: type[T], data: object, source: object, mend: str = "") -> T:
    """Return plain data as a `kind` (a dataclass, a TypedDict, any type that pydantic knows).

    Raises:
        ConfigError: They are something else; names `source`, the key, its value and what it may be.
    """
    with reading(source, mend):
        return cast(T, _adapter(cast(Any, kind)).validate_python(data))


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def parse_json(text: str | bytes, source: object, mend: str = "") -> Any:
    """Return the plain data of a JSON text; numbers are finite and below 2**63, nesting is at most `MAX_DEPTH`.

    Raises:
        ConfigError: It is not that; names `source`.
    """
    with reading(source, mend):
        data = json.loads(
            text if isinstance(text, str) else text.decode(),
            parse_constant=_no_constant, parse_float=_finite, parse_int=_bounded,
        )  # fmt: skip
        _check_depth(data)
        return data


def parse_yaml(text: str | bytes, source: object, mend: str = "") -> Any:
    """Return the plain data of a YAML text, read without running any of it; nesting is at most `MAX_DEPTH`.

    Raises:
        ConfigError: It is not that; names `source`.
    """
    import yaml

    with reading(source, mend, also=(yaml.YAMLError,)):
        data = yaml.safe_load(text if isinstance(text, str) else text.decode())
        _check_depth(data)
        return data


def read_bytes(path: Path, mend: str = "", most: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        ConfigError: It is missing, no regular file, or has more than `most` bytes.
    """
    with reading(path, mend):
        if path.exists() and not path.is_file() and not path.is_dir():
            # Reading a pipe or a device may never end.
            raise ConfigError(_joined(f"{path} cannot be read: it is no regular file.", mend))
        if (size := path.stat().st_size) > most:
            raise ConfigError(_joined(f"{path} has {size} bytes; at most {most} are read.", mend))
        return path.read_bytes()


@dataclass(frozen=True)
class Lines(Generic[T]):
    """A file of one document a line.

    Attributes:
        values: What could be read, in order.
        damaged: What is wrong with each of the other lines, and which line it is.
    """

    values: tuple[T, ...]
    damaged: tuple[str, ...]


def read_lines(path: Path, read: Callable[[Any, str], T], most: int = 2**31) -> Lines[T]:
    """Read a file of one JSON document a line; damaged lines are set aside, and named.

    Args:
        path: The file; one that is missing has no lines.
        read: Gets a line's data, and how a message names the line.
        most: Bytes that are read at most.

    Raises:
        ConfigError: The file itself cannot be read.
    """
    if not path.exists():
        return Lines((), ())
    values, damaged = [], []
    # Bytes, since one that is not UTF-8 damages its own line alone.
    for number, line in enumerate(read_bytes(path, most=most).split(b"\n"), 1):
        if not line.strip():
            continue
        source = f"{path}, line {number}"
        try:
            values.append(read(parse_json(line, source), source))
        except AutoCompressError as error:
            damaged.append(str(error))
    return Lines(tuple(values), tuple(damaged))


_LISTED = 4
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxlevel = 3


def _joined(said: str, mend: str) -> str:
    return f"{said} {mend}".strip()


def _refused(source: object) -> str:
    text = str(source)
    return text if text.endswith(":") else f"{text} cannot be read:"


def _words(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"it lacks {shown(error.args[0]) if error.args else 'a key'}"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    text = " ".join(str(error).split())[:400].rstrip(".")
    return text or type(error).__name__


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number that a file may hold")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no number that a file may hold")
    return value


def _bounded(text: str) -> int:
    # Digits first: Python takes long over thousands of them.
    if len(text) > 20 or not -_MAX_INTEGER <= int(text) < _MAX_INTEGER:
        raise ValueError(f"{text[:40]} is larger than any number of 64 bits")
    return int(text)


def _check_depth(data: Any) -> None:
    """Go down level by level; containers that YAML names twice are gone through once."""
    level, seen = [data], set[int]()
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict | list) and id(value) not in seen:
                seen.add(id(value))
                below.extend(value.values() if isinstance(value, dict) else value)
        if not below:
            return
        level = [value for value in below if isinstance(value, dict | list)]
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
