"""Terminal tables (rich). Every function returns a renderable; printing is the command line's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from autocompress import quantities
from autocompress.engines.base import EngineFile
from autocompress.report.certainty import held, occasions, other_states
from autocompress.report.run_view import RunView
from autocompress.runs.records import PREDICTED, Measurement

if TYPE_CHECKING:
    from autocompress.deploy.remeasure import Remeasured
    from autocompress.exploration.sensitivity import Sensitivity
    from autocompress.prediction.profile import Profile


class Check(Protocol):
    """One step of `autocompress.measurement.doctor.examine`."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def state(self) -> str: ...  # noqa: D102
    @property
    def detail(self) -> str: ...  # noqa: D102
    @property
    def remedy(self) -> str: ...  # noqa: D102


# Terminal columns from which a column is worth its room; below, "what was done" would wrap past three lines.
_STAGE_WIDTH, _MACS_WIDTH = 96, 104
_BAR = 12
# From what loses least to what loses most.
_HEAT = ("white on green4", "black on chartreuse3", "black on gold1", "black on dark_orange", "white on red3")


def front_table(view: RunView, width: int = 80) -> Table:
    """Return the Pareto front, fastest first, under the baseline; the result is starred.

    `width` is the terminal's; narrow ones lose the stage column (a trailing ° marks proxies) and the MACs.
    """
    with_stage, with_macs = width >= _STAGE_WIDTH, width >= _MACS_WIDTH
    table = _table("Pareto front")
    table.add_column("trial", justify="right", no_wrap=True)
    if with_stage:
        table.add_column("stage", no_wrap=True)
    for name in (f"val. {view.metric.short}", "change", "latency", "ratio", "size", *(("MACs",) if with_macs else ())):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what was done", overflow="fold")
    metric = view.metric
    proxies = predicted = False
    for point in (*((view.baseline,) if view.baseline else ()), *view.listed):
        base, record, drop = point is view.baseline, point.record, view.drop(point)
        marked = not base and view.is_best(point)
        proxy = not base and record.stage == "proxy"
        proxies |= proxy
        guessed = point.measurement.source == PREDICTED
        predicted |= guessed and not base
        name = "base" if base else f"{'★ ' if marked else ''}{record.number}{'°' if proxy and not with_stage else ''}"
        cells = [name, *(("" if base else record.stage,) if with_stage else ())]
        cells += [metric.value(point.accuracy), "" if base or drop is None else metric.change(drop)]
        cells += [
            quantities.format_ms(view.latency_ms(point)),
            f"{'≈' if guessed else ''}{point.measurement.ratio:.2f}x",
        ]
        cells += ["" if record.size_bytes is None else quantities.format_bytes(record.size_bytes)]
        if with_macs:
            macs = view.macs_ratio(point)
            cells.append("" if macs is None else f"{macs:.2f}x")
        cells.append(f"{record.policy.dense_dtype}, uncompressed" if base else record.policy.describe())
        table.add_row(*(Text(cell) for cell in cells), style="bold yellow" if marked else "dim" if base else "")
    ratio = "≈: predicted from a latency table, NOT measured" if predicted else ""
    ratio = ratio or "ratio: measured latency over the baseline's, interleaved"
    notes = [f"val. {metric.short}: validation {metric.name}", ratio]
    if proxies and not with_stage:
        notes.append("°: proxy, not fine-tuned")
    table.caption = Text("; ".join(notes), style="dim")
    return table


