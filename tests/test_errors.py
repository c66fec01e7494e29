"""The exception tree: one base, documented exit codes, hints that name the nearest word."""

from __future__ import annotations

import inspect
import re
import signal
from pathlib import Path

import pytest

from autocompress import errors
from autocompress._optional import optional

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]
DRAWN = re.findall(r"^[ │├└─]*(\w+Error)(?: +(\d))?", errors.__doc__ or "", re.MULTILINE)


def test_every_error_has_the_common_base() -> None:
    assert len(CLASSES) > 10
    assert all(issubclass(c, errors.AutoCompressError) for c in CLASSES)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert sorted(name for name, _ in DRAWN) == sorted(c.__name__ for c in CLASSES)


@pytest.mark.parametrize(("name", "code"), [(n, int(c)) for n, c in DRAWN if c])
def test_exit_codes_are_those_drawn(name: str, code: int) -> None:
    drawn = getattr(errors, name)
    assert drawn.exit_code == code
    assert all(c.exit_code == code for c in drawn.__subclasses__() if c.__name__ not in dict(d for d in DRAWN if d[1]))


def test_an_interrupt_has_the_shell_s_code() -> None:
    stopped = {errors.Stopped(number).exit_code for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    assert stopped == {130, 143, 129}
    assert not stopped & {c.exit_code for c in CLASSES}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openvno", " Did you mean 'openvino'? Available: onnxruntime, openvino."),
        ("zzz", " Available: onnxruntime, openvino."),
    ],
)
def test_nearest(name: str, expected: str) -> None:
    assert errors.nearest(name, ["openvino", "onnxruntime"]) == expected


def test_a_missing_package_names_its_extra() -> None:
    with pytest.raises(errors.MissingDependencyError, match=r"(?s)engine X needs.*no_such_runtime.*autocompress\[x\]"):
        optional("no_such_runtime.core", "x", "engine X")
    assert optional("json", "x", "engine X").loads("1") == 1


def test_the_page_of_exit_codes_is_complete() -> None:
    page = (Path(__file__).parents[1] / "docs" / "errors.md").read_text()
    rows = re.findall(r"^\| (\d*) ?\| (?:`(\w+)`)? ?\|", page, re.MULTILINE)
    assert {name for _, name in rows if name} == {c.__name__ for c in CLASSES}
    assert {(name, int(code)) for code, name in rows if code and name} >= {(n, int(c)) for n, c in DRAWN if c}
    assert {"129", "130", "143"} <= {code for code, _ in rows}
