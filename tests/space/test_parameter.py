from __future__ import annotations

import pytest

from autocompress.space.parameter import Parameter


@pytest.mark.parametrize(
    ("text", "kind", "target"),
    [("prune/layer1.0.conv1", "prune", "layer1.0.conv1"), ("dtype/*", "dtype", "*"), ("rank/a/b", "rank", "a/b")],
)
def test_its_text_is_kind_and_target(text: str, kind: str, target: str) -> None:
    parameter = Parameter.of(text)
    assert (parameter.kind, parameter.target) == (kind, target) and str(parameter) == text
