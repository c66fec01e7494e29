"""The HTML report: one self-contained page (style, script and data inline), written atomically into the run directory.

Owns the page's order and its plot; the other parts are in `sections`.
"""

from __future__ import annotations

from pathlib import Path

from autocompress._optional import optional
from autocompress.documents import reading
from autocompress.files import write_text
from autocompress.report.figure import outside, pareto_figure
from autocompress.report.run_view import RunView, read_run
from autocompress.report.sections import (
    failures,
    front_table,
    header,
    limits,
    numbers,
    policy_map,
    reasons,
    settings,
    text,
    time_spent,
)
from autocompress.report.style import SCRIPT, document
from autocompress.runs.directory import RunDirectory

_FOOTER = (
    "How to read this page. Latency is the measured median of one inference call in a child process; each ratio comes "
    "from rounds interleaved with the baseline, so the machine's drift cancels. The baseline is the uncompressed model "
    "at the dense dtype named above, not fp32 unless it says so. Validation {metric} steered the search and is "
    "computed by the engine file itself; test data is read once, at the end, for the result alone. MACs are "
    "counted, not measured, and are shown beside latency because the two seldom agree."
)


# By whether latencies are predicted.
_SOURCE = {
    False: "Every candidate's own engine file, measured: validation {metric} against median latency.",
    True: (
        "<b class=warn>Latencies are PREDICTED from a latency table of a device that was not here; nothing was run on "
        "it.</b> <code>autocompress measure</code> on the device measures the front. The {metric} is that of the same "
        "graphs in ONNX Runtime."
    ),
}


def write_report(run: RunDirectory) -> Path:
    """Write ``report.html`` of a finished or interrupted run and return its path.

    Raises:
        MissingDependencyError: plotly is not installed.
        ConfigError: The directory cannot be written, or a record is from a newer release.
    """
    view = read_run(run)
    # A summary of this or another release may lack what a figure is made of.
    with reading(run.path / "summary.json", "Run 'autocompress search --out RUN --resume' to have it written again."):
        page = render(view)
    write_text(run.report_file, page)
    return run.report_file


def render(view: RunView) -> str:
    """Return the page."""
    library = optional("plotly.offline", "report", "The report").get_plotlyjs() if view.points else ""
    parts = (
        header(view), numbers(view), limits(view), _plot(view), policy_map(view), reasons(view), front_table(view),
        time_spent(view), settings(view), failures(view),
    )  # fmt: skip
    title = " · ".join(str(v) for v in (view.summary.get("model"), view.summary.get("task")) if v) or view.path.name
    return document(
        title,
        f"{''.join(parts)}<footer>{_FOOTER.format(metric=text(view.metric.name))}</footer>",
        library=library,
        script=SCRIPT,
    )


def _plot(view: RunView) -> str:
    name = text(view.metric.name)
    title = f"{name[:1].upper()}{name[1:]} and latency"
    if not view.points:
        return (
            f"<section><h2>{title}</h2><p class=soft>No candidate has been measured, so there is no front "
            "to draw. The reasons, if any candidate failed, are at the end of this page.</p></section>"
        )
    figure = pareto_figure(view)
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id="pareto",
        config={"displayModeBar": False, "responsive": True},
    )
    hidden = outside(view)
    switch = beyond = ""
    if hidden:
        switch = (
            '<div class="switch"><button data-range="focus" aria-pressed="true">Front</button>'
            f'<button data-range="everything" aria-pressed="false">All {len(view.points)}</button></div>'
        )
        beyond = f" {hidden} of {len(view.points)} lie outside the first view."
    shaded = view.latency_limit_ms is not None or view.drop_limit is not None
    unbuilt = " Crosses were not built: their latency is PREDICTED." if view.rejected else ""
    return (
        f"<section>{switch}<h2>{title}</h2><p class=note>{_SOURCE[view.predicted].format(metric=name)}{unbuilt} "
        f"Up and to the left is better{'; the shaded region meets the limits' if shaded else ''}.{beyond} "
        "Drag to zoom, double-click to go back.</p>"
        f'<div class="plot">{drawn}</div></section>'
    )
