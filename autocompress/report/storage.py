"""The table of what packed weights take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from autocompress.storage import Packed

# Layers shown by themselves; the smaller ones share a line.
_SHOWN = 40


def sizes_table(packed: Packed) -> Table:
    """Return bytes per tensor at every stage, and of the whole file."""
    # The figure first, and as Text: a long path is folded behind it, and brackets in a path are no markup.
    title = Text(f"{packed.ratio:.2f}x smaller: {packed.path}", overflow="fold")
    table = Table(title=title, title_justify="left")
    table.add_column("tensor", overflow="fold")
    table.add_column("kept as")
    for column in ("original", "pruned", "shared", "coded", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    order = sorted(packed.tensors, key=lambda one: -one.original)
    shown = {one.name for one in order[:_SHOWN]}
    for one in packed.tensors:
        if one.name in shown:
            sizes = (one.original, one.pruned, one.shared, one.coded)
            table.add_row(Text(one.name), one.form, *_cells(sizes))
    if rest := order[_SHOWN:]:
        sums = tuple(sum(getattr(one, stage) for one in rest) for stage in ("original", "pruned", "shared", "coded"))
        table.add_row(f"{len(rest)} smaller ones", "", *_cells(sums))
    described = packed.size_bytes - sum(one.coded for one in packed.tensors)
    table.add_row("header", "", "", "", "", f"{described:,}", "", end_section=True)
    table.add_row("file", "", f"{packed.original_bytes:,}", "", "", f"{packed.size_bytes:,}", f"{packed.ratio:.2f}x")
    return table


def _cells(sizes: tuple[int, ...]) -> list[str]:
    ratio = f"{sizes[0] / sizes[-1]:.1f}x" if sizes[-1] else ""
    return [*(f"{size:,}" for size in sizes), ratio]
