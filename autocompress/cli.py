"""The command line, a thin face over `autocompress.api`: data on stdout, progress on stderr, exit codes of `errors`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from autocompress import __version__
from autocompress.errors import EXIT_INTERRUPTED, AutoCompressError, UnavailableError

out = Console()
err = Console(stderr=True)


def _plain_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn errors into a message and an exit code; ``--debug`` shows the traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except AutoCompressError as error:
            if click.get_current_context().find_root().params.get("debug"):
                raise
            err.print(f"[bold red]{type(error).__name__}[/]: ", end="")
            # Not wrapped: paths and commands in a message are there to be copied.
            err.print(str(error), markup=False, highlight=False, soft_wrap=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            err.print("Interrupted.", highlight=False)
            sys.exit(EXIT_INTERRUPTED)

    return run


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
def main(debug: bool) -> None:
    """Compress a trained PyTorch model for a latency budget, measured on the device it will run on."""


@main.command(
    short_help="Find the best compression within the limits.",
    epilog="Example: autocompress search --task digits --target-latency 0.5x --timeout 5m",
)
@click.argument("run_file", required=False, type=click.Path(path_type=Path))
@click.option("--task", help="digits, cifar10, torchvision:MODEL or MODULE:FACTORY.")
@click.option("--target-latency", metavar="LIMIT", help="Such as 5ms, 800us or 0.5x of the uncompressed model.")
@click.option("--max-drop", metavar="LIMIT", help="Largest loss of the metric, such as 1pp.")
@click.option("--max-size", metavar="LIMIT", help="Largest engine on disk, such as 20MB or 0.25x.")
@click.option("--n-trials", type=int, help="Trials at most; those of a resumed run count. Default 100.")
@click.option("--timeout", metavar="TIME", help="For everything, fine-tuning included, such as 25m. Default none.")
@click.option("--sampler", help="tpe (default), nsga2, gp or random.")
@click.option("--seed", type=int, help="Of sampling, splits and training.")
@click.option("--engine", help="openvino (default), onnxruntime, tensorrt or tensorrt-rtx.")
@click.option("--threads", type=int, help="Threads of one inference call. Default 1.")
@click.option("--batch-size", type=int, help="Samples of one inference call. Default 1.")
@click.option("--space", help="default, prune-only, quantize-only, lowrank-only, uniform, or a YAML file.")
@click.option("--table", metavar="FILE", help="A latency table; by default that of this device. none: predict nothing.")
@click.option("--allow-foreign-table", is_flag=True, default=None, help="Use a table of another device, labelled so.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Run directory, new or empty. Default runs/TASK-TIME."
)
@click.option("--resume", is_flag=True, help="Continue the run in --out.")
@click.option(
    "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any key of the run file, such as task.data=DIR."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")
@_plain_errors
def search(
    run_file: Path | None, out: Path | None, resume: bool, sets: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Search for the best compression within the limits; fine-tune, verify and report it.

    RUN_FILE is YAML; options are laid over it. The result is in DIR/best whenever the search ends; exit code 3 says
    that it misses a limit. Interrupted with Ctrl-C, it goes on with --out DIR --resume.
    """
    from autocompress import api
    from autocompress.deploy.summary import shortfall
    from autocompress.errors import NoFeasibleTrialError
    from autocompress.report.live import LiveObserver

    task = options.pop("task")
    with LiveObserver(err) as observer:
        try:
            run = api.search(task, config=run_file, out=out, resume=resume, observer=observer, sets=sets, **options)
        except KeyboardInterrupt:
            if observer.run is not None:
                hint = f"Everything finished is saved. Go on with: autocompress search --out {observer.run} --resume"
                err.print(hint, markup=False, highlight=False, soft_wrap=True)
            raise
    summary = run.summary
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        _print_run(run.directory)
    if not summary["best"]["feasible"]:
        raise NoFeasibleTrialError(shortfall(summary))


def _print_run(directory: Any) -> None:
    from autocompress.report.run_view import read_run
    from autocompress.report.tables import front_table, result_panel

    view = read_run(directory)
    out.print(front_table(view, out.width))
    if view.summary:
        out.print(result_panel(view.summary))
    if directory.report_file.exists():
        out.print(f"Report: {directory.report_file}", highlight=False)


