"""How a search still ends that an error or a signal ended: with the best it had found, and an error that says where."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autocompress.errors import AutoCompressError, MismatchError, in_a_line
from autocompress.runs.observer import Observer

if TYPE_CHECKING:
    from autocompress.exploration.session import SearchSession
    from autocompress.runs.records import TrialRecord


def best_of(session: SearchSession) -> TrialRecord:
    """Return a search's result, or the best it had found when an error or a signal ended it, which is noted.

    Hours of somebody's compute are summarised and reported whatever happens.

    Raises:
        AutoCompressError, KeyboardInterrupt: Not even the baseline was measured, or the directory is of other settings.
    """
    try:
        return session.execute()
    except KeyboardInterrupt as error:
        best = session.best_so_far()
        if best is None:
            raise
        session.interrupted = error
        session.lost.append("The rest of the search and the figures on test data: it was interrupted")
        # The one there was may raise once more what it has not seen raised; a second signal still ends all at once.
        session.observer = Observer()
        return best
    except MismatchError:
        # What is in the directory was found with other settings: nothing of it is written anew.
        raise
    except Exception as error:
        best = session.best_so_far()
        if best is None:
            raise
        session.failure = error
        session.lost.append(f"The rest of the search: {in_a_line(error)}")
        session.observer.warn(f"The search ends early: {in_a_line(error)}")
        return best


def with_kept(error: Exception, path: Path) -> Exception:
    """Return an error that also says what of the run is on disk."""
    if not isinstance(error, AutoCompressError):
        return error
    said = type(error)(
        f"{error} What the search had found is kept: {path}/best, summary.json and report.html say what is missing."
    )
    said.run, said.__cause__ = path, error
    return said
