"""The manifest of a deployed directory: what it holds, where it came from, what was measured of it.

Owns ``manifest.json`` and the hashes in it; it runs nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from autocompress.engines.base import EngineFile, EngineOptions
from autocompress.errors import ConfigError, VerificationError
from autocompress.files import read_json, write_json
from autocompress.policy import CompressionPolicy

MANIFEST_VERSION = 1
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a deployed directory holds.

    Attributes:
        schema_version: `MANIFEST_VERSION`.
        created: ISO 8601, UTC.
        autocompress: Version of the package that wrote it, or None when it was not installed.
        engine, engine_version, options: What built the engine file, and what it must be opened with.
        file: Name of the engine file to open.
        files: Name to ``{"sha256", "bytes"}`` of every file beside the manifest.
        policy, policy_hash: What was done to the model.
        trial, stage: Which candidate of the run it is; the number is None when it is not recorded.
        task, model: What was compressed, where the run says so.
        device: The device it was measured on: a fingerprint, or ``{"name": …}``; None when unknown.
        measured: The measurement that the search took of this very file (`runs.records.Measurement`), or None.
        accuracy: ``"validation"`` and ``"test"`` in [0, 1]; None where not computed for this candidate.
        size_bytes: Of the engine's files.
        verification: What was checked in a fresh process when it was deployed.
    """

    schema_version: int
    created: str
    autocompress: str | None
    engine: str
    engine_version: str
    options: Mapping[str, Any]
    file: str
    files: Mapping[str, Mapping[str, Any]]
    policy: Mapping[str, Any]
    policy_hash: str
    trial: int | None
    stage: str | None
    task: str | None
    model: str | None
    device: Mapping[str, Any] | None
    measured: Mapping[str, Any] | None
    accuracy: Mapping[str, float | None]
    size_bytes: int
    verification: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form; keys of later releases are ignored.

        Raises:
            ConfigError: Another schema version, a missing key, or a policy that does not match its hash.
        """
        version = data.get("schema_version")
        if version != MANIFEST_VERSION:
            raise ConfigError(f"Manifest version {version!r} cannot be read; this release reads {MANIFEST_VERSION}.")
        names = [f.name for f in fields(cls)]
        if missing := [name for name in names if name not in data]:
            raise ConfigError(f"The manifest lacks {', '.join(missing)}. Deploy the model again.")
        manifest = cls(**{name: data[name] for name in names})
        for name in (manifest.file, *manifest.files):
            # Names are looked up inside the directory; a path could point anywhere.
            if not name or Path(name).name != name:
                raise ConfigError(f"The manifest names the file {name!r}; only plain file names are allowed.")
        if CompressionPolicy.from_dict(manifest.policy).hash != manifest.policy_hash:
            raise ConfigError("The manifest's policy does not match its hash; it was edited. Deploy the model again.")
        return manifest

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read the manifest of a deployed directory.

        Raises:
            ConfigError: There is none, or it cannot be read.
        """
        path = directory / MANIFEST_NAME
        if not path.exists():
            raise ConfigError(f"{directory} is no deployed directory: it has no {MANIFEST_NAME}.")
        data = read_json(path)
        if not isinstance(data, dict):
            raise ConfigError(f"{path} holds no manifest.")
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def write(self, directory: Path) -> None:
        """Write the manifest into its directory."""
        write_json(directory / MANIFEST_NAME, self.to_dict())

    def engine_file(self, directory: Path) -> EngineFile:
        """Return the engine file to open.

        Raises:
            ConfigError: The options are not those of an engine.
        """
        try:
            return EngineFile(self.engine, directory / self.file, EngineOptions(**self.options))
        except TypeError as error:
            raise ConfigError(f"{directory / MANIFEST_NAME}: the options cannot be read: {error}.") from error

    def check_files(self, directory: Path) -> None:
        """Compare every listed file with its size and hash.

        Raises:
            VerificationError: A file is missing or differs; names it.
        """
        for name, listed in self.files.items():
            path = directory / name
            if not path.is_file():
                raise VerificationError(f"{path} is missing, though {MANIFEST_NAME} lists it. Deploy the model again.")
            found = describe_file(path)
            if found["bytes"] != listed.get("bytes"):
                raise VerificationError(
                    f"{path} is damaged: it has {found['bytes']} bytes, not {listed.get('bytes')}. Deploy it again."
                )
            if found["sha256"] != listed.get("sha256"):
                raise VerificationError(
                    f"{path} is damaged or was changed: its SHA-256 is {found['sha256']}, not {listed.get('sha256')}. "
                    "Deploy the model again."
                )


def describe_file(path: Path) -> dict[str, Any]:
    """Return ``{"sha256", "bytes"}`` of a file.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