@main.command(short_help="Show the Pareto front of a run.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the front as JSON.")
@click.option("--html", is_flag=True, help="Write report.html anew and print its path.")
@_plain_errors
def pareto(run: Path, as_json: bool, html: bool) -> None:
    """Show the Pareto front of RUN, a run directory."""
    from autocompress.report.html import write_report
    from autocompress.run_directory import RunDirectory

    directory = RunDirectory.open(run)
    if html:
        click.echo(str(write_report(directory)))
    elif as_json:
        click.echo(json.dumps(directory.read("pareto.json"), indent=2))
    else:
        _print_run(directory)


@main.command(short_help="Package and verify the measured engine.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--trial", type=int, help="A trial of the front; the best result by default.")
@click.option("--to", required=True, type=click.Path(path_type=Path), metavar="DIR", help="New directory.")
@click.option(
    "--triton", type=click.Path(path_type=Path), metavar="DIR", help="Also write it into this Triton model repository."
)
@click.option("--triton-name", default="model", show_default=True, metavar="NAME", help="Of the model in it.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
@_plain_errors
def deploy(run: Path, trial: int | None, to: Path, *, triton: Path | None, triton_name: str, as_json: bool) -> None:
    """Package the measured engine of RUN, verified again in a fresh process.

    DIR/run.py loads the engine and answers a request without autocompress. --triton serves it with NVIDIA Triton.
    """
    from autocompress.deploy import package
    from autocompress.deploy.triton import write_triton_repository
    from autocompress.latency.fingerprint import device_fingerprint
    from autocompress.run_directory import RunDirectory
    from autocompress.units import format_ms

    manifest = package.deploy(RunDirectory.open(run), to, trial, device=device_fingerprint())
    if triton is not None:
        model = write_triton_repository(to, triton, triton_name)
        err.print(f"Triton model: {model}", highlight=False)
    if as_json:
        click.echo(json.dumps(manifest.to_dict(), indent=2))
        return
    latency, outputs = manifest.verification["latency"], manifest.verification["outputs"]
    out.print(f"Deployed trial {manifest.trial} ({manifest.stage}) to [bold]{to}[/]: {manifest.file}", highlight=False)
    out.print(
        f"Verified in a fresh process: same bytes as measured, same outputs on {outputs['samples']} samples, "
        f"{format_ms(latency['latency_ms'])}, {latency['ratio']:.3f}x of the uncompressed model "
        f"({latency['ratio_low']:.3f} to {latency['ratio_high']:.3f}).",
        highlight=False,
    )


@main.command(short_help="Time engines against each other, interleaved.")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--engine", help="For bare ONNX files: openvino (default), onnxruntime, tensorrt…")
@click.option("--dtype", default="fp32", show_default=True, help="For bare ONNX files: fp32, bf16 or fp16.")
@click.option("--threads", type=int, default=1, show_default=True, help="For bare ONNX files.")
@click.option("--batch-size", type=int, default=1, show_default=True, help="For bare ONNX files.")
@click.option(
    "--seconds",
    type=float,
    default=1.0,
    show_default=True,
    help="Time for each file; up to four times as long when noisy.",
)
@click.option("--throughput", is_flag=True, help="Samples a second of several streams, in place of latency.")
@click.option("--streams", type=int, help="Calls in flight with --throughput; as many as the processors hold.")
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as JSON.")
@_plain_errors
def benchmark(
    files: tuple[Path, ...],
    *,
    engine: str | None,
    dtype: str,
    threads: int,
    batch_size: int,
    seconds: float,
    throughput: bool,
    streams: int | None,
    as_json: bool,
) -> None:
    """Time FILES interleaved in one process: run or deployed directories, engine files, ONNX files.

    The first is the baseline of every ratio: `autocompress benchmark RUN/baseline DEPLOYED`.
    """
    from autocompress import api
    from autocompress.engines.base import EngineOptions
    from autocompress.latency.measure import Protocol
    from autocompress.report.tables import benchmark_table

    found, measured = api.benchmark(
        files, engine=engine, options=EngineOptions(dtype, threads, batch_size),
        protocol=Protocol(min_seconds=seconds, max_seconds=4 * seconds),
        mode="throughput" if throughput else "latency", streams=streams,
    )  # fmt: skip
    if as_json:
        rows = [{"file": str(f.path), "engine": f.engine, **m.to_dict()} for f, m in zip(found, measured, strict=True)]
        click.echo(json.dumps(rows, indent=2))
    else:
        out.print(benchmark_table(found, measured))


@main.command(short_help="Build the latency table of a model on this device.")
@click.argument("run_file", required=False, type=click.Path(path_type=Path))
@click.option("--task", help="digits, cifar10, torchvision:MODEL or MODULE:FACTORY.")
@click.option("--engine", help="openvino (default) or onnxruntime.")
@click.option("--threads", type=int, help="Threads of one inference call. Default 1.")
@click.option("--batch-size", type=int, help="Samples of one inference call. Default 1.")
@click.option("--space", help="The search space to cover, as for search.")
@click.option("--budget", default="8m", show_default=True, metavar="TIME", help="Time to spend; what is there counts.")
@click.option("--networks", type=int, help="Stop as soon as the table holds this many forms of the model.")
@click.option(
    "--tables", type=click.Path(path_type=Path), metavar="DIR", help="Folder of all tables. Default: the user's cache."
)
@click.option("--show", is_flag=True, help="Measure nothing; draw the table that is there as HTML and print its path.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any key of the run file.")
@click.option("--json", "as_json", is_flag=True, help="Print path, size and error of the table as JSON.")
@_plain_errors
def profile(
    run_file: Path | None,
    budget: str,
    networks: int | None,
    tables: Path | None,
    *,
    show: bool,
    sets: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Measure forms of a model and learn to predict the others: the latency table of this device and engine.

    Interrupted, it goes on where it was. It ends with the error of its predictions on networks that it never learned
    from; searches on this device find the table by themselves.
    """
    from autocompress import api
    from autocompress.latency.table import table_path
    from autocompress.report.live import LiveObserver
    from autocompress.report.table_view import write_table_report
    from autocompress.report.tables import profile_summary

    task = options.pop("task")
    with LiveObserver(err) as observer:
        subject: dict[str, Any] = {"config": run_file, "folder": tables, "observer": observer, "sets": sets, **options}
        if show:
            found = api.open_profile(task, **subject)
        else:
            found = api.profile(task, budget=budget, networks=networks, **subject)
    if show:
        guesses = [(row, p.ratio, p.low, p.high) for row, p in found.predictions]
        table = found.table
        # Beside the user's own table, also where it is a shipped one that is drawn.
        place = table_path(table.engine, table.device, tables, threads=table.threads, batch_size=table.batch_size)
        page = place.with_suffix(".html")
        write_table_report(found.table, page, guesses, {found.network: found.error} if found.error else None)
        click.echo(str(page))
    elif as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        out.print(profile_summary(found))


@main.command(
    short_help="Build for another engine, also without its GPU.",
    epilog="Example: autocompress build RUN --engine tensorrt-rtx --compute-capability 8.9 --to engines",
)
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--engine", required=True, help="Any of `autocompress devices`.")
@click.option("--to", required=True, type=click.Path(path_type=Path), metavar="DIR", help="New directory.")
@click.option("--compute-capability", metavar="CC", help="tensorrt-rtx: GPUs to build for, such as 8.9 or 8.6,12.0.")
@click.option("--dtype", help="Of layers without Q/DQ; fp16 for TensorRT by default.")
@click.option("--batch-size", type=int, default=1, show_default=True, help="Samples of one inference call.")
@click.option("--trial", "trials", type=int, multiple=True, help="Of a run; repeatable. The best by default.")
@click.option("--front", is_flag=True, help="Every model of a run's Pareto front.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Engine option, such as workspace=2GB.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@_plain_errors
def build(
    source: Path,
    *,
    engine: str,
    to: Path,
    compute_capability: str | None,
    dtype: str | None,
    batch_size: int,
    trials: tuple[int, ...],
    front: bool,
    options: tuple[str, ...],
    as_json: bool,
) -> None:
    """Build engines from SOURCE, an ONNX file or a run directory, without running them.

    Nothing is measured: an engine that builds proves the graph, not the speed. Exit code 5: nothing could be built.
    """
    from autocompress import api
    from autocompress.errors import EngineError
    from autocompress.run import open_run
    from autocompress.units import format_bytes

    settings = _settings(options)
    if compute_capability is not None:
        settings["compute_capability"] = compute_capability
    numbers = list(trials) or None
    if front:
        numbers = [int(n) for n in open_run(source).front["trial"]]
    found = api.build(source, engine, to, dtype=dtype, batch_size=batch_size, settings=settings, trials=numbers)
    if as_json:
        rows = [
            {"trial": b.trial, "file": str(b.file.path) if b.file else None, "error": b.error, "dense": dict(b.dense)}
            for b in found
        ]
        click.echo(json.dumps(rows, indent=2))
    else:
        for made in found:
            name = "" if made.trial is None else f"trial {made.trial}: "
            said = f"{made.file.path}, {format_bytes(made.file.size_bytes)}" if made.file else f"{made.error}"
            kept = f" ({len(made.dense)} int8 layers stay dense)" if made.dense else ""
            out.print(f"{name}{said}{kept}", markup=False, highlight=False, soft_wrap=True)
    if not any(made.file for made in found):
        sys.exit(EngineError.exit_code)


def _settings(options: tuple[str, ...]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` texts, values as YAML scalars."""
    import yaml

    from autocompress.errors import ConfigError

    settings = {}
    for text in options:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"--option {text!r} must be written key=value, such as --option workspace=2GB.")
        settings[key.strip()] = yaml.safe_load(value)
    return settings


@main.command(short_help="List what can be compressed in a model.")
@click.argument("run_file", required=False, type=click.Path(path_type=Path))
@click.option("--task", help="digits, cifar10, torchvision:MODEL or MODULE:FACTORY.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any key of the run file.")
@click.option("--json", "as_json", is_flag=True, help="Print the inventory as JSON.")
@_plain_errors
def inspect(run_file: Path | None, task: str | None, sets: tuple[str, ...], as_json: bool) -> None:
    """List what can be compressed in a task's model, and what is left alone and why."""
    from autocompress import api
    from autocompress.config import load_config
    from autocompress.report.tables import inventory_tables

    config = load_config(run_file, {"task.name": task}, sets)
    found = api.inspect(api.task_from(config.task))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        for table in inventory_tables(found):
            out.print(table)


@main.command(short_help="List engines, devices and dtypes here.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@_plain_errors
def devices(as_json: bool) -> None:
    """List the engines installed here, the device each runs on, and the dtypes it really computes in."""
    from autocompress import api
    from autocompress.report.tables import devices_table

    found = api.devices()
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        out.print(devices_table(found))


@main.command(short_help="Check that an engine works here.")
@click.option("--engine", default="openvino", show_default=True, help="Any of `autocompress devices`.")
@click.option(
    "--compute-capability", metavar="CC", help="tensorrt-rtx: build for these GPUs without one, such as 8.6,8.9."
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@_plain_errors
def doctor(engine: str, *, compute_capability: str | None, as_json: bool) -> None:
    """Build, run and time a small network in every dtype that an engine offers here; say how to mend what fails.

    Exit code 4 says that something failed.
    """
    from autocompress.doctor import FAILED, examine
    from autocompress.report.tables import doctor_table

    settings = {} if compute_capability is None else {"compute_capability": compute_capability}
    with err.status("Examining", spinner="dots"):
        checks = list(examine(engine, settings))
    if as_json:
        click.echo(json.dumps([check.to_dict() for check in checks], indent=2))
    else:
        out.print(doctor_table(checks))
    if any(check.state == FAILED for check in checks):
        sys.exit(UnavailableError.exit_code)


@main.command(short_help="Print versions and hardware as JSON.")
@_plain_errors
def env() -> None:
    """Print versions, processor and memory as JSON, for a bug report."""
    from autocompress.environment import describe

    click.echo(json.dumps(describe(), indent=2))
