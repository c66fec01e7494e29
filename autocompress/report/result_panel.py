"""The outcome of a run in a terminal: asked against reached, what there is instead, and what to type next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from autocompress import quantities
from autocompress.exploration.missed_limits import DROP, LATENCY, SIZE, missed_limits, say_alternatives
from autocompress.report.certainty import certainty
from autocompress.runs.metric import Metric
from autocompress.runs.records import PREDICTED


def result_panel(summary: Mapping[str, Any]) -> RenderableType:
    """Return the outcome of a run from its summary document: asked against reached, and what to type next."""
    best = summary.get("best") or {}
    trials = f"{summary.get('n_trials', 0)} trials ({summary.get('n_failed', 0)} failed)"
    total = (summary.get("seconds") or {}).get("total")
    counted = f"{trials} in {quantities.format_duration(total)}" if total is not None else trials
    overhead = (summary.get("seconds") or {}).get("overhead")
    if total and overhead is not None:
        counted += f", {overhead / total:.1%} of it overhead"
    if not best:
        body = Text(
            f"No candidate could be measured. {counted}.\nThe reasons are in {summary.get('run_dir')}/trials.jsonl"
        )
        return Panel(body, title="no result", border_style="red", expand=False)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    uncompressed, feasible = best.get("stage") == "baseline", bool(best.get("feasible"))
    for row in (*_figures(summary), ("baseline", Text(_conditions(summary)))):
        grid.add_row(*row)
    grid.add_row("trial", f"{'none' if uncompressed else best['trial']}, {best.get('stage')}; {counted}")
    for said in summary.get("lost") or ():
        grid.add_row("lost", Text(said, overflow="fold", style="yellow"))
    if said := _prediction(summary.get("prediction") or {}):
        grid.add_row("prediction", said)
    grid.add_row("engine file", Text(str(best.get("path")), overflow="fold"))
    grid.add_row("next", Text(_next(summary), overflow="fold"))
    if feasible and uncompressed:
        grid.add_row("result", "the uncompressed model: no candidate is worth more")
    if feasible:
        title = "result: limits met, verified" if best.get("verified") else "result: limits met"
        return Panel(grid, title=title, border_style="green", expand=False)
    said = "No candidate met every limit; this is the closest."
    if uncompressed:
        said = "No candidate is worth more than the uncompressed model, which is what you had."
    closest = Text(f"{said} {say_alternatives(summary)}".strip(), style="yellow")
    return Panel(Group(closest, grid), title="limits not met", border_style="yellow", expand=False)


def _figures(summary: Mapping[str, Any]) -> list[tuple[str, Text]]:
    """Return a row for latency, metric, size and MACs: before and after, and the limit where there is one."""
    best, base, limits = summary["best"], summary["baseline"], summary.get("constraints") or {}
    listed = summary.get("missed")
    missed = {entry["limit"] for entry in (missed_limits(best, limits) if listed is None else listed)}
    latency = Text(f"{quantities.format_ms(base['latency_ms'])} → {quantities.format_ms(best['latency_ms'])}")
    latency.append(f"  {best['latency_ratio']:.2f}x", style="bold")
    if best.get("latency_source") == PREDICTED:
        latency.append("  predicted, NOT measured", style="yellow")
    if limits.get("latency_ratio") is not None:
        _limit(latency, f"{limits['latency_ratio']:.3g}x", met=LATENCY not in missed)
    elif limits.get("latency_ms") is not None:
        _limit(latency, quantities.format_ms(limits["latency_ms"]), met=LATENCY not in missed)
    tested, metric = best["accuracy"] is not None, Metric(summary.get("metric") or "accuracy")
    key = "accuracy" if tested else "validation_accuracy"
    accuracy = Text(f"{metric.value(base[key])} → {metric.value(best[key])}")
    accuracy.append(f"  {metric.change(best['accuracy_drop_pp'] / 100)}", style="bold")
    if limits.get("max_drop") is not None:
        _limit(accuracy, f"{metric.loss(limits['max_drop'])} lost", met=DROP not in missed)
    size = Text(f"{quantities.format_bytes(base['size_bytes'])} → {quantities.format_bytes(best['size_bytes'])}")
    size.append(f"  {best['size_bytes'] / base['size_bytes']:.2f}x", style="bold")
    if limits.get("size_bytes") is not None:
        _limit(size, quantities.format_bytes(limits["size_bytes"]), met=SIZE not in missed)
    rows = [("latency", latency)]
    if sure := certainty(best):
        rows.append(("expected", Text(f"{sure} (95 %)")))
    rows += [(f"{metric.name}, {'test' if tested else 'validation'}", accuracy), ("size", size)]
    if best.get("macs_ratio") is not None:
        rows.append(("MACs", Text(f"{best['macs_ratio']:.2f}x")))
    return rows


def _next(summary: Mapping[str, Any]) -> str:
    """Return the command that comes next."""
    best, run = summary["best"], summary.get("run_dir")
    if best.get("latency_source") == PREDICTED:
        return f"autocompress measure {run}, on the device itself"
    force = "" if best.get("feasible") else " --force"
    checked = "" if best.get("verified") else " (the deployed file is verified again in a fresh process)"
    return f"autocompress deploy {run} --to DIR{force}{checked}"


def _prediction(found: Mapping[str, Any]) -> str:
    """Say what prediction and first looks saved and how far it was off; nothing where nothing was predicted."""
    if found.get("mape") is None:
        return ""
    saved = (found.get("screened_out") or 0) + (found.get("rejected") or 0)
    builds = f"{saved} engine build{'' if saved == 1 else 's'} saved; " if saved else ""
    return f"{builds}off by {found['mape']:.1%} on average"


def _limit(line: Text, limit: str, *, met: bool) -> None:
    line.append(f"  {'✓' if met else '✗'} at most {limit}", style="green" if met else "red")


def _conditions(summary: Mapping[str, Any]) -> str:
    threads = summary.get("threads")
    return (
        f"{(summary.get('baseline') or {}).get('dtype')}, uncompressed; {summary.get('engine')} on "
        f"{summary.get('device')}, {threads} thread{'' if threads == 1 else 's'}, batch {summary.get('batch_size')}"
    )
