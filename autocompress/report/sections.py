"""The parts of the HTML page, each a function from a `RunView` to a fragment; an empty string when it has nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from autocompress import quantities
from autocompress.policy import LayerPolicy
from autocompress.report.certainty import certainty, of_measurement
from autocompress.report.run_view import Point, RunView

_COLOURS = {
    "profile": "#7950f2", "proxy": "#8b95a7", "apply": "#ced4da", "export": "#74c0fc",
    "verify": "#63e6be", "build": "#12a594",
    "measure": "#3b5bdb", "recovery": "#f08c00", "overhead": "#c2255c",
}  # fmt: skip
_MEANINGS = {
    "profile": "profile (what each choice saves and costs)",
    "proxy": "scoring of candidates",
    "build": "engine builds",
    "measure": "latency measurements",
    "recovery": "recovery (fine-tuning)",
}
_MINUS = "\N{MINUS SIGN}"


def text(value: Any) -> str:
    """Escape a value for HTML."""
    return escape(str(value))


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that puts ``layer2`` before ``layer10``."""
    return tuple((1, 0, part) if not part.isdigit() else (0, int(part), "") for part in re.split(r"(\d+)", name))


def header(view: RunView) -> str:
    """Title, conditions of every figure, and how the run ended."""
    summary = view.summary
    title = " · ".join(text(v) for v in (summary.get("model"), summary.get("task")) if v) or text(view.path.name)
    kind, status = _status(view)
    return (
        f"<header><div><p class=eyebrow>autocompress report</p><h1>{title}</h1><p class=soft>{_conditions(view)}</p>"
        f'</div><span class="status {kind}">{status}</span></header>'
    )


def _status(view: RunView) -> tuple[str, str]:
    best = view.summary_best
    if not view.finished:
        return "warn", "interrupted: figures so far"
    if not best:
        return "bad", "no result"
    if not best.get("feasible"):
        if best.get("stage") == "baseline":
            return "bad", "nothing to offer: uncompressed model"
        return "bad", "limits not met: closest shown"
    if not all(check.met for check in view.checks()):
        return "warn", "limits met in the search, not by the final figures"
    return ("good", "limits met, verified") if best.get("verified") else ("warn", "limits met, not yet verified")


def _conditions(view: RunView) -> str:
    summary, config = view.summary, view.config
    engine = summary.get("engine") or (config.engine if config else None)
    threads = summary.get("threads") or (config.threads if config else None)
    batch = summary.get("batch_size") or (config.batch_size if config else None)
    parts = [
        f"{text(engine)} on {text(summary['device'])}" if engine and summary.get("device") else text(engine or ""),
        f"{threads} thread{'s' if threads != 1 else ''}" if threads else "",
        f"batch {batch}" if batch else "",
        f"baseline {text(_baseline_dtype(view))}" if _baseline_dtype(view) else "",
        f"{len(view.points)} candidates measured",
    ]
    return " · ".join(part for part in parts if part)


def _baseline_dtype(view: RunView) -> str | None:
    listed = (view.summary.get("baseline") or {}).get("dtype")
    return listed or (view.baseline.record.policy.dense_dtype if view.baseline else None)


def numbers(view: RunView) -> str:
    """The headline figures: latency, accuracy, size and MACs of the result against the baseline."""
    if view.best is None:
        return ""
    cards = (_latency(view, view.best), _accuracy(view, view.best), _size(view, view.best), _macs(view, view.best))
    return f'<div class="numbers">{"".join(cards)}</div>'


def _number(label: str, value: str, unit: str, change: str, said: str) -> str:
    return (
        f'<div class="number"><p class=eyebrow>{label}</p><b>{value}<small>{unit}</small></b>'
        f"<p class=from>{change}</p><p class=soft>{said}</p></div>"
    )


