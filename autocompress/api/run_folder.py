"""The directory of a search, from before it begins: owned by one process, and empty again where it could not begin."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from autocompress.errors import ConfigError, UnavailableError
from autocompress.runs.directory import RunDirectory
from autocompress.runs.lock import RunInUseError, is_lock, owned
from autocompress.runs.observer import Observer


@contextmanager
def owned_folder(path: Path, *, named: bool, observer: Observer) -> Iterator[Path]:
    """Own a run's directory; where the user named none and another search has taken this one, the next that is free."""
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        if not named and folder.exists():
            continue
        with ExitStack() as stack:
            try:
                died = stack.enter_context(owned(folder))
            except RunInUseError:
                if named:
                    raise
                continue
            if died is not None:
                observer.warn(f"{folder} belonged to {died}, which has ended without giving it back; it is taken over.")
            yield folder
            return


@contextmanager
def emptied_unless_begun(run: RunDirectory, *, fresh: bool) -> Iterator[None]:
    """Remove what a new run has written when it cannot begin, so that the corrected command finds --out empty."""
    try:
        yield
    except (ConfigError, UnavailableError):
        for entry in run.path.iterdir() if fresh else ():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif not is_lock(entry):
                entry.unlink(missing_ok=True)
        raise
