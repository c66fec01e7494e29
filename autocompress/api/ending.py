"""How a search still ends that an error or a signal ended: with the best it had found, and an error that says where."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.deploy.summary import summarize
from autocompress.errors import AutoCompressError, MismatchError, in_a_line
from autocompress.runs.observer import Observer

if TYPE_CHECKING:
    from autocompress.exploration.session import SearchSession
    from autocompress.runs.records import TrialRecord


def finish(session: SearchSession) -> dict[str, Any]:
    """Search, and return the run's summary; of a search that an error or a signal ended, with the best it had found.

    Hours of somebody's compute are summarised and reported whatever happens. What ended it is in the session's
    `failure` or `interrupted`.

    Raises:
        AutoCompressError, KeyboardInterrupt: Not even the baseline was measured, or the directory is of other settings;
            or a second signal came.
    """
    best = _best_of(session)
    if session.interrupted is None:
        try:
            return summarize(session, best)
        except KeyboardInterrupt as error:
            _interrupted(session, error)
    return summarize(session, best)


def _best_of(session: SearchSession) -> TrialRecord:
    try:
        return session.execute()
    except KeyboardInterrupt as error:
        best = session.best_so_far()
        if best is None:
            raise
        _interrupted(session, error)
        return best
    except MismatchError:
        # What is in the directory was found with other settings: nothing of it is written anew.
        raise
    except Exception as error:  # whatever it is, it is raised once what was found is summarised
        best = session.best_so_far()
        if best is None:
            raise
        session.failure = error
        session.lost.append(f"The rest of the search: {in_a_line(error)}")
        session.observer.warn(f"The search ends early: {in_a_line(error)}")
        return best


def _interrupted(session: SearchSession, error: KeyboardInterrupt) -> None:
    session.interrupted = error
    session.lost.append("What was left of the search, and the figures on test data: it was interrupted")
    # The one there was may raise once more what it has not seen raised; a second signal still ends all at once.
    session.observer = Observer()


def with_kept(error: Exception, path: Path) -> Exception:
    """Return an error that also says what of the run is on disk."""
    if not isinstance(error, AutoCompressError):
        return error
    said = type(error)(
        f"{error} What the search had found is kept: {path}/best, summary.json and report.html say what is missing."
    )
    said.run, said.__cause__ = path, error
    return said
