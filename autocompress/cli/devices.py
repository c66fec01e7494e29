"""Commands about engines and devices: what runs here, how fast, and whether it works."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from autocompress.cli.terminal import echo, err, out, plain_errors, trust_option
from autocompress.errors import UnavailableError
from autocompress.runs.records import Measurement


@click.command(short_help="Time engines against each other, interleaved.")
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
    help="Time for each file, over all occasions of the quiet machine.",
)
@click.option("--throughput", is_flag=True, help="Samples a second of several streams, in place of latency.")
@click.option("--streams", type=int, help="Calls in flight with --throughput; as many as the processors hold.")
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as JSON.")
@trust_option
@plain_errors
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
    trust: bool,
) -> None:
    """Time FILES in turns, each alone in a process: run or deployed directories, engine files, ONNX files.

    The first is the baseline of every ratio: `autocompress benchmark RUN/baseline DEPLOYED` also says whether what was
    stated of DEPLOYED holds here.
    """
    from autocompress import api
    from autocompress.deploy.artifacts import stated
    from autocompress.engines.base import EngineOptions
    from autocompress.measurement.measure import Protocol
    from autocompress.report.tables import benchmark_table

    found, measured = api.benchmark(
        files, engine=engine, options=EngineOptions(dtype, threads, batch_size),
        protocol=Protocol.standard(min_seconds=seconds, max_seconds=seconds),
        mode="throughput" if throughput else "latency", streams=streams, trust=trust,
    )  # fmt: skip
    # Of a ratio to another file than its run's baseline nothing is stated.
    compared = (files[0] / "record.json").exists() and files[0].name == "baseline" and not throughput
    known = [stated(path) if compared and number else None for number, path in enumerate(files)]
    if as_json:
        rows = [
            {"file": str(f.path), "engine": f.engine, **m.to_dict(), "stated": _stated(s, m)}
            for f, m, s in zip(found, measured, known, strict=True)
        ]
        echo(json.dumps(rows, indent=2))
    else:
        out.print(benchmark_table(found, measured, known))


def _stated(known: Measurement | None, now: Measurement) -> dict[str, Any] | None:
    """Return what a file's own record says of its ratio, and whether what is measured now lies inside."""
    if known is None:
        return None
    ends = {"expected_low": known.expected_low, "expected_high": known.expected_high}
    return {"ratio": known.ratio, **ends, "holds": known.expects(now)}


@click.command(short_help="Measure a run's front on this machine.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--trial", "trials", type=int, multiple=True, help="Repeatable. The front and the best by default.")
@click.option("--seconds", type=float, default=1.0, show_default=True, help="Time for each engine.")
@click.option("--json", "as_json", is_flag=True, help="Print what was measured as JSON.")
@trust_option
@plain_errors
def measure(run: Path, *, trials: tuple[int, ...], seconds: float, as_json: bool, trust: bool) -> None:
    """Measure the front of RUN here, interleaved with its baseline, and rank the run anew.

    For a run that was searched on another machine, or for a GPU that was not there (`search --engine tensorrt-rtx
    --compute-capability 8.9`), whose latencies are only predicted.
    """
    from autocompress import api
    from autocompress.measurement.protocol import Protocol
    from autocompress.report.live import LiveObserver
    from autocompress.report.run_view import read_run
    from autocompress.report.tables import front_table, remeasured_table
    from autocompress.runs.directory import RunDirectory

    with LiveObserver(err) as observer:
        found = api.measure(
            run, list(trials) or None, observer=observer, trust=trust,
            protocol=Protocol.standard(min_seconds=seconds, max_seconds=seconds),
        )  # fmt: skip
    if as_json:
        rows = [
            {
                "trial": None if one.record.stage == "baseline" else one.record.number,
                "before": None if one.before is None else one.before.to_dict(),
                "measured": None if one.error or one.record.measurement is None else one.record.measurement.to_dict(),
                "rebuilt": one.rebuilt,
                "error": one.error,
            }
            for one in found
        ]
        echo(json.dumps(rows, indent=2))
        return
    out.print(remeasured_table(found))
    out.print(front_table(read_run(RunDirectory.open(run)), out.width))


