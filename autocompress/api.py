"""The Python face: `search`, `open_run`, `benchmark` and the `Run` they give. The command line calls the same."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autocompress.config import RunConfig, TaskConfig, load_config
from autocompress.deploy.artifacts import input_shape, resolve
from autocompress.deploy.manifest import Manifest
from autocompress.deploy.package import deploy
from autocompress.deploy.summary import summarize
from autocompress.deploy.verify import REFERENCE_NAME, read_reference
from autocompress.engines import ENGINES
from autocompress.engines.base import EngineFile, EngineOptions
from autocompress.errors import ConfigError, MissingDependencyError, NoFeasibleTrialError, UnavailableError, nearest
from autocompress.latency.fingerprint import device_fingerprint
from autocompress.latency.measure import Protocol
from autocompress.report.html import write_report
from autocompress.results import Measurement, TrialRecord, read_json
from autocompress.run_directory import RunDirectory
from autocompress.units import parse_duration
from autocompress.worker import EngineWorker

if TYPE_CHECKING:
    import optuna
    import pandas as pd
    from torch import nn

    from autocompress.search.observer import Observer
    from autocompress.search.profiling import Profile
    from autocompress.tasks import Task


class Run:
    """A search's results on disk.

    Args:
        path: The run directory.
        task: The task it ran on; None loads the one its run file names when it is needed.
    """

    def __init__(self, path: Path | str, task: Task | None = None) -> None:
        self.directory = RunDirectory.open(path)
        self._task = task

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory.path

    @property
    def summary(self) -> dict[str, Any]:
        """The document of ``search --json``.

        Raises:
            ConfigError: The run has not finished.
        """
        found: dict[str, Any] = self.directory.read("summary.json")
        return found

    @property
    def records(self) -> list[TrialRecord]:
        """The latest record of every trial, by number."""
        return [record for _, record in sorted(self.directory.records().items())]

    @property
    def best(self) -> TrialRecord:
        """The result offered.

        Raises:
            ConfigError: No trial has finished yet.
        """
        return TrialRecord.from_dict(read_json(self.directory.best / "record.json"))

    @property
    def front(self) -> pd.DataFrame:
        """The Pareto front, fastest first.

        One row per trial: ``trial, stage, accuracy`` (validation), ``latency_ms, latency_ratio, size_bytes, macs,
        params, policy`` (the `CompressionPolicy`).
        """
        import pandas as pd

        from autocompress.search.pareto import pareto_front

        rows = [
            {
                "trial": r.number, "stage": r.stage, "accuracy": r.accuracy, "latency_ms": r.latency_ms,
                "latency_ratio": r.measurement.ratio if r.measurement else None, "size_bytes": r.size_bytes,
                "macs": r.macs, "params": r.params, "policy": r.policy,
            }
            for r in pareto_front(self.records)
        ]  # fmt: skip
        columns = [
            "trial",
            "stage",
            "accuracy",
            "latency_ms",
            "latency_ratio",
            "size_bytes",
            "macs",
            "params",
            "policy",
        ]
        return pd.DataFrame(rows, columns=columns)

    @property
    def study(self) -> optuna.Study:
        """The Optuna study, for its own plots and tools."""
        from autocompress.search.study import load_study

        return load_study(self.directory)

    def deploy(self, to: Path | str, trial: int | None = None) -> Manifest:
        """Package the best result, or one trial, into `to`; see `autocompress.deploy.package.deploy`.

        Raises:
            ConfigError: Nothing to deploy, or `to` holds something.
            VerificationError: The copy is not what was measured, or is slower than the baseline.
        """
        return deploy(self.directory, Path(to), trial, device=device_fingerprint())

    def load_model(self, trial: int | None = None) -> nn.Module:
        """Return the compressed `nn.Module` of the best result or of one trial, rebuilt from policy and weights.

        It is in eval mode, simulates int8 where the policy says so, and can be trained on.

        Raises:
            ConfigError: There is no such trial, or its files are gone.
        """
        from autocompress.pipeline import load_compressed

        folder = self.directory.best
        if trial is not None:
            folder = self.directory.artifact(trial, recovered=True)
            if not (folder / "record.json").exists():
                folder = self.directory.artifact(trial)
        if not (folder / "record.json").exists():
            numbers = ", ".join(str(r.number) for r in self.records if r.state == "complete") or "none"
            raise ConfigError(f"{self.path} has no model of trial {trial}. Finished trials: {numbers}.")
        record = TrialRecord.from_dict(read_json(folder / "record.json"))
        return load_compressed(self._load_task(), folder, record)

    def report(self) -> Path:
        """Write ``report.html`` and return its path."""
        return write_report(self.directory)

    def _load_task(self) -> Task:
        if self._task is None:
            from autocompress.tasks import load_task

            try:
                self._task = load_task(self.directory.config().task)
            except ConfigError as error:
                raise ConfigError(
                    f"The task of {self.path} cannot be loaded ({error}). If the search was given a Task object, "
                    "open the run with it: open_run(path, task)."
                ) from error
        return self._task


def open_run(path: Path | str, task: Task | None = None) -> Run:
    """Open the directory of a finished or interrupted search.

    Raises:
        ConfigError: There is no run there.
    """
    return Run(path, task)


def search(
    task: Task | str | None = None,
    *,
    config: RunConfig | Path | str | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    sets: Sequence[str] = (),
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
        **options: Any key of `RunConfig`: ``engine="openvino", target_latency="0.5x", max_drop="1pp", timeout="25m"``.

    Returns:
        The run. Its `summary` holds the figures; `best.feasible` tells whether every limit was met.

    Raises:
        NoFeasibleTrialError: Nothing could be measured at all.
        ConfigError: An option, the data or the weights cannot be used.
    """
    started = time.monotonic()
    from autocompress.search.observer import Observer
    from autocompress.search.session import SearchSession
    from autocompress.search.space import load_space
    from autocompress.tasks import load_task

    observer = observer or Observer()
    resolved, path = _resolve(task, config, out, resume=resume, sets=sets, options=options)
    if resolved.engine not in ENGINES:
        raise ConfigError(f"Unknown engine {resolved.engine!r}.{nearest(resolved.engine, ENGINES)}")
    load_space(resolved.space)
    run = RunDirectory.create(path, resume=resume)
    with EngineWorker(log_file=run.path / "worker.log") as worker:
        with _not_begun(run, fresh=not resume):
            if not resume:
                run.write_config(resolved)
            observer.stage("Loading the task")
            loaded = load_task(resolved.task) if task is None or isinstance(task, str) else task
            loaded_at = time.monotonic()
            session = SearchSession(loaded, resolved, run, worker, observer, started)
            session.pipeline.ledger.add("load", loaded_at - started)
        observer.opened(run.path)
        try:
            best = session.execute()
            if best is None:
                raise NoFeasibleTrialError(_nothing(run))
            summary = summarize(session, best)
        finally:
            session.pipeline.close()
    run.write("summary.json", summary)
    result = Run(run.path, loaded)
    try:
        result.report()
    except MissingDependencyError as error:
        observer.warn(str(error))
    return result


