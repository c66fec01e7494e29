"""The Python face: `search`, `open_run`, `benchmark` and the `Run` they give. The command line calls the same."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocompress.api import settings
from autocompress.api.ending import finish, with_kept
from autocompress.api.methods import distill as distill
from autocompress.api.methods import prune as prune
from autocompress.api.methods import quantize as quantize
from autocompress.api.run import Run, open_run
from autocompress.api.run_folder import emptied_unless_begun, owned_folder
from autocompress.config import RunConfig, TaskConfig
from autocompress.deploy.artifacts import example_inputs, resolve
from autocompress.deploy.verify import REFERENCE_NAME, read_reference
from autocompress.engines import ENGINES
from autocompress.engines.base import EngineFile, EngineOptions
from autocompress.errors import ConfigError, MissingDependencyError, UnavailableError
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.fingerprint import device_fingerprint
from autocompress.measurement.limits import RequestLimits
from autocompress.measurement.measure import Protocol
from autocompress.quantities import parse_duration
from autocompress.runs.deadline import Deadline
from autocompress.runs.directory import RunDirectory
from autocompress.runs.lock import owned
from autocompress.runs.records import Measurement
from autocompress.runs.trust import code_of, remember

if TYPE_CHECKING:
    from autocompress.deploy.build import Build
    from autocompress.deploy.remeasure import Remeasured
    from autocompress.exploration.sensitivity import Sensitivity
    from autocompress.prediction.profile import Profile
    from autocompress.runs.observer import Observer
    from autocompress.tasks import Task


def search(
    task: Task | str | None = None,
    *,
    config: RunConfig | Path | str | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    sets: Sequence[str] = (),
    trust: bool = False,
    **options: Any,
) -> Run:
    """Search for the best compression of a model within a latency budget, fine-tune it, and verify it.

    Args:
        task: A `Task`, or the name of one (``"digits"``, ``"package.module:factory"``).
        config: A run file, or its contents; `options` and `sets` are laid over it.
        out: Run directory; by default ``runs/<task>-<time>``.
        resume: Continue the run in `out` with the trials it has.
        observer: Receives progress.
        sets: ``"dotted.key=value"`` overrides.
        trust: Of a run to resume that was begun elsewhere: whether code that its own run file names may run. What is
            named here, in `task`, `config`, `sets` or `options`, is trusted; see `autocompress.runs.trust`.
        **options: Any key of `RunConfig`: ``engine="openvino", target_latency="0.5x", max_drop="1pp", timeout="25m"``.

    Returns:
        The run. Its `summary` holds the figures; `best.feasible` tells whether every limit was met. Where nothing could
        be built, the uncompressed model's own file is the best.

    Raises:
        ConfigError: An option, the data or the weights cannot be used.
        AutoCompressError: The search ended early, or test data could not be read; its `run` is the directory where
            what had been found is summarised, reported and ready to deploy.
        KeyboardInterrupt: As well, once what had been found is summarised and reported.
    """
    started = time.monotonic()
    from autocompress.exploration.session import SearchSession
    from autocompress.runs.observer import Observer
    from autocompress.tasks.checks import check_task
    from autocompress.tasks.user_calls import UserCalls

    observer = observer or Observer()
    resolved, path = settings.resolve(task, config, out, resume=resume, sets=sets, options=options)
    settings.check(resolved)
    limits = RequestLimits(
        Deadline.after(resolved.working_seconds, started), build_s=resolved.build_seconds, learns=True
    )  # fmt: skip
    calls = UserCalls(on_message=observer.warn)
    calls.limit(started, resolved.timeout_seconds)
    observer = calls.followed(observer)
    with owned_folder(path, named=out is not None, observer=observer) as path:
        run = RunDirectory.create(path, resume=resume)
        settings.check_trusted(
            resolved, run, task, named=config is not None or not resume, said=(sets, options), trust=trust
        )
        for damage in run.log().damaged:
            observer.warn(f"Left out: {damage}")
        if not resume:
            # Before anything else: a directory with something in it and no run file can be neither resumed nor taken.
            run.write_config(resolved)
        with EngineWorker(log_file=run.path / "worker.log", limits=limits) as worker, calls.watched():
            with emptied_unless_begun(run, fresh=not resume):
                remember(run.path, code_of(resolved))
                observer.stage("Loading the task")
                loaded = settings.loaded(task, resolved, calls)
                for text in check_task(loaded, training=resolved.recovery.enabled):
                    observer.warn(text)
                calls.leaves_out = True
                loaded_at = time.monotonic()
                session = SearchSession(loaded, resolved, run, worker, observer, started)
                session.evaluator.ledger.add("load", loaded_at - started)
            observer.opened(run.path)
            try:
                summary = finish(session)
            finally:
                session.evaluator.close()
        run.write("summary.json", summary)
        result = Run(run.path, loaded)
        try:
            result.report()
        except MissingDependencyError as error:
            observer.warn(str(error))
    if session.interrupted is not None:
        raise session.interrupted
    if session.failure is not None:
        raise with_kept(session.failure, run.path)
    return result


def benchmark(
    paths: Sequence[Path | str],
    *,
    engine: str | None = None,
    options: EngineOptions | None = None,
    protocol: Protocol | None = None,
    mode: str | None = None,
    streams: int | None = None,
    trust: bool = False,
) -> tuple[list[EngineFile], list[Measurement]]:
    """Time artefacts, deployed directories, engine files or ONNX files against the first one, interleaved.

    Args:
        paths: What to time; the first is the baseline of every ratio.
        engine: For bare ONNX files; OpenVINO by default.
        options: For bare files: dtype, threads, batch size.
        protocol: How long to measure.
        mode: ``"latency"``, one call at a time, or ``"throughput"``, samples a second of several streams side by side;
            what `protocol` says by default.
        streams: Calls in flight in throughput mode; by default as many as the processors hold.
        trust: Whether code that an artefact names may run; see `autocompress.runs.trust`.

    Raises:
        ConfigError: A path is no engine, the inputs of two files differ in shape, or the processors do not hold so many
            streams.
    """
    protocol = protocol or Protocol.standard()
    given: dict[str, Any] = {"mode": mode, "streams": streams}
    protocol = replace(protocol, **{key: value for key, value in given.items() if value is not None})
    files = [resolve(Path(p), engine, options or EngineOptions(), trust) for p in paths]
    with EngineWorker() as worker:
        return files, worker.measure(files, _inputs_of(files[0]), protocol)


def measure(
    run: Path | str | Run,
    trials: Sequence[int] | None = None,
    *,
    protocol: Protocol | None = None,
    observer: Observer | None = None,
    trust: bool = False,
) -> list[Remeasured]:
    """Measure a run's front on this machine, and rank the run anew: one that was searched elsewhere, or predicted.

    Engine files that do not open here are built again from their ONNX files. What was measured on another device no
    longer counts: the front, the best result and the report are of what is measured here.

    Args:
        run: A run or its directory.
        trials: Which; None takes the front and the best.
        protocol: How long to measure.
        observer: Is told of progress.
        trust: Whether code that the run names may run; see `autocompress.runs.trust`.

    Raises:
        ConfigError: There is no such run or trial.
        UnavailableError: The engine or its device is not here.
        EngineError: The baseline does not run here.
        NoFeasibleTrialError: No trial could be measured.
    """
    from autocompress.deploy.remeasure import measure_run
    from autocompress.report.html import write_report

    directory = run.directory if isinstance(run, Run) else RunDirectory.open(run)
    if observer is not None:
        observer.stage("Measuring")
    with owned(directory.path):
        found = measure_run(
            directory, trials, protocol=protocol, progress=observer.progress if observer is not None else _silent,
            trust=trust,
        )  # fmt: skip
        write_report(directory)
    return found


def _silent(fraction: float, text: str) -> None:
    """Tell nobody."""


def build(
    source: Path | str | Run,
    engine: str,
    to: Path | str,
    *,
    dtype: str | None = None,
    batch_size: int = 1,
    settings: Mapping[str, Any] | None = None,
    trials: Sequence[int] | None = None,
    trust: bool = False,
) -> list[Build]:
    """Build engines without running them: of an ONNX file, or of models of a run for another engine than the run's.

    With ``settings={"compute_capability": "8.9"}`` TensorRT-RTX builds for a GPU that is not here. Nothing is measured.

    Args:
        source: An ONNX file, a run, or its directory.
        engine: What to build for.
        to: New or empty directory. A run's models go into ``trial-00042`` inside it.
        dtype: Of layers without Q/DQ; by default fp16 for TensorRT, else fp32.
        batch_size: Samples of one call.
        settings: The engine's own options (``engine_options`` of the run file).
        trials: Of a run; None takes the best.
        trust: Whether the module of a run's task may be imported; see `autocompress.runs.trust`.

    Raises:
        ConfigError: The source or an option cannot be used.
        UnavailableError: The engine is not installed, or needs a device that is not here.
        EngineError: An ONNX file cannot be built. A run's model that cannot is returned with its error.
    """
    from autocompress.deploy import build as deploy_build

    given = tuple((settings or {}).items())
    options = deploy_build.with_default_dtype(EngineOptions("fp32", 1, batch_size, given), engine, dtype)
    if not isinstance(source, Run) and Path(source).is_file():
        return [deploy_build.build_onnx(Path(source), engine, options, Path(to))]
    run = source if isinstance(source, Run) else open_run(source, trust=trust)
    numbers = [run.best.number] if trials is None else list(trials)
    return deploy_build.build_trials(run.directory, run.task, numbers, engine=engine, options=options, to=Path(to))


def _inputs_of(file: EngineFile) -> np.ndarray:
    reference = file.path.parent / REFERENCE_NAME
    if reference.exists():
        return read_reference(reference)[0]
    return example_inputs(file)


def profile(
    task: Task | str | None = None,
    *,
    config: RunConfig | Path | str | None = None,
    budget: str = "8m",
    networks: int | None = None,
    folder: Path | str | None = None,
    observer: Observer | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> Profile:
    """Build or extend the latency table of a model's search space on this device and engine.

    Args:
        task: A `Task`, or the name of one. Its model is used, its data is not.
        config: A run file, or its contents: engine, threads, batch size, space; `options` and `sets` are laid over it.
        budget: Time to spend, such as ``"8m"``.
        networks: Stop as soon as the table holds this many forms of this model.
        folder: Of all tables; by default the one in the user's cache, where a search finds it.
        observer: Receives progress.
        sets: ``"dotted.key=value"`` overrides.
        **options: Any key of `RunConfig`.

    Raises:
        ConfigError: An option cannot be used, or the table cannot be read or written.
        EngineError: The model cannot be built or measured.
    """
    from autocompress.evaluation import profiler

    seconds = parse_duration(budget, "budget")
    loaded, resolved = settings.subject(task, config, observer, sets, options)
    name = " ".join(part for part in (loaded.name, resolved.task.model) if part)
    return profiler.profile(
        loaded, resolved, seconds=seconds, networks=networks,
        folder=None if folder is None else Path(folder), observer=observer, name=name,
    )  # fmt: skip


def open_profile(
    task: Task | str | None = None,
    *,
    config: RunConfig | Path | str | None = None,
    folder: Path | str | None = None,
    observer: Observer | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> Profile:
    """Return what the latency table of this device knows of a model; nothing is measured. Arguments as of `profile`.

    Raises:
        ConfigError: There is no table, or it is damaged, or knows nothing of this model.
    """
    from autocompress.evaluation import profiler

    loaded, resolved = settings.subject(task, config, observer, sets, options)
    return profiler.known_profile(loaded, resolved, None if folder is None else Path(folder))


def sensitivity(
    task: Task | str | None = None,
    *,
    config: RunConfig | Path | str | None = None,
    observer: Observer | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> Sensitivity:
    """Measure what each choice of the search space does to the model's outputs, on its own and without labels.

    Args:
        task: A `Task`, or the name of one.
        config: A run file, or its contents; `options` and `sets` are laid over it.
        observer: Receives progress.
        sets: ``"dotted.key=value"`` overrides.
        **options: Any key of `RunConfig`.

    Raises:
        ConfigError: An option cannot be used, or no choice moves the outputs.
    """
    from autocompress.exploration.sensitivity import of_task

    loaded, resolved = settings.subject(task, config, observer, sets, options)
    if observer is not None:
        observer.stage("Measuring what each choice costs in accuracy")
    found = of_task(loaded, resolved, observer.progress if observer is not None else _silent)
    if found.note is not None:
        raise ConfigError(
            f"Nothing is known of the choices of task {loaded.name!r}: {found.note}. Check that its model is trained, "
            "and its calibration data."
        )
    return found


def inspect(task: Task) -> dict[str, Any]:
    """Return a task's inventory as plain data: layers, groups, blocks, what is skipped and why, MACs and parameters.

    ``time_shares`` holds the share of one sample's time in PyTorch, in [0, 1], of each layer that is skipped, whole or
    in part; an engine's may be another.
    """
    from autocompress.compress import rewrite
    from autocompress.model.inventory import take_inventory
    from autocompress.model.module_times import time_shares

    base = rewrite(task.network())
    found = take_inventory(base, task.example_inputs(2))
    names = {*found.whole_left_alone, *found.axes_left_alone}
    return {**found.to_dict(), "time_shares": time_shares(base, task.example_inputs(1), names)}


def task_from(config: TaskConfig) -> Task:
    """Load a task by its configuration, guarded; see `autocompress.tasks.load_task`."""
    from autocompress.tasks import load_task
    from autocompress.tasks.guard import guarded

    return guarded(load_task(config))


def devices() -> dict[str, Any]:
    """Return the device's fingerprint and, for every engine, its version, device and dtypes, or why it cannot run."""
    found: dict[str, Any] = {}
    with EngineWorker() as worker:
        for name in ENGINES:
            try:
                found[name] = worker.describe(name)
            except UnavailableError as error:
                found[name] = {"name": name, "error": str(error)}
    return {"device": device_fingerprint(), "engines": found}
