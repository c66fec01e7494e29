"""The page of one latency table: what was measured, how well it predicts, its staircases, and where it holds.

Owns the page; its figures are `table_figures`'. Self-contained like the report of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress import quantities
from autocompress._optional import optional
from autocompress.files import write_text
from autocompress.prediction.table import LatencyTable
from autocompress.prediction.table_rows import OPS, NetworkRow
from autocompress.report.sections import text
from autocompress.report.style import document
from autocompress.report.table_figures import (
    BAND,
    Predicted,
    panels,
    predicted_figure,
    staircase_figure,
    staircase_height,
)

if TYPE_CHECKING:
    from autocompress.prediction.predictor import PredictionError

# A held-out network as measured; its predicted ratio to the baseline, and the bounds of the 95 % interval.
Guess = tuple[NetworkRow, float, float, float]

# What the project asks of a table before it calls it good.
_GOOD_SHARE, _GOOD_MEAN = 0.95, 0.04
# Share of noisy networks above which the machine, not the table, wants attention.
_MANY_NOISY = 0.25
_OP_NAMES = {
    "conv": "Convolutions", "pointwise": "Pointwise convolutions", "depthwise": "Depthwise convolutions",
    "grouped": "Grouped convolutions", "linear": "Linear layers",
}  # fmt: skip
_FOOTER = (
    "How to read this page. Every network was built and measured whole, in rounds interleaved with the uncompressed "
    "network of its model, in a child process. Held-out networks were drawn at random and never used to fit, so the "
    "error here is the one to expect of networks not seen before, on this device and engine alone. Times of single "
    "layers are shares of a network's latency, by the engine's own profiler: good for shapes of curves, less so for "
    "single figures."
)
# Divides by the input channels, which `customdata` holds, and back.
_SCRIPT = """
(() => {
  const plots = [...document.querySelectorAll('.plotly-graph-div')];
  const dark = matchMedia('(prefers-color-scheme: dark)');
  const recolour = () => plots.forEach(plot => Plotly.relayout(plot, {
    'hoverlabel.bgcolor': dark.matches ? '#262a33' : '#ffffff',
    'hoverlabel.bordercolor': dark.matches ? '#4a5160' : '#c9cdd6',
    'hoverlabel.font.color': dark.matches ? '#eceef2' : '#16181d',
    'font.color': dark.matches ? '#a6adba' : '#5a6170'}));
  recolour();
  dark.addEventListener('change', recolour);
  for (const group of document.querySelectorAll('.switch')) {
    const plot = group.parentNode.querySelector('.plotly-graph-div');
    const times = plot.data.map(trace => Array.from(trace.y));
    for (const button of group.children) button.addEventListener('click', () => {
      const each = button.dataset.each === 'channel';
      const y = plot.data.map((trace, t) => times[t].map((ms, i) => each ? 1e3 * ms / trace.customdata[i] : ms));
      const layout = {};
      for (const name of Object.keys(plot.layout)) {
        if (!name.startsWith('yaxis')) continue;
        layout[name + '.autorange'] = true;
        if ((plot.layout[name].title || {}).text) layout[name + '.title.text'] = each ? 'µs' : 'ms';
      }
      Plotly.update(plot, {y}, layout);
      for (const other of group.children) other.setAttribute('aria-pressed', other === button);
    });
  }
})();
"""


def write_table_report(
    table: LatencyTable,
    path: Path,
    predictions: Sequence[Guess] | None = None,
    error: Mapping[str, PredictionError] | None = None,
) -> None:
    """Write the page of a table.

    Args:
        table: Any number of networks.
        path: Of the HTML file.
        predictions: Held-out networks with what a predictor that never saw them says of their ratios.
        error: By network; of those that are missing it is worked out from `predictions`.

    Raises:
        MissingDependencyError: plotly is not installed.
        ConfigError: The file cannot be written.
    """
    write_text(path, render(table, predictions, error))


def render(
    table: LatencyTable,
    predictions: Sequence[Guess] | None = None,
    error: Mapping[str, PredictionError] | None = None,
) -> str:
    """Return the page."""
    library = optional("plotly.offline", "report", "The report").get_plotlyjs()
    guesses = list(predictions or ())
    errors = {**_errors(guesses), **(error or {})}
    parts = (
        _header(table, errors), _numbers(table, errors), _foreign(table), _networks(table, errors),
        _predicted(table, guesses), *_staircases(table), _unsupported(table), _conditions(table),
        f"<footer>{_FOOTER}</footer>",
    )  # fmt: skip
    return document(f"latency table of {table.device_name}", "".join(parts), library=library, script=_SCRIPT)


def _errors(guesses: Sequence[Guess]) -> dict[str, PredictionError]:
    if not guesses:
        return {}
    # Loads torch, which whoever predicts has loaded.
    from autocompress.prediction.predictor import Prediction, PredictionError

    found = {}
    for network in dict.fromkeys(row.network for row, *_ in guesses):
        own = [guess for guess in guesses if guess[0].network == network]
        found[network] = PredictionError.of(
            [Prediction(*guess[1:]) for guess in own], [guess[0].ratio for guess in own]
        )
    return found


def _header(table: LatencyTable, errors: Mapping[str, PredictionError]) -> str:
    kind, status = "soft", "held-out error unknown"
    if table.foreign:
        kind, status = "warn", "measured elsewhere"
    elif errors:
        good = all(e.within_10 >= _GOOD_SHARE and e.mape <= _GOOD_MEAN for e in errors.values())
        kind, status = "good" if good else "warn", f"held-out error {_mean(errors):.1%}"
    names = ", ".join(text(name) for name in dict.fromkeys(table.names.values())) or "nothing measured yet"
    return (
        f"<header><div><p class=eyebrow>autocompress latency table</p><h1>{text(table.device_name)}</h1>"
        f"<p class=soft>{text(table.engine)} {text(table.engine_version)} · {_count(table.threads, 'thread')} · batch "
        f'{table.batch_size} · {names}</p></div><span class="status {kind}">{status}</span></header>'
    )


def _foreign(table: LatencyTable) -> str:
    if not table.foreign:
        return ""
    rows = "".join(f"<li>{text(difference)}</li>" for difference in table.differences)
    return (
        "<section><h2 class=warn>Measured elsewhere</h2><p class=note>Used with --allow-foreign-table. What differs "
        f"from this device; how wrong predictions are here is not known.</p><ul>{rows}</ul></section>"
    )


def _numbers(table: LatencyTable, errors: Mapping[str, PredictionError]) -> str:
    ok = [row for row in table.networks if row.ok]
    refused, held = len(table.networks) - len(ok), sum(row.held_out for row in ok)
    said = [f"{held} held out", f"{sum(row.noisy for row in ok)} noisy", f"{refused} unsupported"]
    cards = [_number("Networks measured", str(len(ok)), f"{len(table.layers)} layers timed", ", ".join(said))]
    if errors:
        seen = sum(e.n for e in errors.values())
        near = sum(e.within_10 * e.n for e in errors.values()) / seen
        taus = [e.tau for e in errors.values() if e.tau is not None]
        cards += [
            _number("Mean error", f"{_mean(errors):.1%}", f"of {_count(seen, 'held-out network')}", "mean of |error|"),
            _number(f"Within ±{BAND:.0%}", f"{near:.0%}", f"{round(near * seen)} of {seen}", "held-out networks"),
        ]
        if taus:
            more = "lowest of all models" if len(taus) > 1 else "held-out networks"
            cards.append(_number("Rank correlation", f"{min(taus):.3f}", "Kendall's tau", more))
    return f'<div class="numbers">{"".join(cards)}</div>'


def _number(label: str, value: str, change: str, said: str) -> str:
    return (
        f'<div class="number"><p class=eyebrow>{label}</p><b>{value}</b><p class=from>{change}</p>'
        f"<p class=soft>{said}</p></div>"
    )


def _networks(table: LatencyTable, errors: Mapping[str, PredictionError]) -> str:
    if not table.names:
        return "<section><h2>Models</h2><p class=soft>Nothing has been measured yet.</p></section>"
    head = (
        "<tr><th>model<th class=r>measured<th class=r>held<br>out<th class=r>noisy<th class=r>not<br>supported<th "
        "class=r>baseline<th class=r>ratios<th class=r>mean<br>error<th class=r>within<br>"
        f"±{BAND:.0%}<th class=r>tau<th class=r>in 95 %<br>interval</tr>"
    )
    rows = []
    for network, name in table.names.items():
        own = [row for row in table.networks if row.network == network]
        ok, base, error = [row for row in own if row.ok], table.baseline_ms(network), errors.get(network)
        ratios = f"{min(r.ratio for r in ok):.2f} to {max(r.ratio for r in ok):.2f}" if ok else ""
        known = [error.mape, error.within_10, error.tau, error.covered] if error else [None] * 4
        shown = ("{:.1%}", "{:.0%}", "{:.3f}", "{:.0%}")
        cells = (
            f"<td>{text(name)} <code class=soft>{text(network[:6])}</code>",
            len(ok), sum(row.held_out for row in ok), sum(row.noisy for row in ok), len(own) - len(ok),
            "" if base is None else quantities.format_ms(base), ratios,
            *("" if value is None else form.format(value) for form, value in zip(shown, known, strict=True)),
        )  # fmt: skip
        rows.append(f"<tr>{'<td class=r>'.join(map(str, cells))}</tr>")
    remarks = "" if errors else " No error is given, as no predictions were made for this page."
    noisy, measured = sum(row.noisy for row in table.networks), sum(row.ok for row in table.networks)
    if noisy > _MANY_NOISY * measured:
        remarks += (
            f" <span class=warn>{noisy} of {measured} networks are noisy: something else ran on the machine, and "
            "the error is partly that of the measurements.</span>"
        )
    return (
        "<section><h2>Models</h2><p class=note>Ratios are to the uncompressed model at the engine's best dense dtype. "
        "Errors are of held-out networks, relative to the measured latency; tau is Kendall's rank correlation."
        f'{remarks}</p><div class="scroll"><table>{head}{"".join(rows)}</table></div></section>'
    )


def _predicted(table: LatencyTable, guesses: Sequence[Guess]) -> str:
    points = []
    for row, *ratios in guesses:
        base = table.baseline_ms(row.network) or row.baseline_ms
        points.append(Predicted(row, *(ratio * base for ratio in (row.ratio, *ratios))))
    if not points:
        return ""
    far = sum(abs(p.error) > BAND for p in points)
    outside = f"{far} outside it, outlined" if far else "none outside it"
    return (
        f"<section><h2>Predicted against measured</h2><p class=note>{_count(len(points), 'held-out network')}, their "
        f"95 % intervals, and the band of ±{BAND:.0%}; {outside}. Latency is the ratio times the model's usual "
        f"baseline.</p>{_plot(predicted_figure(points), 'predicted', 520)}</section>"
    )


def _staircases(table: LatencyTable) -> list[str]:
    if not table.layers:
        return [
            "<section><h2>Latency against channels</h2><p class=soft>The table has no rows of single layers: this "
            "engine's profiler was not asked or tells nothing.</p></section>"
        ]
    sections = []
    usual = {network: ms for network in table.names if (ms := table.baseline_ms(network)) is not None}
    for op in OPS:
        found = panels((row for row in table.layers if row.op == op), usual)
        if not found:
            continue
        # What depthwise layers cost does not depend on input channels beside their own.
        switch = "" if op == "depthwise" else (
            '<div class="switch"><button data-each="layer" aria-pressed="true">Layer</button>'
            '<button data-each="channel" aria-pressed="false">Per input channel</button></div>'
        )  # fmt: skip
        count = sum(row.op == op for row in table.layers)
        sections.append(
            f"<section>{switch}<h2>{_OP_NAMES[op]}: latency against channels</h2><p class=note>{count} rows, those of "
            "equal shape and dtype as one point at their median. Lines join layers of the most frequent number of "
            f"input channels.</p>{_plot(staircase_figure(found), f'staircase-{op}', staircase_height(found))}</section>"
        )
    return sections


def _plot(figure: Any, name: str, height: int) -> str:
    drawn = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=name, config={"displayModeBar": False, "responsive": True}
    )
    style = f"height:{height}px;min-width:640px;margin:0"
    return f'<div class="scroll"><div class="plot" style="{style}">{drawn}</div></div>'


def _unsupported(table: LatencyTable) -> str:
    refused = [row for row in table.networks if not row.ok]
    if not refused:
        return ""
    rows = "".join(
        f"<tr><td>{text(row.name)}<td>{text(row.policy.describe())}<td><code>{text(row.error)}</code></tr>"
        for row in refused
    )
    return (
        f"<section><details><summary>{_count(len(refused), 'network')} that the engine refused</summary><div "
        f"class=scroll><table><tr><th>model<th>what was done<th>the runtime's words</tr>{rows}</table></div></details>"
        "</section>"
    )


def _conditions(table: LatencyTable) -> str:
    moments = [row.measured_at for row in table.networks] + [row.measured_at for row in table.layers]
    dates = sorted(moment[:10] for moment in moments if moment)
    device, gpu = table.device, table.device.get("gpu") or {}
    pairs = {
        "processor": device.get("cpu"), "logical processors": device.get("cores"),
        "instructions": ", ".join(device.get("features") or ()), "clock governor": device.get("governor"),
        "system": " ".join(str(device[key]) for key in ("system", "machine") if device.get(key)),
        "GPU": gpu.get("name"), "compute capability": gpu.get("compute_capability"), "driver": gpu.get("driver"),
        "device": device["slug"], "fingerprint": device["hash"],
        "engine": table.engine, "engine version": table.engine_version,
        "threads": table.threads, "batch size": table.batch_size,
        "measured": " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else None,
        "file": table.path,
    }  # fmt: skip
    body = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in pairs.items() if v not in (None, ""))
    return f"<section><h2>Where these figures hold</h2><dl>{body}</dl></section>"


def _mean(errors: Mapping[str, PredictionError]) -> float:
    return sum(e.mape * e.n for e in errors.values()) / sum(e.n for e in errors.values())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