def remeasured_table(found: Sequence[Remeasured]) -> Table:
    """Return what `autocompress measure` found: latency before and now, and what could not be measured."""
    table = _table("Measured here")
    table.add_column("trial", justify="right", no_wrap=True)
    for name in ("ratio before", "ratio", "latency"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for one in found:
        name = "base" if one.record.stage == "baseline" else str(one.record.number)
        known, now = one.before, one.record.measurement
        before = "" if known is None else f"{'≈' if known.source == PREDICTED else ''}{known.ratio:.2f}x"
        if one.error is not None or now is None:
            table.add_row(name, before, "", "", Text(str(one.error), style="red"))
            continue
        notes = [*(["built again from its ONNX file"] if one.rebuilt else []), *(["noisy"] if now.noisy else [])]
        if known is not None and known.source != PREDICTED and name != "base":
            notes.append(held(known, now))
        table.add_row(name, before, f"{now.ratio:.2f}x", quantities.format_ms(now.latency_ms), "; ".join(notes))
    if any(one.before is not None and one.before.source == PREDICTED for one in found):
        table.caption = Text("≈: had been predicted", style="dim")
    return table


def sensitivity_table(found: Sensitivity) -> Table:
    """Return what `autocompress sensitivity` prints: each parameter's choices, redder the more they lose."""
    table = _table(f"What single choices lose on {found.samples} samples: {found.unit}")
    table.add_column("parameter", no_wrap=True)
    table.add_column("choice and loss", overflow="fold")
    finite = [loss for row in found.losses.values() for loss in row.values() if loss > 0]
    least, most = math.log(min(finite)), math.log(max(finite))
    for name, row in found.losses.items():
        cells = Text()
        for choice, loss in list(row.items())[1:]:
            heat = (math.log(loss) - least) / max(most - least, 1e-9) if loss > 0 else 0.0
            shown = f"{choice:.3g}" if isinstance(choice, float) else str(choice)
            cells.append(f" {shown} ")
            cells.append(f" {loss:.2g} ", style=_HEAT[min(int(heat * len(_HEAT)), len(_HEAT) - 1)])
        table.add_row(Text(name), cells)
    table.caption = Text(f"{found.measured} of {found.choices} choices measured, in {found.seconds:.0f} s", style="dim")
    return table


def benchmark_table(
    files: Sequence[EngineFile], measurements: Sequence[Measurement], stated: Sequence[Measurement | None] = ()
) -> Table:
    """Return what was measured interleaved, one row a file; the first is what the ratios refer to.

    `stated` holds what each file's own record says of its ratio to the first, None where nothing.
    """
    throughput = any(found.mode == "throughput" for found in measurements)
    energy = any(found.energy_mj is not None for found in measurements)
    table = _table("Throughput, measured interleaved" if throughput else "Latency, measured interleaved")
    table.add_column("file", overflow="fold")
    table.add_column("dtype", no_wrap=True)
    for name in (*(["samples/s"] if throughput else []), "median", "p95", *(["energy"] if energy else []), "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("95% interval", justify="right")
    table.add_column("size", justify="right", no_wrap=True)
    for index, (file, found) in enumerate(zip(files, measurements, strict=True)):
        doubt = " ~" if found.noisy else ""
        cells = [str(file.path), file.options.dtype]
        if throughput:
            cells.append(f"{found.throughput_per_s:,.0f}" if found.throughput_per_s else "")
        cells += [quantities.format_ms(found.latency_ms), quantities.format_ms(found.p95_ms)]
        if energy:
            cells.append("" if found.energy_mj is None else f"{found.energy_mj:.3g} mJ")
        interval = f"{found.ratio_low:.3f} to {found.ratio_high:.3f}{doubt}"
        cells += ["1", doubt.strip()] if index == 0 else [f"{found.ratio:.3f}x", f"{found.verdict}\n{interval}"]
        table.add_row(*(Text(cell) for cell in (*cells, quantities.format_bytes(file.size_bytes))))
    notes = _benchmark_notes(files, measurements)
    notes += [
        f"{file.path}: {held(known, found)}"
        for file, found, known in zip(files, measurements, stated, strict=False)
        if known is not None
    ]
    table.caption = Text("\n".join(notes), style="dim")
    return table


def _benchmark_notes(files: Sequence[EngineFile], measurements: Sequence[Measurement]) -> list[str]:
    """Return the conditions in a line, what a sign means, and what disturbed, which concerns all files or one."""
    engines = ", ".join(sorted({file.engine for file in files}))
    notes = [engines] if engines else []
    if not measurements:
        return notes
    first = measurements[0]
    notes.append(f"{first.threads} thread{'' if first.threads == 1 else 's'}")
    if first.mode == "throughput":
        notes.append(f"{first.streams} stream{'' if first.streams == 1 else 's'}")
    notes += [f"batch {first.batch_size}", f"{min(m.n for m in measurements)} or more iterations each"]
    if first.occasions:
        notes.append(occasions(len(first.occasions), first.span_s))
    lines = [", ".join(notes)]
    lines += [
        f"{file.path.name}: {others}"
        for file, found in zip(files, measurements, strict=True)
        if (others := other_states(found.states))
    ]
    if first.mode == "throughput":
        lines.append("ratio: of the time per sample; median and p95: of one call among the others")
    if any(found.noisy for found in measurements):
        lines.append("~: too noisy to trust the last digits")
    shared = [reason for reason in first.noise if all(reason in found.noise for found in measurements)]
    lines += [f"noise: {reason}" for reason in shared]
    for file, found in zip(files, measurements, strict=True):
        lines += [f"noise, {file.path.name}: {reason}" for reason in found.noise if reason not in shared]
    return lines


def _table(title: str) -> Table:
    return Table(
        title=Text(title), title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )


def inventory_tables(inventory: Mapping[str, Any]) -> Sequence[Table]:
    """Return what `autocompress inspect` prints: layers, groups, blocks, and what is left alone with the reason.

    `inventory` is the plain form of `autocompress.model.inventory.Inventory`.
    """
    layers = _table(f"Layers: {inventory['macs']:,} MACs, {inventory['params']:,} parameters")
    for name, justify in (
        ("layer", "left"),
        ("kind", "left"),
        ("channels", "right"),
        ("MACs", "right"),
        ("params", "right"),
    ):
        layers.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for layer in inventory["layers"].values():
        kernel = "x".join(map(str, layer["kernel"]))
        cells = [
            layer["name"],
            f"{layer['kind']} {kernel}".strip(),
            f"{layer['in_channels']} → {layer['out_channels']}",
        ]
        layers.add_row(*(Text(c) for c in (*cells, f"{layer['macs']:,}", f"{layer['params']:,}")))
    groups = _table("Groups: channels that can only be pruned together, and attention heads")
    for name in ("group", "channels", "produced by", "used by"):
        groups.add_column(name, justify="right" if name == "channels" else "left", overflow="fold")
    for group in inventory["groups"].values():
        made, used = (", ".join(group[k][:3]) + (" …" if len(group[k]) > 3 else "") for k in ("producers", "consumers"))
        width = f"{group['channels']} heads" if group["heads"] else str(group["channels"])
        groups.add_row(Text(group["name"]), Text(width), Text(made), Text(used))
    tables = [layers, groups]
    if inventory["blocks"]:
        blocks = _table("Residual blocks that can be removed")
        blocks.add_column("block")
        blocks.add_column("layers", overflow="fold")
        for block in inventory["blocks"].values():
            blocks.add_row(Text(block["name"]), Text(", ".join(block["layers"])))
        tables.append(blocks)
    if inventory["skipped"]:
        skipped = _table("Left alone; its share of the time in PyTorch")
        skipped.add_column("what", overflow="fold")
        skipped.add_column("time", justify="right")
        skipped.add_column("why", overflow="fold")
        shares = inventory.get("time_shares", {})
        for name, reason in inventory["skipped"].items():
            share = shares.get(name.partition(" (")[0])
            skipped.add_row(Text(name), Text("" if share is None else f"{share:.0%}"), Text(reason))
        tables.append(skipped)
    return tables


def doctor_table(checks: Sequence[Check]) -> Table:
    """Return what `autocompress doctor` prints: every step, what was found, and how to mend it."""
    table = _table("What works here")
    table.add_column("step", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("to mend it", overflow="fold")
    styles = {"ok": "green", "failed": "bold red", "skipped": "dim", "note": "yellow"}
    for check in checks:
        state = Text(check.state, style=styles[check.state])
        table.add_row(Text(check.name), state, Text(check.detail), Text(check.remedy))
    return table


def devices_table(found: Mapping[str, Any]) -> Table:
    """Return what `autocompress devices` prints: engine, version, device, dtypes, or why an engine cannot run."""
    table = _table("Engines on this machine")
    for name in ("engine", "version", "device", "computes in"):
        table.add_column(name, overflow="fold")
    for name, engine in found["engines"].items():
        if "error" in engine:
            table.add_row(Text(name), "", "", Text(engine["error"]))
        else:
            dtypes = ", ".join(engine["capabilities"])
            table.add_row(Text(name), Text(engine["version"]), Text(engine["device"]), Text(dtypes))
    return table


def profile_summary(found: Profile) -> RenderableType:
    """Return what a profile arrived at: where the table is, how much is in it, and how far it is off."""
    data = found.to_dict()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    refused = f", {data['unsupported']} refused by the engine" if data["unsupported"] else ""
    grid.add_row("table", Text(data["table"], overflow="fold"))
    grid.add_row(
        "networks", f"{data['networks']}{refused}; {found.added} of them in {quantities.format_duration(found.seconds)}"
    )
    if data["baseline_ms"] is not None:
        grid.add_row("uncompressed", quantities.format_ms(data["baseline_ms"]))
    error = found.error
    if error is None:
        missing = "not known yet: too few networks; go on with the same command"
        return Panel(Group(grid, Text(missing, style="yellow")), title="latency table", expand=False)
    tau = "" if error.tau is None else f", Kendall tau {error.tau:.3f}"
    grid.add_row(
        "held-out error",
        f"{error.mape:.1%} on average, {error.within_10:.0%} within ±10 %{tau} (n = {error.n}, never learned from)",
    )
    return Panel(grid, title="latency table", border_style="green", expand=False)
