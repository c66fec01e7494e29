"""Terminal tables of methods and of what one of them did to a model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autocompress.catalogue import Method
from autocompress.quantities import format_bytes, format_ms

if TYPE_CHECKING:
    from autocompress.recipes.distill import DistillationResult
    from autocompress.recipes.prune import PruningResult
    from autocompress.recipes.quantize import QuantizationResult

# Terminal columns from which the sources have room of their own.
_SOURCE_WIDTH = 110


def methods_table(methods: Sequence[Method], width: int = 80) -> RenderableType:
    """Return what `autocompress methods` prints: a table for each family.

    `width` is the terminal's; in narrow ones the source stands below what the method does.
    """
    wide = width >= _SOURCE_WIDTH
    tables: list[RenderableType] = []
    for family, members in groupby(methods, key=lambda method: method.family):
        listed = list(members)
        fast = any(method.speeds_up for method in listed)
        table = _table(family)
        table.add_column("method", no_wrap=True, min_width=max(len(m.name) for m in listed))
        table.add_column("what it does", ratio=3)
        if wide:
            table.add_column("source", ratio=3, style="dim")
        if fast:
            table.add_column("speeds up", ratio=1)
        for method in listed:
            does = Text(method.summary) if wide else Text.assemble(method.summary, "\n", (method.source, "dim"))
            cells = [Text(method.name, style="bold"), does, *((Text(method.source),) if wide else ())]
            table.add_row(*cells, *((Text(", ".join(method.speeds_up)),) if fast else ()))
        tables.append(table)
    if any(method.speeds_up for method in methods):
        note = "speeds up: engines that it can make faster; what pays on a device is measured there. "
        tables.append(Text(note + "TensorRT: as its documentation says, not timed.", style="dim"))
    return Group(*tables)


def pruned_tables(result: PruningResult) -> RenderableType:
    """Return what `autocompress prune` prints: the steps, and what every group lost."""
    steps = _table("Steps")
    for name in ("step", "channels", "MACs", "pruned", "fine-tuned"):
        steps.add_column(name, justify="right")
    steps.add_row("", "1.00x", "1.00x", f"{result.baseline:.2%}", "", style="dim")
    for number, step in enumerate(result.steps, 1):
        tuned = "" if step.finetuned is None else f"{step.finetuned:.2%}"
        steps.add_row(str(number), f"{step.channels:.2f}x", f"{step.macs:.2f}x", f"{step.pruned:.2%}", tuned)
    groups = _table("Groups")
    groups.add_column("group", overflow="fold")
    groups.add_column("channels", justify="right", no_wrap=True)
    groups.add_column("note", overflow="fold")
    for name, (before, after) in result.groups.items():
        cells = (name, f"{before} → {after}", result.notes.get(name, ""))
        groups.add_row(*map(Text, cells), style="dim" if before == after else "")
    test = f"Test data: {result.baseline_test:.2%} uncompressed, {result.test:.2%} pruned. Other figures: validation."
    return Group(steps, groups, *map(Text, result.distilled), Text(test))


def distilled_table(result: DistillationResult) -> RenderableType:
    """Return what `autocompress distill` prints: teacher and student side by side."""
    table = _table(f"Distillation, {result.engine}")
    table.add_column("")
    for name in ("validation", "test", "latency", "ratio", "dtype", "MACs", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in (("teacher", result.teacher), ("student", result.student)):
        measured = one.measurement
        noisy = " (noisy)" if measured.noisy else ""
        table.add_row(
            name, f"{one.validation:.2%}", f"{one.test:.2%}", format_ms(measured.latency_ms),
            f"{measured.ratio:.2f}x{noisy}", one.dtype, f"{one.macs / result.teacher.macs:.2f}x",
            format_bytes(one.size_bytes),
        )  # fmt: skip
    told = f"Learned from the teacher's {result.distilled} in {result.epochs:g} epochs."
    return Group(table, Text(told))


def quantized_tables(result: QuantizationResult) -> RenderableType:
    """Return what `autocompress quantize` prints: the rungs that were tried, and what stayed as it is."""
    rungs = _table(f"Int8, calibrated by {result.quantization.calibration}")
    rungs.add_column("rung", no_wrap=True)
    for name in ("metric", "drop", "time"):
        rungs.add_column(name, justify="right")
    rungs.add_row("uncompressed", f"{result.baseline:.2%}", "", "", style="dim")
    for rung in result.rungs:
        name = rung.name.replace("_", " ")
        cells = (name, f"{rung.metric:.2%}", f"{result.baseline - rung.metric:.2%}", f"{rung.seconds:.1f} s")
        rungs.add_row(*cells, style="bold" if rung is result.rung else "")
    shown: list[RenderableType] = [rungs]
    if result.skipped:
        left = _table("Not int8")
        left.add_column("layer", overflow="fold")
        left.add_column("reason", overflow="fold")
        for name, reason in result.skipped.items():
            left.add_row(Text(name), Text(reason))
        shown.append(left)
    test = f"Test data: {result.baseline_test:.2%} uncompressed, {result.test:.2%} int8. Other figures: validation."
    return Group(*shown, Text(f"{len(result.policy.int8_layers)} layers are int8. {test}"))


def _table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
