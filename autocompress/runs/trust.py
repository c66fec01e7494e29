"""Whose code runs when a folder is opened: only code that its reader named, or a run that this user began here.

A run, an artefact and a deployed directory may name code: the module of a task, libraries of plugins, an engine that
carries its own runtime. Opening a folder runs none of it unless

- the reader names the code again (``--task``, a run file of their own, a `Task` object), or
- this user began the run on this machine, in this place, with this code: noted in the cache directory (`remember`), or
- the reader says ``--trust`` (``trust=True`` in Python).

Who owns the files proves nothing: whoever unpacks somebody's archive owns what was in it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from autocompress.config import RunConfig
from autocompress.documents import validated
from autocompress.environment import cache_directory
from autocompress.errors import AutoCompressError, ConfigError
from autocompress.files import read_json, write_json

# Tasks of these prefixes are code of ours, which builds networks by name and reads weights as data.
_OURS = ("torchvision", "timm", "transformers")
# How deep below a run its artefacts lie: artifacts/trial-00042/recovered.
_DEPTH = 4


class _Note(TypedDict):
    run: str
    code: list[str]


@dataclass(frozen=True)
class Trust:
    """Which code a folder may name.

    Attributes:
        everything: Whatever it names.
        code: What the reader named, or began the run with.
    """

    everything: bool = False
    code: frozenset[str] = frozenset()

    def require(self, code: Iterable[str], source: object) -> None:
        """Refuse code that is not trusted.

        Raises:
            ConfigError: There is some; names it, and how to allow it.
        """
        unknown = [] if self.everything else [one for one in code if one not in self.code]
        if unknown:
            raise ConfigError(
                f"{source} names code that would run here: {', '.join(map(repr, unknown))}. Nothing of it was run. If "
                "you know who wrote it, say --trust (trust=True), or name the code yourself, as with --task."
            )


NOBODY, EVERYBODY = Trust(), Trust(everything=True)


def code_of_settings(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the code that an engine's settings name: libraries to load, and a runtime inside the engine file."""
    plugins = settings.get("plugins") or ()
    listed = plugins.split(",") if isinstance(plugins, str) else plugins if isinstance(plugins, list | tuple) else ()
    own = ("version_compatible",) if settings.get("version_compatible") else ()
    return (*(f"plugin {str(one).strip()}" for one in listed), *own)


def code_of_task(name: str) -> tuple[str, ...]:
    """Return the module that a task's name has imported; none where the task is one of ours."""
    prefix, separator, _ = name.partition(":")
    return (f"task {name}",) if separator and prefix not in _OURS else ()


def code_of(config: RunConfig) -> tuple[str, ...]:
    """Return the code that a run file names."""
    return (*code_of_task(config.task.name), *code_of_settings(config.engine_options))


def remember(run: Path, code: Iterable[str]) -> None:
    """Note that this user began a run here with this code, so that it goes on without being asked again."""
    listed = sorted({*code, *_noted(run)})
    if not listed:
        return
    try:
        write_json(_note(run), {"run": os.path.realpath(run), "code": listed})
    except AutoCompressError:
        # The cache is a convenience: without the note, the code is named again.
        return


def trust_of(folder: Path, trust: bool | Trust = False) -> Trust:
    """Return what is trusted of a folder: everything where `trust` says so, else what this user began it with.

    Args:
        folder: A run, or an artefact inside one.
        trust: Of the reader.
    """
    if isinstance(trust, Trust):
        return trust
    if trust:
        return EVERYBODY
    real = Path(os.path.realpath(folder))
    return Trust(code=frozenset(code for place in (real, *real.parents[:_DEPTH]) for code in _noted(place)))


def _note(run: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(os.path.realpath(run))).hexdigest()
    return cache_directory() / "trusted_runs" / f"{digest[:32]}.json"


def _noted(run: Path) -> tuple[str, ...]:
    path = _note(run)
    if not path.exists():
        return ()
    try:
        return tuple(validated(_Note, read_json(path), path)["code"])
    except AutoCompressError:
        return ()