def _times(ratio: float, less: str, more: str) -> tuple[str, str]:
    """Return a share of the baseline as "2.1×" and its word."""
    return (f"{1 / ratio:.2f}×", less) if ratio <= 1 else (f"{ratio:.2f}×", more)


def _latency(view: RunView, best: Point) -> str:
    measured, given = best.measurement, view.summary_best
    ratio = float(given.get("latency_ratio") or measured.ratio)
    now = float(given.get("latency_ms") or measured.latency_ms)
    value, word = _times(ratio, "faster", "slower")
    said = f"{measured.source}, {ratio:.3f}× of the baseline"
    sure = certainty(given) if given else of_measurement(measured)
    said += f" (95% {sure})" if sure else ""
    said += ", noisy" if measured.noisy else ""
    before = (view.summary.get("baseline") or {}).get("latency_ms") or measured.baseline_ms
    return _number("Latency", value, word, f"{quantities.format_ms(float(before))} → {quantities.format_ms(now)}", said)


def _accuracy(view: RunView, best: Point) -> str:
    given, base, metric = view.summary_best, view.summary.get("baseline") or {}, view.metric
    name = text(metric.name)
    label = name[:1].upper() + name[1:]
    if given.get("accuracy") is not None and base.get("accuracy") is not None:
        before, after, said = float(base["accuracy"]), float(given["accuracy"]), f"test {name}, read once"
    elif view.baseline is not None:
        before, after = view.baseline.accuracy, best.accuracy
        said = f"validation {name}; test data {'could not be read' if view.summary.get('lost') else 'not read yet'}"
    else:
        return _number(label, metric.value(best.accuracy), "", "baseline unknown", f"validation {name}")
    value, _, unit = metric.change(before - after).partition(" ")
    return _number(label, value, unit, f"{metric.value(before)} → {metric.value(after)}", said)


def _size(view: RunView, best: Point) -> str:
    after = best.record.size_bytes
    before = (view.summary.get("baseline") or {}).get("size_bytes")
    if before is None and view.baseline is not None:
        before = view.baseline.record.size_bytes
    if not after or not before:
        return ""
    value, word = _times(after / before, "smaller", "larger")
    return _number(
        "Size", value, word, f"{quantities.format_bytes(before)} → {quantities.format_bytes(after)}", "engine on disk"
    )


def _macs(view: RunView, best: Point) -> str:
    ratio = view.macs_ratio(best)
    if ratio is None or view.baseline is None:
        return ""
    value, word = _times(ratio, "fewer", "more") if ratio else ("all", "gone")
    before, after = (f"{(p.record.macs or 0) / 1e6:.3g} M" for p in (view.baseline, best))
    return _number("MACs", value, word, f"{before} → {after}", "counted per sample, not measured")


def limits(view: RunView) -> str:
    """Asked against reached, one row a limit."""
    if view.best is None:
        said = "No candidate met every limit." if view.finished else "No result yet."
        return f"<section><h2>Result</h2><p class=soft>{said}</p></section>"
    rows = "".join(
        f"<tr><td>{text(c.what)}<td class=r data-name='at most'>{c.asked}<td class=r data-name=reached>{c.reached}"
        f"<td class='r {'good' if c.met else 'bad'}'>{'✓ met' if c.met else '✗ not met'}</tr>"
        for c in view.checks()
    )
    said = text(view.offered_instead)
    if view.best.record.stage == "baseline":
        said = f"The result is the uncompressed model, which is what you had: no candidate is worth more. {said}"
    if not rows and not said:
        return ""
    head = "<tr><th>limit<th class=r>at most<th class=r>reached<th></tr>"
    table = f'<div class=scroll><table class="limits cards">{head}{rows}</table></div>' if rows else ""
    return f"<section><h2>Limits</h2>{table}{f'<p class=instead>{said}</p>' if said else ''}</section>"


