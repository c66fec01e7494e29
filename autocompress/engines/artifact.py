"""An engine file on disk with its JSON companions: what it takes to open it, and the hashes of its files.

An artefact is whole when it has a ``record.json``: that is written last, when all else has reached the disk, and from
then on only measurements are added to it. Another attempt at the same network is another folder.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from autocompress.engines.base import EngineFile, EngineOptions
from autocompress.errors import ConfigError
from autocompress.files import read_json, sync_folder, write_json
from autocompress.runs.records import TrialRecord


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
    return hashlib.sha256((folder / "engine.json").read_bytes()).hexdigest()


def write_engine(folder: Path, file: EngineFile, engine_version: str) -> None:
    """Write ``engine.json``: what it takes to open an engine file, and the hashes of its files.

    By these, deploying can tell that they are still the ones.
    """
    write_json(
        folder / "engine.json",
        {
            "engine": file.engine,
            "engine_version": engine_version,
            "file": file.path.name,
            "options": file.options.to_dict(),
            "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in file.files()},
        },
    )


def read_artifact(folder: Path) -> EngineFile:
    """Return the engine file of an artefact folder or a deployed one.

    Raises:
        ConfigError: The folder has no ``engine.json``, it is damaged, or its engine file is missing.
    """
    data = read_json(folder / "engine.json")
    try:
        file = EngineFile(data["engine"], folder / data["file"], EngineOptions(**data["options"]))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder / 'engine.json'} is not what this release writes: {error!r}.") from error
    if not file.path.exists():
        raise ConfigError(f"{folder / 'engine.json'} names {data['file']!r}, which is not there.")
    return file
