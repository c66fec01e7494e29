"""The Optuna study of a run: created, or loaded and checked to be the same search."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import optuna

from autocompress.config import RunConfig
from autocompress.errors import ConfigError, StudyMismatchError
from autocompress.exploration.samplers import SamplerPrior, make_sampler
from autocompress.runs.directory import RunDirectory

_NAME = "autocompress"
_IDENTITY = "identity"


def open_study(
    run: RunDirectory, config: RunConfig, identity: Mapping[str, Any], knowledge: SamplerPrior | None = None
) -> optuna.Study:
    """Create the study of a run, or load the one it has; trials that a dead process left running are failed.

    Args:
        run: Its directory.
        config: Sampler, seed and limits.
        identity: What must be the same for old trials to be worth anything: task, engine, space, seed.
        knowledge: What the knapsack sampler is told.

    Raises:
        StudyMismatchError: The stored study was made with something else; lists what.
        ConfigError: The database cannot be read or written.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    single = config.latency_limit is not None or config.size_limit is not None
    directions: list[Literal["maximize", "minimize"]] = ["maximize"] if single else ["maximize", "minimize"]
    identity = {**identity, "objectives": "accuracy" if single else "accuracy, latency ratio"}
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
            seed = config.seed + (0 if knowledge is not None else len(study.trials))
            study.sampler = make_sampler(config.sampler, seed, config.n_trials, knowledge)
        stored = study.user_attrs.get(_IDENTITY)
        if stored is None:
            study.set_user_attr(_IDENTITY, identity)
        else:
            _compare(stored, identity, run)
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
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
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        return optuna.load_study(study_name=_NAME, storage=_url(run))
    except Exception as error:  # as above
        raise _damaged(run, error) from error


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