def front_table(view: RunView) -> str:
    """The Pareto front, fastest first, under the baseline."""
    if not view.front:
        return ""
    head = (
        f"<tr><th>trial<th>stage<th class=r>validation<br>{text(view.metric.name)}<th class=r>change<th class=r>latency"
        "<th class=r>ratio (95%)<th class=r>size<th class=r>MACs<th>what was done</tr>"
    )
    rows = [_row(view, view.baseline, "base")] if view.baseline else []
    rows += [_row(view, p, "best" if view.is_best(p) else "") for p in view.listed]
    return (
        "<section><h2>The Pareto front</h2><p class=note>No other candidate is faster and, as far as the validation "
        "data tell, as good: differences within the standard error are ties, which latency decides, then size. Ratio "
        "is the latency relative to the baseline, each alone in its process and in turns; behind it is where another "
        "measurement is expected, with 95 % confidence, also beside a busy processor.</p>"
        f'<div class="scroll"><table class=cards>{head}{"".join(rows)}</table></div></section>'
    )


def _row(view: RunView, point: Point, kind: str) -> str:
    record, measured = point.record, point.measurement
    base, drop, macs = kind == "base", view.drop(point), view.macs_ratio(point)
    mark = "<span class=star>★</span> " if kind == "best" else ""
    ends = f"{measured.ratio_low:.3f} to {measured.ratio_high:.3f}"
    interval = f"{measured.ratio:.3f} <span class=soft>{ends}</span>"
    cells = (
        f"<td>{mark}{'baseline' if base else record.number}",
        f"<td>{'' if base else text(record.stage)}",
        f"<td class=r data-name='{text(view.metric.name)}'>{view.metric.value(point.accuracy)}",
        f"<td class=r data-name=change>{'' if base or drop is None else view.metric.change(drop)}",
        f"<td class=r data-name=latency>{quantities.format_ms(view.latency_ms(point))}",
        f"<td class=r data-name=ratio><span>{'1' if base else interval}{' noisy' if measured.noisy else ''}</span>",
        f"<td class=r data-name=size>{'' if record.size_bytes is None else quantities.format_bytes(record.size_bytes)}",
        f"<td class=r data-name=MACs>{'' if macs is None else f'{macs:.2f}×'}",
        f"<td class=whole>{text('uncompressed, ' + record.policy.dense_dtype if base else record.policy.describe())}",
    )
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


_REASONS = 16
# Of the *Why* table: key of a reason, heading, and how the value is written.
_WHY = (
    ("parameter", "parameter", ""), ("choice", "choice", ""), ("saved_ms", "saves", "ms"),
    ("saved_macs", "MACs", "%"), ("saved_bytes", "size", "%"), ("loss", "moves", "number"),
    ("next_choice", "milder", ""), ("next_ms", "slower by", "ms"), ("next_loss", "moves", "number"),
)  # fmt: skip
_TELLING = {"saved_ms", "saved_macs", "saved_bytes", "loss"}


def low_rank(layer: LayerPolicy) -> str:
    """Return the share of the rank that a layer keeps, with its factorization where that is not the usual one."""
    if layer.rank_ratio == 1:
        return ""
    usual = layer.factorization == LayerPolicy.factorization
    return f"{layer.rank_ratio:.0%}" + ("" if usual else f" {layer.factorization}")


