"""Commands about methods of compression: which there are, and pruning, int8 and distillation without a search."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from autocompress.cli.terminal import echo, err, out, plain_errors

_METRIC = click.option(
    "--metric", help="Without labels: agreement, top1, cosine or kl with the uncompressed model's outputs."
)


@click.command(short_help="List every method of compression.")
@click.option("--family", help="importance, pruning, quantization, lowrank, distillation, recovery or storage.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@plain_errors
def methods(family: str | None, *, as_json: bool) -> None:
    """List every method: what it does, where it is from, and which engines it can make faster.

    A method of the family importance is named so in a search space or a run file: importance: apoz.
    """
    from autocompress.catalogue import list_methods
    from autocompress.report.method_tables import methods_table

    found = list_methods(family)
    if as_json:
        echo(json.dumps([asdict(method) for method in found], indent=2))
    else:
        out.print(methods_table(found, out.width))


def _with_metric(sets: tuple[str, ...], metric: str | None) -> tuple[str, ...]:
    return sets if metric is None else (f"task.metric={metric}", *sets)


@click.command(
    short_help="Prune by one importance, without a search.",
    epilog="Example: autocompress prune --task digits --importance taylor --ratio 0.5 --schedule gradual --epochs 2",
)
@click.argument("run_file", required=False, type=click.Path(path_type=Path))
@click.option("--task", help="digits, cifar10, torchvision:, timm: or transformers:MODEL, or MODULE:FACTORY.")
@_METRIC
@click.option("--importance", help="Which channels go first; see `autocompress methods`. Default magnitude.")
@click.option("--ratio", type=float, metavar="R", help="Fraction of all channels that goes, such as 0.5.")
@click.option("--macs", type=float, metavar="M", help="Or fraction of the multiply-accumulates that stays.")
@click.option("--scope", default="global", show_default=True, help="global, one threshold, or layer, the same ratio.")
@click.option("--multiple", type=int, default=1, show_default=True, help="Keep channels in multiples of this.")
@click.option("--schedule", default="one_shot", show_default=True, help="one_shot, iterative or gradual.")
@click.option("--steps", type=int, default=5, show_default=True, help="Of iterative and gradual schedules.")
@click.option("--epochs", type=float, default=0.0, show_default=True, help="Of distillation, over all steps together.")
@click.option(
    "--to", type=click.Path(path_type=Path), metavar="DIR", help="Write policy, weights and ONNX file; new directory."
)
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any key of the run file.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@plain_errors
def prune(
    run_file: Path | None, *, task: str | None, metric: str | None, to: Path | None, sets: tuple[str, ...],
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Prune a task's model to a share of its channels or multiply-accumulates, in one step or in several.

    Nothing is searched or measured on an engine: `autocompress benchmark` times DIR/model.onnx.
    """
    from autocompress import api
    from autocompress.report.live import LiveObserver
    from autocompress.report.method_tables import pruned_tables

    given = {key: value for key, value in options.items() if value is not None}
    with LiveObserver(err) as observer:
        found = api.prune(task, config=run_file, to=to, observer=observer, sets=_with_metric(sets, metric), **given)
    if as_json:
        echo(json.dumps(found.to_dict(), indent=2))
    else:
        out.print(pruned_tables(found))


