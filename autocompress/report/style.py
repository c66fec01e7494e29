"""The frame of every page: its style sheet, and the script that recolours the report's plot for a dark page."""

from __future__ import annotations

from html import escape

CSS = """
:root { color-scheme: light dark; --page: #f6f6f3; --card: #ffffff; --ink: #16181d; --soft: #646b78; --line: #e6e6e1;
  --accent: #3b5bdb; --good: #2b8a3e; --warn: #b35c00; --bad: #c92a2a; --track: #eceef2; --star: #f08c00; }
@media (prefers-color-scheme: dark) { :root { --page: #101216; --card: #181b21; --ink: #eceef2; --soft: #98a0ae;
  --line: #2a2e37; --accent: #91a7ff; --good: #69db7c; --warn: #ffc078; --bad: #ff8787; --track: #262a33; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto,
  "Helvetica Neue", sans-serif; font-variant-numeric: tabular-nums; -webkit-font-smoothing: antialiased; }
main { max-width: 1080px; margin: 0 auto; padding: 44px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.02em; margin: 6px 0 8px; font-weight: 680; }
h2 { font-size: 17px; letter-spacing: -.01em; margin: 0 0 2px; font-weight: 640; }
p { margin: 0; } code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.eyebrow { font-size: 12px; letter-spacing: .09em; text-transform: uppercase; color: var(--soft); font-weight: 600; }
.soft, .note { color: var(--soft); } .note { font-size: 13.5px; margin-bottom: 14px; max-width: 86ch; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
header { display: flex; gap: 24px; justify-content: space-between; align-items: flex-start; margin-bottom: 26px; }
.status { flex: none; font-size: 13px; font-weight: 600; padding: 5px 13px; border-radius: 99px; white-space: nowrap;
  border: 1px solid currentColor; margin-top: 4px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 22px 24px; margin-top:
  18px; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(225px, 1fr)); gap: 14px; }
.number { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 18px 20px 16px; }
.number b { display: block; font-size: 38px; line-height: 1.15; letter-spacing: -.035em; font-weight: 690; margin: 3px
  0 5px; }
.number b small { font-size: 18px; letter-spacing: -.01em; font-weight: 600; color: var(--soft); margin-left: 5px; }
.number .from { font-weight: 600; } .number .soft { font-size: 13px; line-height: 1.4; }
.scroll { overflow-x: auto; margin: 0 -24px; padding: 0 24px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; font-size: 12.5px; color: var(--soft); padding: 6px 12px 8px 0; white-space:
  nowrap;
  border-bottom: 1px solid var(--line); vertical-align: bottom; }
td { padding: 8px 12px 8px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.limits { max-width: 640px; } tr:last-child td { border-bottom: 0; } .r { text-align: right; white-space: nowrap; }
tr.best td { font-weight: 640; background: color-mix(in srgb, var(--star) 9%, transparent); } tr.base td { color:
  var(--soft); }
td:first-child, th:first-child { padding-left: 10px; white-space: nowrap; } .star { color: var(--star); }
.pill { display: inline-block; font-size: 12px; font-weight: 600; line-height: 1.5; padding: 0 8px; border-radius: 99px;
  background: var(--track); color: var(--soft); }
.pill.int8 { background: color-mix(in srgb, var(--accent) 16%, transparent); color: var(--accent); }
.pill.gone { background: color-mix(in srgb, var(--bad) 13%, transparent); color: var(--bad); margin: 0 4px 4px 0; }
.layers { columns: 2 420px; column-gap: 36px; } .layer { display: grid; break-inside: avoid; align-items: center;
  grid-template-columns: minmax(96px, 1.25fr) 1fr 84px 58px; gap: 10px; padding: 3.5px 0; font-size: 13px; }
.layer code { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; } .layer .pill { justify-self: end; }
.bar { display: flex; flex-direction: column; height: 9px;
  border-radius: 5px; background: var(--track); overflow: hidden; position: relative; }
.bar i { flex: 1; background: var(--accent); border-radius: 5px; } .bar i.rank { background:
  #12a594; }
.untouched { opacity: .5; }
.stack { display: flex; height: 26px; border-radius: 8px; overflow: hidden; gap: 2px; margin: 12px 0 12px; }
.keys { display: flex; flex-wrap: wrap; gap: 6px 22px; font-size: 13.5px; } .keys i { display: inline-block; width:
  11px;
  height: 11px; border-radius: 3px; margin-right: 7px; vertical-align: -1px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(225px, 1fr)); gap: 14px 24px; margin: 12px 0 0; }
dt { font-size: 12.5px; color: var(--soft); } dd { margin: 0; font-weight: 560; overflow-wrap: anywhere; }
.plot { height: 480px; margin: 0 -8px -6px; }
.switch { float: right; display: inline-flex; border: 1px solid var(--line); border-radius: 9px; overflow: hidden; }
.switch button { border: 0; background: none; font: inherit; font-size: 13px; padding: 4px 12px; color: var(--soft);
  cursor: pointer; } .switch button[aria-pressed=true] { background: var(--track); color: var(--ink); font-weight:
  600; }
details summary { cursor: pointer; font-weight: 640; font-size: 17px; } details[open] summary { margin-bottom: 10px; }
footer { color: var(--soft); font-size: 13px; margin-top: 26px; max-width: 92ch; }
.instead { margin-top: 12px; max-width: 86ch; }
@media (max-width: 720px) { header { flex-direction: column; gap: 8px; } main { padding: 24px 14px; } }
/* On a telephone a row of a table is a card of name and value, and a layer's name has a line of its own. */
@media (max-width: 560px) { h1 { font-size: 25px; overflow-wrap: anywhere; } section { padding: 18px 16px; }
  .numbers { grid-template-columns: 1fr 1fr; gap: 10px; } .number { padding: 13px 13px 12px; } .number b { font-size:
  27px; } .number b small { font-size: 14px; } .number .from { font-size: 13.5px; } .number .soft { font-size: 12px; }
  .status { white-space: normal; } .scroll { margin: 0 -16px; padding: 0 16px; }
  .cards, .cards tbody { display: block; } .cards tr { display: grid; grid-template-columns: 1fr 1fr; gap: 2px 18px;
  padding: 10px 8px; border-bottom: 1px solid var(--line); } .cards tr:has(th) { display: none; }
  .cards tr:last-child { border-bottom: 0; }
  .cards td, .cards td:first-child { display: flex; justify-content: space-between; gap: 8px; border: 0; padding: 0;
  white-space: normal; overflow-wrap: anywhere; text-align: left; }
  .cards .r { white-space: nowrap; } .cards td:first-child { justify-content: flex-start; }
  .cards td:empty { display: none; } .switch { float: none; margin-bottom: 8px; }
  .cards td[data-name]::before { content: attr(data-name); color: var(--soft);
  font-weight: 400; } .cards td:first-child { font-weight: 640; } .cards .whole { grid-column: 1 / -1; color:
  var(--soft); } .limits td:first-child { grid-column: 1 / -1; } tr.best { background: color-mix(in srgb, var(--star)
  9%, transparent); } tr.best td { background: none; } .limits .good, .limits .bad { grid-column: 1 / -1; }
  .layers { columns: 1; } .layer { grid-template-columns: 1fr 84px 58px; gap: 2px 10px; padding: 5px 0; }
  .layer code { grid-column: 1 / -1; white-space: normal; } .plot { height: 540px; margin: 0 -10px -6px; }
  dl { grid-template-columns: 1fr 1fr; gap: 12px 14px; } .keys { flex-direction: column; } }
@media print { body { background: none; } section, .number { break-inside: avoid; } .switch { display: none; } }
"""