def policy_map(view: RunView) -> str:
    """What was done to every part of the model: channels removed, rank kept, dtype, removed blocks."""
    if view.best is None:
        return ""
    policy = view.best.record.policy
    # What any candidate ever touched was on offer, so what the result left alone is shown too.
    layers = {*policy.layers, *(n for p in view.points for n in p.record.policy.layers)}
    groups = {*policy.pruning, *(n for p in view.points for n in p.record.policy.pruning)}
    gone = "".join(
        f"<span class='pill gone'>{text(b)} removed</span>" for b in sorted(policy.removed_blocks, key=natural)
    )
    rows = []
    for name in sorted(layers | groups, key=natural):
        ratio, layer = policy.pruning.get(name, 0.0), policy.layer(name)
        # A layer can be both pruned and factorized; its two bars then share the track.
        done = [("", ratio, f"{_MINUS}{ratio:.0%}")] if ratio else []
        done += [("rank", layer.rank_ratio, f"r {low_rank(layer)}")] if layer.rank_ratio < 1 else []
        bar = "".join(f'<i class="{kind}" style="width:{share:.1%}"></i>' for kind, share, _ in done)
        figure = ", ".join([*(said for _, _, said in done), *(["2:4"] if layer.sparsity == "2:4" else [])])
        dtype = "int8" if layer.dtype == "int8" else policy.dense_dtype
        # A name that is only a channel group runs in no dtype of its own.
        pill = "<span></span>" if name not in layers else f'<span class="pill {dtype}">{dtype}</span>'
        faint = "" if ratio or not layer.is_identity else " untouched"
        rows.append(
            f'<div class="layer{faint}"><code title="{text(name)}">{text(name)}</code><div class="bar">{bar}</div>'
            f"<span class=r>{figure}</span>{pill}</div>"
        )
    rank = " The second colour shows the share of the rank kept (r)." if any('"rank"' in r for r in rows) else ""
    alone = " Faint rows were on offer and left alone." if any(" untouched" in r for r in rows) else ""
    body = f'<div class="layers">{"".join(rows)}</div>' if rows else "<p>Every layer was left as it was.</p>"
    return (
        f"<section><h2>What was done, layer by layer</h2><p class=note>{text(policy.describe())}. Bars show the share "
        f"of channels removed (−).{rank} Layers without Q/DQ run in {policy.dense_dtype}.{alone}</p>"
        f"{f'<p>{gone}</p>' if gone else ''}{body}</section>"
    )


def reasons(view: RunView) -> str:
    """What each choice saves and loses, and what the next milder one would have given."""
    found = view.summary.get("explanation") or []
    # A column that nothing is known for is left out: milliseconds without a predictor, losses without a sensitivity.
    columns = [column for column in _WHY if any(r.get(column[0]) is not None for r in found)]
    if not any(column[0] in _TELLING for column in columns):
        return ""
    head = "".join(f"<th{' class=r' if kind else ''}>{title}" for _, title, kind in columns)
    rows = "".join(f"<tr>{''.join(_cell(r, *column) for column in columns)}</tr>" for r in found[:_REASONS])
    said = "What speaks for each choice. "
    if any(r.get("saved_ms") is not None for r in found):
        said += "Milliseconds are PREDICTED, by taking the choice back alone. "
    if any(r.get("saved_macs") is not None for r in found):
        said += "MACs and size are shares of the uncompressed network that the choice saves, counted. "
    if any(r.get("loss") is not None for r in found):
        said += "Moves: how far the choice alone moves the outputs, without labels. "
    said += "Beside it the next milder choice."
    more = f" The {_REASONS} that save most, of {len(found)}." if len(found) > _REASONS else ""
    return (
        f"<section><h2>Why</h2><p class=note>{said}{more}</p><div class=scroll><table class=cards><tr>{head}</tr>"
        f"{rows}</table></div></section>"
    )


def _cell(reason: Mapping[str, Any], key: str, title: str, kind: str) -> str:
    """Return a cell of the *Why* table: kinds are ``ms``, ``%``, ``number``, and empty for text."""
    value = reason.get(key)
    if value is None:
        said = ""
    elif kind == "%":
        said = f"{value:.1%}" if abs(value) >= 0.0005 else "0%"
    elif kind:
        said = f"{value:.2g}{' ms' if kind == 'ms' else ''}"
    else:
        said = text(f"{value:.3g}" if isinstance(value, int | float) else value)
    style = " class=r" if kind else " class=whole" if key == "parameter" else ""
    return f"<td{style}{'' if key == 'parameter' else f' data-name={title!r}'}>{said}"