@click.command(
    short_help="Set to int8 without training or search.",
    epilog="Example: autocompress quantize --task digits --max-drop 0.5pp --calibration entropy --to int8",
)
@click.argument("run_file", required=False, type=click.Path(path_type=Path))
@click.option("--task", help="digits, cifar10, torchvision:, timm: or transformers:MODEL, or MODULE:FACTORY.")
@_METRIC
@click.option("--max-drop", metavar="LIMIT", help="Largest loss of the metric on validation data. Default 1pp.")
@click.option("--calibration", help="mse (default), minmax, percentile or entropy.")
@click.option("--engine", help="Whose rules the ONNX file follows: openvino (default), onnxruntime, tensorrt…")
@click.option("--skip", multiple=True, metavar="LAYER", help="Leave this layer as it is; may be given several times.")
@click.option(
    "--to", type=click.Path(path_type=Path), metavar="DIR", help="Write policy, weights and ONNX file; new directory."
)
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any key of the run file.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@plain_errors
def quantize(
    run_file: Path | None,
    *,
    task: str | None,
    metric: str | None,
    to: Path | None,
    skip: tuple[str, ...],
    sets: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Set a task's model to int8, corrected step by step until it loses no more than it may.

    Nothing is trained on labels, searched or measured: `autocompress benchmark` times DIR/model.onnx. Exit code 3 says
    that the best that was found misses the limit; it is written all the same.
    """
    from autocompress import api
    from autocompress.errors import NoFeasibleTrialError
    from autocompress.report.live import LiveObserver
    from autocompress.report.method_tables import quantized_tables

    calibration = options.pop("calibration")
    given = {key: value for key, value in options.items() if value is not None}
    if calibration is not None:
        given["quantization.calibration"] = calibration
    with LiveObserver(err) as observer:
        sets = _with_metric(sets, metric)
        found = api.quantize(task, config=run_file, to=to, skip=skip, observer=observer, sets=sets, **given)
    if as_json:
        echo(json.dumps(found.to_dict(), indent=2))
    else:
        out.print(quantized_tables(found))
    if not found.feasible:
        raise NoFeasibleTrialError(
            f"Int8 loses {found.baseline - found.rung.metric:.2%} at best, more than the limit. Leave layers out with "
            "--skip, allow more with --max-drop, or fine-tune: autocompress search."
        )


@click.command(
    short_help="Teach a smaller model, without a search.",
    epilog="Example: autocompress distill --task digits --student my_models:small --epochs 5 --to small",
)
@click.argument("run_file", required=False, type=click.Path(path_type=Path))
@click.option("--task", help="digits, cifar10, torchvision:MODEL or MODULE:FACTORY; its model is the teacher.")
@click.option("--student", required=True, help="MODULE:FACTORY, torchvision:MODEL, timm:MODEL or resnet20, vgg11_bn…")
@click.option("--student-weights", type=click.Path(path_type=Path), metavar="FILE", help="Safetensors to begin with.")
@click.option("--metric", help="Without labels: agreement, top1, cosine or kl with the teacher's outputs.")
@click.option("--epochs", type=float, help="Passes over the training data. Default: recovery.epochs, 24.")
@click.option("--timeout", metavar="TIME", help="For everything, such as 25m: the training ends in time. Default none.")
@click.option("--engine", help="openvino (default), onnxruntime or tensorrt.")
@click.option("--threads", type=int, help="Threads of one inference call. Default 1.")
@click.option("--batch-size", type=int, help="Samples of one inference call. Default 1.")
@click.option("--seconds", type=float, default=1.0, show_default=True, help="Of measuring, for each engine.")
@click.option(
    "--to", type=click.Path(path_type=Path), metavar="DIR", help="Write weights, ONNX file and engine; new directory."
)
@click.option("--resume", is_flag=True, help="Go on with the interrupted training in --to.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any key of the run file.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@plain_errors
def distill(
    run_file: Path | None,
    *,
    task: str | None,
    student: str,
    student_weights: Path | None,
    epochs: float | None,
    seconds: float,
    to: Path | None,
    resume: bool,
    sets: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Train a smaller model to be like a task's own, and compare the two on the engine.

    What it learns from, recovery.distill says: logits, features, attention. The teacher's engine is in DIR/teacher:
    `autocompress benchmark DIR/teacher DIR`.
    """
    from autocompress import api
    from autocompress.measurement.protocol import Protocol
    from autocompress.report.live import LiveObserver
    from autocompress.report.method_tables import distilled_table

    options["task.metric"] = options.pop("metric")
    with LiveObserver(err) as observer:
        found = api.distill(
            task, student, config=run_file, epochs=epochs, weights=student_weights, to=to, resume=resume,
            protocol=Protocol.standard(min_seconds=seconds, max_seconds=seconds), observer=observer, sets=sets,
            **options,
        )  # fmt: skip
    if as_json:
        echo(json.dumps(found.to_dict(), indent=2))
    else:
        out.print(distilled_table(found))
