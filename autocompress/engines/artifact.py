"""An engine file on disk with its JSON companions: what it takes to open it, and the hashes of its files.

An artefact is whole when it has a ``record.json``: that is written last, when all else has reached the disk, and from
then on only measurements are added to it. Another attempt at the same network is another folder.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autocompress.documents import PlainName, Sha256, validated
from autocompress.engines.base import EngineFile, EngineOptions
from autocompress.errors import ConfigError, VerificationError
from autocompress.files import read_json, sync_folder, write_json
from autocompress.runs.records import TrialRecord
from autocompress.runs.trust import NOBODY, Trust, code_of_settings

ENGINE_NAME = "engine.json"
# What an artefact holds besides its engine's own files, and is not written again when it is measured again.
_HASHED = ("model.onnx", "weights.safetensors", "reference.safetensors")
_MEND = "Continue its run with --resume, or take another copy."


@dataclass(frozen=True)
class EngineDocument:
    """What ``engine.json`` says.

    Attributes:
        engine, engine_version: What built the engine file.
        file: Name of the file to open.
        options: What it must be opened with, as `EngineOptions.to_dict`.
        sha256: Name to hash of the engine's own files; empty where old releases wrote none.
        companions: The same of graph, weights and reference outputs, which old releases left out.
    """

    engine: str
    file: PlainName
    options: dict[str, Any]
    engine_version: str = "unknown"
    sha256: dict[PlainName, Sha256] = field(default_factory=dict)
    companions: dict[PlainName, Sha256] = field(default_factory=dict)

    @property
    def hashes(self) -> dict[str, str]:
        """Name to hash of every file that has one."""
        return {**self.companions, **self.sha256}

    @classmethod
    def read(cls, folder: Path) -> EngineDocument:
        """Read the document of an artefact.

        Raises:
            ConfigError: It is missing or damaged; names file, key and value.
        """
        path = folder / ENGINE_NAME
        return validated(cls, read_json(path), f"{path} is not what this release writes:")


def write_artifact(folder: Path, record: TrialRecord, file: EngineFile, engine_version: str) -> TrialRecord:
    """Write an engine file's JSON companions: ``engine.json``, ``policy.json``, ``latency.json``, ``record.json``.

    Returns:
        The record as written: it names what the folder holds by the hash of ``engine.json`` (`TrialRecord.sha256`).
    """
    write_engine(folder, file, engine_version)
    write_json(folder / "policy.json", record.policy.to_dict())
    sync_folder(folder)
    return write_record(folder, replace(record, sha256=content_hash(folder)))


def write_record(folder: Path, record: TrialRecord) -> TrialRecord:
    """Write what is known of an artefact by now, ``latency.json`` and ``record.json``; return the record."""
    if record.measurement is not None:
        write_json(folder / "latency.json", record.measurement.to_dict())
    write_json(folder / "record.json", record.to_dict())
    return record


def content_hash(folder: Path) -> str:
    """Return the SHA-256 of ``engine.json``, which names the SHA-256 of the artefact's files."""
    return hash_of(folder / ENGINE_NAME)


def write_engine(folder: Path, file: EngineFile, engine_version: str) -> None:
    """Write ``engine.json``: what it takes to open an engine file, and the hashes of its files.

    By these, whatever opens them can tell that they are still the ones. Files that are there by now are covered.
    """
    own = file.files()
    others = [path for name in _HASHED if (path := folder / name).exists() and path not in own]
    write_json(
        folder / ENGINE_NAME,
        {
            "engine": file.engine,
            "engine_version": engine_version,
            "file": file.path.name,
            "options": file.options.to_dict(),
            "sha256": {path.name: hash_of(path) for path in own},
            "companions": {path.name: hash_of(path) for path in others},
        },
    )


def read_artifact(folder: Path, trust: Trust = NOBODY, *, check: bool = True) -> EngineFile:
    """Return the engine file of an artefact folder or a deployed one, its files known to be those that were measured.

    Args:
        folder: It holds ``engine.json``.
        trust: Which code its options may name.
        check: Whether every file with a hash is read to compare it.

    Raises:
        ConfigError: The folder has no ``engine.json``, it is damaged, names code, or its engine file is missing.
        VerificationError: A file is not the one that was measured.
    """
    found = EngineDocument.read(folder)
    source = folder / ENGINE_NAME
    options = EngineOptions.from_dict(found.options, f"{source} is not what this release writes:")
    trust.require(code_of_settings(dict(options.settings)), source)
    file = EngineFile(found.engine, folder / found.file, options)
    if not file.path.exists():
        raise ConfigError(f"{source} names {found.file!r}, which is not there.")
    if check:
        check_hashes(folder, found)
    return file


def check_hashes(folder: Path, found: EngineDocument, names: tuple[str, ...] | None = None) -> None:
    """Compare an artefact's files with the hashes in its ``engine.json``; what has none there is taken as it is.

    Args:
        folder: Of the artefact.
        found: Its ``engine.json``.
        names: Only these.

    Raises:
        VerificationError: A file is missing or changed; names it.
    """
    for name, expected in found.hashes.items():
        if names is not None and name not in names:
            continue
        path = folder / name
        if not path.is_file():
            raise VerificationError(f"{path} is missing, though {ENGINE_NAME} lists it. {_MEND}")
        if (actual := hash_of(path)) != expected:
            raise VerificationError(
                f"{path} has changed since it was measured: its SHA-256 is {actual}, not {expected}. {_MEND}"
            )


def hash_of(path: Path) -> str:
    """Return a file's SHA-256.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
