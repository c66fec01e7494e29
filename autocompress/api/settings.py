"""What a call of the Python face was told: settings from a run file, options and overrides, and the task they name."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.config import RunConfig, load_config
from autocompress.engines import ENGINES
from autocompress.errors import ConfigError, nearest
from autocompress.runs.trust import Trust, code_of, code_of_settings, code_of_task, trust_of

if TYPE_CHECKING:
    from autocompress.runs.directory import RunDirectory
    from autocompress.runs.observer import Observer
    from autocompress.tasks import Task
    from autocompress.tasks.user_calls import UserCalls


def resolve(
    task: Task | str | None,
    config: RunConfig | Path | str | None,
    out: Path | str | None,
    *,
    resume: bool,
    sets: Sequence[str],
    options: Mapping[str, Any],
) -> tuple[RunConfig, Path]:
    """Return the settings of a call, and the directory of its run.

    Args:
        task: A `Task`, or the name of one; laid over the run file.
        config: A run file, or its contents; None takes that of the run to resume, else defaults.
        out: The run's directory; None makes one of the task and the time.
        resume: Whether a run is gone on with.
        sets: ``"dotted.key=value"`` overrides.
        options: Keys of `RunConfig`, laid over the run file.

    Raises:
        ConfigError: A setting cannot be used, or nothing says which run to resume.
    """
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


def subject(
    task: Task | str | None,
    config: RunConfig | Path | str | None,
    observer: Observer | None,
    sets: Sequence[str],
    options: Mapping[str, Any],
) -> tuple[Task, RunConfig]:
    """Return the task and the settings of what needs no run, once all that was written is known to make sense.

    Raises:
        ConfigError: As `resolve` and `check`, or the task cannot be loaded.
    """
    from autocompress.tasks.checks import check_task

    resolved, _ = resolve(task, config, Path("unused"), resume=False, sets=sets, options=options)
    check(resolved)
    if observer is not None:
        observer.stage("Loading the task")
    found = loaded(task, resolved)
    # What needs no run scores nothing and trains nothing.
    for text in check_task(found, training=False, scored=False):
        if observer is not None:
            observer.warn(text)
    return found, resolved


def loaded(task: Task | str | None, config: RunConfig, calls: UserCalls | None = None) -> Task:
    """Return the task itself, or the one that its name or the settings say, measured as the settings say.

    From here on the user's code is called through the guard alone: see `tasks.guard`.

    Args:
        task: A `Task`, the name of one, or None.
        config: What the run file says.
        calls: Are told of every call of the user's code.
    """
    from autocompress.tasks import load_task, measured_by
    from autocompress.tasks.guard import guarded

    if task is None or isinstance(task, str):
        return guarded(load_task(config.task), calls)
    return guarded(measured_by(config.task.metric, task), calls)


def check_trusted(
    config: RunConfig,
    run: RunDirectory,
    task: Task | str | None,
    *,
    named: bool,
    said: tuple[Sequence[str], Mapping[str, Any]],
    trust: bool,
) -> None:
    """Refuse to run code that only the folder of a resumed run names.

    Args:
        config: What is about to be run.
        run: Its directory.
        task: As given: an object, or a name that stands for itself.
        named: Whether all of `config` is the caller's own.
        said: The caller's overrides and options: code that stands in one of them was named.
        trust: Whether everything is trusted.

    Raises:
        ConfigError: There is code that nobody named, and this user did not begin the run here.
    """
    if named:
        return
    known = trust_of(run.path, trust)
    words = " ".join([*said[0], *map(str, said[1].values())])
    wanted = code_of(config) if task is None or isinstance(task, str) else code_of_settings(config.engine_options)
    own = code_of_task(task) if isinstance(task, str) else ()
    spoken = [code for code in wanted if code in own or (code.partition(" ")[2] or code) in words]
    Trust(known.everything, known.code | {*spoken}).require(wanted, run.config_file)


def check(config: RunConfig) -> None:
    """Refuse what can be seen to be wrong before anything is loaded.

    Raises:
        ConfigError: The engine, the space, the importance, the calibration or a method of distillation is unknown.
    """
    from autocompress.compress.calibration import calibration
    from autocompress.recovery.distillation import check_distillation
    from autocompress.space.search_space import configured_space

    if config.engine not in ENGINES:
        raise ConfigError(f"Unknown engine {config.engine!r}.{nearest(config.engine, ENGINES)}")
    configured_space(config)
    calibration(config.quantization)
    check_distillation(config.recovery)
