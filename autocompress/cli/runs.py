"""Commands about a model and its runs: search, look, deploy."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autocompress.cli.terminal import echo, err, out, plain_errors, trust_option

if TYPE_CHECKING:
    from autocompress.runs.directory import RunDirectory


@click.command(
    short_help="Find the best compression within the limits.",
    epilog="Example: autocompress search --task digits --target-latency 0.5x --timeout 5m",
)
@click.argument("run_file", required=False, type=click.Path(path_type=Path))
@click.option("--task", help="digits, cifar10, torchvision:, timm: or transformers:MODEL, or MODULE:FACTORY.")
@click.option("--metric", help="Without labels: agreement, top1, cosine or kl with the uncompressed model's outputs.")
@click.option("--target-latency", metavar="LIMIT", help="Such as 5ms, 800us or 0.5x of the uncompressed model.")
@click.option("--max-drop", metavar="LIMIT", help="Largest loss of the metric, such as 1pp.")
@click.option("--max-size", metavar="LIMIT", help="Largest engine on disk, such as 20MB or 0.25x.")
@click.option("--n-trials", type=int, help="Trials at most; those of a resumed run count. Default 100.")
@click.option("--timeout", metavar="TIME", help="For everything, fine-tuning included, such as 25m. Default none.")
@click.option("--sampler", help="knapsack (default), tpe, nsga2, gp or random.")
@click.option("--seed", type=int, help="Of sampling, splits and training.")
@click.option(
    "--deterministic", is_flag=True, default=None, help="Steer by the latency table alone: one seed, one result."
)
@click.option("--engine", help="openvino (default), onnxruntime, tensorrt or tensorrt-rtx.")
@click.option("--compute-capability", metavar="CC", help="tensorrt-rtx: build for these GPUs; latency is PREDICTED.")
@click.option("--threads", type=int, help="Threads of one inference call. Default 1.")
@click.option("--batch-size", type=int, help="Samples of one inference call. Default 1.")
@click.option("--space", help="default, prune-only, quantize-only, lowrank-only, uniform, or a YAML file.")
@click.option("--importance", help="Which channels go first; see `autocompress methods`. By default the space's.")
@click.option("--table", metavar="FILE", help="A latency table; by default that of this device. none: predict nothing.")
@click.option("--allow-foreign-table", is_flag=True, default=None, help="Use a table of another device, labelled so.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Run directory, new or empty. Default runs/TASK-TIME."
)
@click.option("--resume", is_flag=True, help="Continue the run in --out.")
@click.option(
    "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any key of the run file, such as task.data=DIR."
)
@trust_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")
@plain_errors
def search(
    run_file: Path | None,
    out: Path | None,
    compute_capability: str | None,
    *,
    resume: bool,
    sets: tuple[str, ...],
    as_json: bool,
    trust: bool,
    **options: Any,
) -> None:
    """Search for the best compression within the limits; fine-tune, verify and report it.

    RUN_FILE is YAML; options are laid over it. The result is in DIR/best whenever the search ends; exit code 3 says
    that it misses a limit. Interrupted with Ctrl-C or SIGTERM, it is summarised and goes on with --out DIR --resume.
    """
    from autocompress import api
    from autocompress.deploy.summary import shortfall
    from autocompress.errors import AutoCompressError, NoFeasibleTrialError
    from autocompress.report.live import LiveObserver
    from autocompress.runs.directory import RunDirectory

    task, options["task.metric"] = options.pop("task"), options.pop("metric")
    if compute_capability is not None:
        sets = (*sets, f"engine_options.compute_capability={compute_capability}")
    with LiveObserver(err) as observer:
        try:
            run = api.search(
                task, config=run_file, out=out, resume=resume, observer=observer, sets=sets, trust=trust, **options
            )
        except KeyboardInterrupt:
            if observer.run is not None:
                folder = shlex.quote(str(observer.run))
                if (observer.run / "summary.json").exists():
                    err.print(
                        f"The best so far is in {folder}/best; summary.json and report.html say what is missing.",
                        highlight=False, soft_wrap=True,
                    )  # fmt: skip
                hint = f"Everything finished is saved. Go on with: autocompress search --out {folder} --resume"
                err.print(hint, highlight=False, soft_wrap=True)
            raise
        except AutoCompressError as error:
            # What had been found before is shown all the same.
            if error.run is not None:
                _print_result(RunDirectory.open(error.run), as_json=as_json)
            raise
    summary = run.summary
    _print_result(run.directory, as_json=as_json)
    if not summary["best"]["feasible"]:
        raise NoFeasibleTrialError(shortfall(summary))


def _print_result(directory: RunDirectory, *, as_json: bool) -> None:
    if as_json:
        echo(json.dumps(directory.read("summary.json"), indent=2))
    else:
        _print_run(directory)


def _print_run(directory: Any) -> None:
    from autocompress.documents import reading
    from autocompress.report.result_panel import result_panel
    from autocompress.report.run_view import read_run
    from autocompress.report.tables import front_table

    view = read_run(directory)
    for line in view.damaged:
        err.print(f"Left out: {line}", highlight=False, soft_wrap=True)
    mend = "Run 'autocompress search --out RUN --resume' to have it written again."
    with reading(directory.path / "summary.json", mend):
        out.print(front_table(view, out.width))
        if view.summary:
            out.print(result_panel(view.summary))
    if directory.report_file.exists():
        out.print(f"Report: {directory.report_file}", highlight=False)


@click.command(short_help="Show the Pareto front of a run.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the front as JSON.")
@click.option("--html", is_flag=True, help="Write report.html anew and print its path.")
@plain_errors
def pareto(run: Path, as_json: bool, html: bool) -> None:
    """Show the Pareto front of RUN, a run directory."""
    from autocompress.report.html import write_report
    from autocompress.runs.directory import RunDirectory

    directory = RunDirectory.open(run)
    if html:
        echo(str(write_report(directory)))
    elif as_json:
        echo(json.dumps(directory.read("pareto.json"), indent=2))
    else:
        _print_run(directory)


@click.command(short_help="Package and verify the measured engine.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--trial", type=int, help="A trial of the front; the best result by default.")
@click.option("--to", required=True, type=click.Path(path_type=Path), metavar="DIR", help="New directory.")
@click.option("--force", is_flag=True, help="Deploy it though it missed a limit of its run.")
@click.option(
    "--triton", type=click.Path(path_type=Path), metavar="DIR", help="Also write it into this Triton model repository."
)
@click.option("--triton-name", default="model", show_default=True, metavar="NAME", help="Of the model in it.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
@trust_option
@plain_errors
def deploy(
    run: Path,
    trial: int | None,
    to: Path,
    *,
    force: bool,
    triton: Path | None,
    triton_name: str,
    as_json: bool,
    trust: bool,
) -> None:
    """Package the measured engine of RUN, verified again in a fresh process.

    DIR/run.py loads the engine and answers a request without autocompress. --triton serves it with NVIDIA Triton.
    """
    from rich.text import Text

    from autocompress.deploy import package
    from autocompress.deploy.triton import write_triton_repository
    from autocompress.measurement.fingerprint import device_fingerprint
    from autocompress.quantities import format_ms
    from autocompress.runs.directory import RunDirectory

    manifest = package.deploy(RunDirectory.open(run), to, trial, device=device_fingerprint(), force=force, trust=trust)
    if triton is not None:
        model = write_triton_repository(to, triton, triton_name)
        err.print(f"Triton model: {model}", highlight=False)
    if as_json:
        echo(json.dumps(manifest.to_dict(), indent=2))
        return
    latency, outputs = manifest.verification["latency"], manifest.verification["outputs"]
    name = "the uncompressed model" if manifest.trial is None else f"trial {manifest.trial} ({manifest.stage})"
    out.print(Text.assemble(f"Deployed {name} to ", (str(to), "bold"), f": {manifest.file}"), highlight=False)
    out.print(
        f"Verified in a fresh process: same bytes as measured, same outputs on {outputs['samples']} samples, "
        f"{format_ms(latency['latency_ms'])}, {latency['ratio']:.3f}x of the uncompressed model "
        f"({latency['ratio_low']:.3f} to {latency['ratio_high']:.3f}).",
        highlight=False,
    )


@click.command(short_help="Look a run over, and mend what can be.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@plain_errors
def repair(run: Path, as_json: bool) -> None:
    """Look RUN, a run directory, over after a crash or a full disk, and mend what it holds twice.

    Half-made files go, damaged lines of the log and a database that tells something else are set aside, best/ is made
    anew of the artefact it is a copy of. What cannot be mended is named.
    """
    from autocompress.api.run import repair as repair_run

    found = repair_run(run)
    if as_json:
        echo(json.dumps(found, indent=2))
        return
    for text in found or ["Nothing is wrong with this run."]:
        out.print(text, highlight=False, soft_wrap=True)


@click.command(short_help="List what can be compressed in a model.")
@click.argument("run_file", required=False, type=click.Path(path_type=Path))
@click.option("--task", help="digits, cifar10, torchvision:, timm: or transformers:MODEL, or MODULE:FACTORY.")
@click.option("--metric", help="Without labels: agreement, top1, cosine or kl with the uncompressed model's outputs.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any key of the run file.")
@click.option("--json", "as_json", is_flag=True, help="Print the inventory as JSON.")
@plain_errors
def inspect(run_file: Path | None, task: str | None, metric: str | None, sets: tuple[str, ...], as_json: bool) -> None:
    """List what can be compressed in a task's model, and what is left alone and why."""
    from autocompress import api
    from autocompress.config import load_config
    from autocompress.report.tables import inventory_tables

    config = load_config(run_file, {"task.name": task, "task.metric": metric}, sets)
    found = api.inspect(api.task_from(config.task))
    if as_json:
        echo(json.dumps(found, indent=2))
    else:
        for table in inventory_tables(found):
            out.print(table)


