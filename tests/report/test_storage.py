"""The table of packed weights: every layer's bytes add up to the file's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from autocompress.report.storage import sizes_table
from autocompress.storage import pack


@pytest.mark.parametrize("folder", ["p", "[bold]p", "p" * 200], ids=["short", "markup", "long"])
def test_many_tensors_share_a_line_and_bytes_add_up(folder: str, tmp_path: Path) -> None:
    state = {f"layer{i}": torch.randn(50 + i, generator=torch.Generator().manual_seed(i)) for i in range(45)}
    packed = pack(state, tmp_path / folder / "packed")
    console = Console(width=120)
    with console.capture() as captured:
        console.print(sizes_table(packed))
    text = captured.get()
    assert "layer44" in text and "layer4 " not in text and "5 smaller ones" in text
    assert "1,040" in text  # of the five smallest: 4 bytes times 50 to 54
    assert "".join(str(packed.path).split()) in "".join(text.split())
    header = packed.size_bytes - sum(one.coded for one in packed.tensors)
    assert f"{header:,}" in text and f"{packed.size_bytes:,}" in text and f"{packed.ratio:.2f}x smaller" in text


def test_nothing_to_pack_is_a_file_too(tmp_path: Path) -> None:
    packed = pack({}, tmp_path / "packed")
    assert packed.tensors == () and packed.size_bytes > 0
