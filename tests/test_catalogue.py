"""Every method says what it is, and all of them are found."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import autocompress
from autocompress.catalogue import FAMILIES, Method, list_methods
from autocompress.compress import IMPORTANCES
from autocompress.engines import ENGINES
from autocompress.errors import ConfigError

PACKAGE = Path(autocompress.__path__[0])


def test_what_the_files_say_is_listed() -> None:
    said = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            said += isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Method"
    assert len(autocompress.list_methods()) == said > 25


def test_one_name_is_one_method_of_a_family() -> None:
    names = [(method.family, method.name) for method in list_methods()]
    assert len(names) == len(set(names))
    assert [family for family, _ in names] == sorted((f for f, _ in names), key=FAMILIES.index)


def test_importances_are_those_that_can_be_chosen() -> None:
    assert {method.name for method in list_methods("importance")} == set(IMPORTANCES)
    assert {method.family for method in list_methods("importance")} == {"importance"}


@pytest.mark.parametrize("method", list_methods(), ids=lambda method: method.name)
def test_a_line_each(method: Method) -> None:
    assert 10 < len(method.summary) <= 80 and not method.summary.endswith(".")
    assert len(method.source) > 5
    assert set(method.speeds_up) <= set(ENGINES)


def test_an_unknown_family() -> None:
    with pytest.raises(ConfigError, match=r"'prunning'\. Did you mean 'pruning'"):
        list_methods("prunning")
    with pytest.raises(ValueError, match="Unknown family 'x' of method 'y'"):
        Method("y", "x", "does nothing", "nobody")