@click.command(short_help="Show what each choice costs in accuracy.")
@click.argument("run_file", required=False, type=click.Path(path_type=Path))
@click.option("--task", help="digits, cifar10, torchvision:, timm: or transformers:MODEL, or MODULE:FACTORY.")
@click.option("--metric", help="Without labels: agreement, top1, cosine or kl with the uncompressed model's outputs.")
@click.option("--engine", help="openvino (default), onnxruntime, tensorrt or tensorrt-rtx.")
@click.option("--space", help="The search space, as for search.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any key of the run file.")
@click.option("--json", "as_json", is_flag=True, help="Print the losses as JSON.")
@plain_errors
def sensitivity(run_file: Path | None, *, sets: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Measure what each choice of the search space does to the outputs, on its own, and show it as a heat map.

    Losses are how far the outputs move from the uncompressed model's on calibration data, by the divergence that fits
    them (Task.divergence); no labels are read. They are kept, and the knapsack sampler begins with them.
    """
    from autocompress import api
    from autocompress.report.live import LiveObserver
    from autocompress.report.tables import sensitivity_table

    task, options["task.metric"] = options.pop("task"), options.pop("metric")
    with LiveObserver(err) as observer:
        found = api.sensitivity(task, config=run_file, observer=observer, sets=sets, **options)
    if as_json:
        echo(json.dumps(found.to_dict(), indent=2))
    else:
        out.print(sensitivity_table(found))