@click.command(short_help="Build the latency table of a model on this device.")
@click.argument("run_file", required=False, type=click.Path(path_type=Path))
@click.option("--task", help="digits, cifar10, torchvision:, timm: or transformers:MODEL, or MODULE:FACTORY.")
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
@plain_errors
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
    from autocompress.prediction.table import table_path
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
        echo(str(page))
    elif as_json:
        echo(json.dumps(found.to_dict(), indent=2))
    else:
        out.print(profile_summary(found))


@click.command(
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
@trust_option
@plain_errors
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
    trust: bool,
) -> None:
    """Build engines from SOURCE, an ONNX file or a run directory, without running them.

    Nothing is measured: an engine that builds proves the graph, not the speed. Exit code 5: nothing could be built.
    """
    from autocompress import api
    from autocompress.api.run import open_run
    from autocompress.errors import EngineError
    from autocompress.quantities import format_bytes

    settings = _settings(options)
    if compute_capability is not None:
        settings["compute_capability"] = compute_capability
    numbers = list(trials) or None
    if front:
        numbers = [int(n) for n in open_run(source).front["trial"]]
    found = api.build(
        source, engine, to, dtype=dtype, batch_size=batch_size, settings=settings, trials=numbers, trust=trust
    )
    if as_json:
        rows = [
            {"trial": b.trial, "file": str(b.file.path) if b.file else None, "error": b.error, "dense": dict(b.dense)}
            for b in found
        ]
        echo(json.dumps(rows, indent=2))
    else:
        for made in found:
            name = "" if made.trial is None else f"trial {made.trial}: "
            said = f"{made.file.path}, {format_bytes(made.file.size_bytes)}" if made.file else f"{made.error}"
            kept = f" ({len(made.dense)} int8 layers stay dense)" if made.dense else ""
            out.print(f"{name}{said}{kept}", highlight=False, soft_wrap=True)
    if not any(made.file for made in found):
        sys.exit(EngineError.exit_code)


def _settings(options: tuple[str, ...]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` texts, values as YAML scalars."""
    from autocompress.documents import parse_yaml
    from autocompress.errors import ConfigError

    settings = {}
    for text in options:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"--option {text!r} must be written key=value, such as --option workspace=2GB.")
        settings[key.strip()] = parse_yaml(value, f"--option {text!r}")
    return settings


@click.command(short_help="List engines, devices and dtypes here.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@plain_errors
def devices(as_json: bool) -> None:
    """List the engines installed here, the device each runs on, and the dtypes it really computes in."""
    from autocompress import api
    from autocompress.report.tables import devices_table

    found = api.devices()
    if as_json:
        echo(json.dumps(found, indent=2))
    else:
        out.print(devices_table(found))


@click.command(short_help="Check that an engine works here.")
@click.option("--engine", default="openvino", show_default=True, help="Any of `autocompress devices`.")
@click.option(
    "--compute-capability", metavar="CC", help="tensorrt-rtx: build for these GPUs without one, such as 8.6,8.9."
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@plain_errors
def doctor(engine: str, *, compute_capability: str | None, as_json: bool) -> None:
    """Build, run and time a small network in every dtype that an engine offers here; say how to mend what fails.

    Exit code 4 says that something failed.
    """
    from autocompress.measurement.doctor import FAILED, examine
    from autocompress.report.tables import doctor_table

    settings = {} if compute_capability is None else {"compute_capability": compute_capability}
    with err.status("Examining", spinner="dots"):
        checks = list(examine(engine, settings))
    if as_json:
        echo(json.dumps([check.to_dict() for check in checks], indent=2))
    else:
        out.print(doctor_table(checks))
    if any(check.state == FAILED for check in checks):
        sys.exit(UnavailableError.exit_code)


@click.command(short_help="Print versions and hardware as JSON.")
@plain_errors
def env() -> None:
    """Print versions, processor and memory as JSON, for a bug report."""
    from autocompress.environment import describe

    echo(json.dumps(describe(), indent=2))
