"""The Optuna study of a run: created, or loaded and checked to be the same search, and to tell what the log tells."""

from __future__ import annotations

import itertools
import json
import logging
import sqlite3
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import optuna

from autocompress.config import RunConfig
from autocompress.documents import validated
from autocompress.errors import ConfigError, StudyMismatchError
from autocompress.exploration.samplers import SamplerPrior, make_sampler
from autocompress.exploration.study_log import disagreement, first_records
from autocompress.files import read_json
from autocompress.runs.directory import RunDirectory

_NAME = "autocompress"
_IDENTITY = "identity"
_IDENTITY_FILE = "identity.json"


def open_study(
    run: RunDirectory, config: RunConfig, identity: Mapping[str, Any], knowledge: SamplerPrior | None = None,
    on_message: Callable[[str], None] = lambda text: None,
) -> optuna.Study:  # fmt: skip
    """Create the study of a run, or load the one it has.

    The log of the run is the truth: a database that is damaged, or tells something else, is set aside, and a new one
    made. `TrialLoop` tells it the trials of the log, and goes on with those that a dead process left running.

    Args:
        run: Its directory.
        config: Sampler, seed and limits.
        identity: What must be the same for old trials to be worth anything: task, engine, space, seed.
        knowledge: What the knapsack sampler is told.
        on_message: Called with what was set aside, and why.

    Raises:
        StudyMismatchError: The stored study was made with something else; lists what.
        ConfigError: The database is in use, or cannot be read or written.
    """
    identity = {**identity, "objectives": "accuracy" if _single(config) else "accuracy, latency ratio"}
    if run.study_file.exists() and (found := damage(run)) is not None:
        aside = set_aside(run)
        on_message(
            f"The study {run.study_file.name} {found}: it is set aside as {aside.name}, and made anew of the log."
        )
    _compare_with_log(run, identity)
    study = _opened(run, config, identity, knowledge)
    run.write(_IDENTITY_FILE, identity)
    return study


def _single(config: RunConfig) -> bool:
    return config.latency_limit is not None or config.size_limit is not None


def damage(run: RunDirectory) -> str | None:
    """Return what is wrong with a run's database, going by the log; None where it is sound."""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(run.study_file))}?mode=ro", uri=True)) as database:
            state = database.execute("PRAGMA quick_check").fetchone()[0]
        if state != "ok":
            return f"is damaged ({state})"
    except sqlite3.OperationalError:
        return None  # locked, or not to be read: opening it says so
    except sqlite3.DatabaseError as error:
        return f"is damaged ({error})"
    try:
        trials = load_study(run).get_trials(deepcopy=False)
    except ConfigError:
        return "is not the study of a run, or is of another version of Optuna"
    found = disagreement(trials, first_records(run.history()))
    return None if found is None else f"tells something else than the log ({found})"


def set_aside(run: RunDirectory) -> Path:
    """Give a run's database another name, and return it."""
    for number in itertools.count(1):
        aside = run.study_file.with_name(f"{run.study_file.name}.damaged-{number}")
        if not aside.exists():
            run.study_file.replace(aside)
            return aside
    raise AssertionError  # an endless loop ends by returning


def _compare_with_log(run: RunDirectory, identity: Mapping[str, Any]) -> None:
    """Check a run whose database is gone: what its log was made with is in a file of its own."""
    stored = run.path / _IDENTITY_FILE
    if not run.study_file.exists() and stored.exists() and run.history():
        _compare(validated(dict[str, Any], read_json(stored), stored), json.loads(json.dumps(identity)), run)


def _opened(
    run: RunDirectory, config: RunConfig, identity: Mapping[str, Any], knowledge: SamplerPrior | None
) -> optuna.Study:
    _quiet()
    directions: list[Literal["maximize", "minimize"]] = ["maximize"] if _single(config) else ["maximize", "minimize"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                storage=_url(run),
                study_name=_NAME,
                load_if_exists=True,
                directions=directions,
                sampler=make_sampler(config.sampler, config.seed, config.n_trials, knowledge),
            )
            # A resumed sampler must not draw again what it drew before: only known networks would follow.
            drawn = max([len(study.trials), *(number + 1 for number in first_records(run.history()))])
            seed = config.seed + (0 if knowledge is not None else drawn)
            study.sampler = make_sampler(config.sampler, seed, config.n_trials, knowledge)
        stored = study.user_attrs.get(_IDENTITY)
        if stored is None:
            study.set_user_attr(_IDENTITY, identity)
        else:
            _compare(stored, identity, run)
    except (StudyMismatchError, ConfigError):
        raise
    except Exception as error:  # SQLAlchemy's own tree, and whatever Optuna raises over a foreign database
        raise _damaged(run, error) from error
    return study


def load_study(run: RunDirectory) -> optuna.Study:
    """Load the study of a finished or interrupted run, to look at.

    Raises:
        ConfigError: The run has none.
    """
    if not run.study_file.exists():
        raise ConfigError(f"{run.path} has no study yet.")
    _quiet()
    try:
        return optuna.load_study(study_name=_NAME, storage=_url(run))
    except Exception as error:  # as above
        raise _damaged(run, error) from error


def _quiet() -> None:
    """Keep libraries from printing what is raised as well: of a signal SQLAlchemy prints a traceback on its way."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("sqlalchemy").setLevel(logging.CRITICAL)


def _url(run: RunDirectory) -> str:
    """Return the address of a run's database, whatever characters its path has.

    The path is given relative to nothing and percent-encoded by SQLAlchemy, which reads ``?``, ``#`` and ``%`` in a
    plain text as its own.
    """
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=str(run.study_file)).render_as_string(hide_password=False)


def _damaged(run: RunDirectory, error: BaseException) -> ConfigError:
    """Say in our words what is wrong with a database; the library's are in `error`."""
    file = run.study_file
    causes = " ".join(str(one) for one in (error, error.__cause__, error.__context__) if one is not None).lower()
    if "locked" in causes:
        said, mend = "is locked by another process", "End the other search of this run, then --resume."
    elif any(word in causes for word in ("readonly", "read-only", "unable to open", "permission")):
        said, mend = "cannot be opened for writing", "Check who may write it, or copy the run somewhere else."
    elif "disk is full" in causes or "disk i/o" in causes:
        said, mend = "cannot be written", "Free some space; --resume goes on from here."
    elif "malformed" in causes or "not a database" in causes:
        said = "is damaged"
        mend = "Its trials are in trials.jsonl too. Take another copy of the run, or search anew with another --out."
    else:
        said = "is not the study of a run, or is of another version of Optuna"
        mend = "Take another copy of the run, or search anew with another --out."
    return ConfigError(f"The study {file} cannot be opened: it {said}. {mend}")


def _compare(stored: Mapping[str, Any], found: Mapping[str, Any], run: RunDirectory) -> None:
    differences = [
        f"{key}: {stored.get(key)!r} in the run, {found.get(key)!r} now"
        for key in sorted({*stored, *found})
        if stored.get(key) != found.get(key)
    ]
    if differences:
        raise StudyMismatchError(
            f"The run in {run.path} was made with other settings, so its trials cannot be continued: "
            f"{'; '.join(differences)}. Give the same settings, or another --out."
        )
