"""What is said of engines without loading them is what they say themselves."""

from __future__ import annotations

import pytest

from autocompress.engines import ENGINES, engine_class, get_engine


@pytest.mark.parametrize("name", ENGINES)
def test_where_an_engine_runs(name: str) -> None:
    engine = get_engine(name)
    assert engine.name == name and engine.uses_gpu == engine_class(name).uses_gpu
    assert engine.runs_here()