def time_spent(view: RunView) -> str:
    """Where the seconds went, as one stacked bar."""
    spent = view.seconds()
    total = max(spent.pop("total", 0.0), sum(spent.values()))
    spent["other"] = total - sum(spent.values())
    parts = [(name, value) for name, value in spent.items() if value > 0.002 * total and value > 0]
    if not parts:
        return ""
    bars = "".join(f'<i style="flex:{v:.4f};background:{_COLOURS.get(n, "#adb5bd")}"></i>' for n, v in parts)
    keys = "".join(
        f'<span><i style="background:{_COLOURS.get(n, "#adb5bd")}"></i>{text(_MEANINGS.get(n, n))} '
        f"<b>{quantities.format_duration(v)}</b> <span class=soft>{v / total:.0%}</span></span>"
        for n, v in parts
    )
    said = "wall time of the run" if view.finished else "sum over the finished trials"
    return (
        f"<section><h2>Where the time went: {quantities.format_duration(total)}</h2><p class=soft>{said}</p>"
        f'<div class="stack">{bars}</div><div class="keys">{keys}</div></section>'
    )


def settings(view: RunView) -> str:
    """The settings and the environment that every figure on the page belongs to."""
    summary, config = view.summary, view.config
    pairs: list[tuple[str, Any]] = [(k, summary.get(k)) for k in ("task", "model", "engine", "device")]
    pairs += [("threads", summary.get("threads")), ("batch size", summary.get("batch_size"))]
    pairs += [("baseline dtype", _baseline_dtype(view)), ("trials", summary.get("n_trials") or len(view.points))]
    pairs += [("failed trials", summary.get("n_failed", len(view.failed)))]
    pairs += [("trials not built for what was seen of them", len(view.rejected) or None)]
    if config is not None:
        recovery = config.recovery
        tuned = f"{recovery.whole_epochs:g} epochs, {recovery.candidates} candidates" if recovery.enabled else "off"
        pairs += [("sampler", config.sampler), ("search space", config.space), ("seed", config.seed)]
        pairs += [("recovery", tuned), ("target latency", config.target_latency), ("maximum drop", config.max_drop)]
        pairs += [("maximum size", config.max_size), ("timeout", config.timeout)]
    pairs += list(_flat(view.environment))
    pairs += [("run directory", view.path)]
    body = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in pairs if v is not None and v != "")
    return f"<section><h2>Settings and environment</h2><dl>{body}</dl></section>"


def _flat(data: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the leaves of ``env.json`` under readable names."""
    for key, value in data.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            # The versions of packages need no heading; "cpu model" does.
            yield from _flat(value, "" if key in ("packages", "versions") else f"{key} ")
        elif isinstance(value, list):
            yield name, ", ".join(str(v["name"] if isinstance(v, dict) and "name" in v else v) for v in value)
        elif key.endswith("_bytes") and isinstance(value, int):
            yield name.removesuffix(" bytes"), quantities.format_bytes(value)
        elif isinstance(value, str | int | float):
            yield name, value


def failures(view: RunView) -> str:
    """What is missing from the result and why, and which candidates failed, folded away."""
    lost = "".join(f"<li class=warn>{text(said)}</li>" for said in view.summary.get("lost") or ())
    lost = f"<section><h2>What is missing</h2><ul>{lost}</ul></section>" if lost else ""
    if not view.failed:
        return lost
    rows = "".join(
        f"<tr><td>{r.number}<td>{text(r.policy.describe())}<td><code>{text(r.error or 'not recorded')}</code></tr>"
        for r in view.failed
    )
    count = f"{len(view.failed)} candidate{'s' if len(view.failed) != 1 else ''} failed"
    return (
        f"{lost}<section><details><summary>{count}</summary><div class=scroll><table><tr><th>trial<th>what was done"
        f"<th>why</tr>{rows}</table></div></details></section>"
    )
