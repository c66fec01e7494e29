"""What is said of engines without loading them is what they say themselves."""

from __future__ import annotations

import pytest

from autocompress.engines import ENGINES, get_engine, runs_on_gpu


@pytest.mark.parametrize("name", ENGINES)
def test_where_an_engine_runs(name: str) -> None:
    engine = get_engine(name)
    assert engine.name == name and engine.uses_gpu == runs_on_gpu(name)
    assert engine.runs_here()