@contextmanager
def _not_begun(run: RunDirectory, *, fresh: bool) -> Iterator[None]:
    """Remove a new run's directory when the run cannot begin, so that the corrected command finds --out empty."""
    try:
        yield
    except (ConfigError, UnavailableError):
        if fresh:
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def _resolve(
    task: Task | str | None,
    config: RunConfig | Path | str | None,
    out: Path | str | None,
    *,
    resume: bool,
    sets: Sequence[str],
    options: Mapping[str, Any],
) -> tuple[RunConfig, Path]:
    overrides: dict[str, Any] = dict(options)
    if isinstance(task, str):
        overrides["task.name"] = task
    elif task is not None:
        overrides["task.name"] = task.name
    if resume and out is None:
        raise ConfigError("--resume needs --out, the directory of the run to continue.")
    if isinstance(config, RunConfig):
        base: Mapping[str, Any] | None = config.model_dump()
        file = None
    else:
        file = None if config is None else Path(config)
        # A resumed run remembers its run file; options given now are laid over it.
        stored = Path(out) / "config.yaml" if resume and out is not None else None
        if file is None and stored is not None and stored.exists():
            file = stored
        base = None
    resolved = load_config(file, {**(base or {}), **overrides}, sets)
    if out is None:
        name = resolved.task.name.replace(":", "-").replace("/", "-")
        parts = [name, resolved.task.model, time.strftime("%Y%m%d-%H%M%S")]
        out = Path("runs") / "-".join(p for p in parts if p)
    return resolved, Path(out)


def _nothing(run: RunDirectory) -> str:
    failed = [r for r in run.records().values() if r.state == "failed"]
    last = f" The last failure: {failed[-1].error}" if failed else " The timeout left no time for a single trial."
    return f"No candidate could be built and measured ({len(failed)} failed).{last} Everything is kept in {run.path}."


def benchmark(
    paths: Sequence[Path | str],
    *,
    engine: str | None = None,
    options: EngineOptions | None = None,
    protocol: Protocol | None = None,
    mode: str | None = None,
    streams: int | None = None,
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

    Raises:
        ConfigError: A path is no engine, the inputs of two files differ in shape, or the processors do not hold so many
            streams.
    """
    protocol = protocol or Protocol()
    given: dict[str, Any] = {"mode": mode, "streams": streams}
    protocol = replace(protocol, **{key: value for key, value in given.items() if value is not None})
    files = [resolve(Path(p), engine, options or EngineOptions()) for p in paths]
    with EngineWorker() as worker:
        return files, worker.measure(files, _inputs_of(files[0]), protocol)


def _inputs_of(file: EngineFile) -> np.ndarray:
    reference = file.path.parent / REFERENCE_NAME
    if reference.exists():
        return read_reference(reference)[0]
    return np.random.default_rng(0).standard_normal(input_shape(file), np.float32)


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
    from autocompress.search import profiling
    from autocompress.search.space import load_space
    from autocompress.tasks import load_task

    resolved, _ = _resolve(task, config, Path("unused"), resume=False, sets=sets, options=options)
    if resolved.engine not in ENGINES:
        raise ConfigError(f"Unknown engine {resolved.engine!r}.{nearest(resolved.engine, ENGINES)}")
    load_space(resolved.space)
    seconds = parse_duration(budget, "budget")
    if observer is not None:
        observer.stage("Loading the task")
    loaded = load_task(resolved.task) if task is None or isinstance(task, str) else task
    name = " ".join(part for part in (loaded.name, resolved.task.model) if part)
    return profiling.profile(
        loaded, resolved, seconds=seconds, networks=networks, folder=None if folder is None else Path(folder),
        observer=observer, name=name,
    )  # fmt: skip


def inspect(task: Task) -> dict[str, Any]:
    """Return a task's inventory as plain data: layers, groups, blocks, what is skipped and why, MACs and parameters."""
    from dataclasses import asdict

    from autocompress.compress import rewrite
    from autocompress.inventory import take_inventory

    inventory = take_inventory(rewrite(task.model()), task.example_inputs(2))
    return asdict(inventory)


def task_from(config: TaskConfig) -> Task:
    """Load a task by its configuration; see `autocompress.tasks.load_task`."""
    from autocompress.tasks import load_task

    return load_task(config)


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