SCRIPT = """
(() => {
  const plot = document.getElementById('pareto');
  if (!plot || !plot.layout) return;
  const dark = matchMedia('(prefers-color-scheme: dark)');
  const baseline = plot.data.findIndex(trace => trace.marker && trace.marker.symbol === 'diamond');
  const recolour = () => {
    Plotly.relayout(plot, {'hoverlabel.bgcolor': dark.matches ? '#262a33' : '#ffffff',
      'hoverlabel.bordercolor': dark.matches ? '#4a5160' : '#c9cdd6',
      'hoverlabel.font.color': dark.matches ? '#eceef2' : '#16181d',
      'font.color': dark.matches ? '#a6adba' : '#5a6170'});
    if (baseline >= 0) Plotly.restyle(plot, {'marker.color': dark.matches ? '#eceef2' : '#16181d',
      'marker.line.color': dark.matches ? '#181b21' : '#ffffff'}, [baseline]);
  };
  recolour();
  // On a telephone the legend is a column above the plot, and the axis takes less room.
  const narrow = matchMedia('(max-width: 560px)');
  const fit = () => Plotly.relayout(plot, {'margin.l': narrow.matches ? 62 : 72, 'margin.r': narrow.matches ? 8 : 18,
    'font.size': narrow.matches ? 11 : 13, 'legend.font.size': narrow.matches ? 11 : 13,
    height: narrow.matches ? 540 : 480});
  fit();
  narrow.addEventListener('change', fit);
  dark.addEventListener('change', recolour);
  for (const button of document.querySelectorAll('.switch button')) button.addEventListener('click', () => {
    const [x, y] = plot.layout.meta[button.dataset.range];
    Plotly.relayout(plot, {'xaxis.range': x.slice(), 'yaxis.range': y.slice()});
    for (const other of button.parentNode.children) other.setAttribute('aria-pressed', other === button);
  });
})();
"""


def document(title: str, body: str, *, library: str, script: str) -> str:
    """Return a whole page that loads nothing: `title` is escaped, `body` and the scripts are as they are."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>autocompress: {escape(title)}</title><style>{CSS}</style>"
        f"<script>{library}</script></head><body><main>{body}</main><script>{script}</script></body></html>\n"
    )
