"""The manifest of a deployed directory: what it holds, where it came from, what was measured of it.

Owns ``manifest.json`` and the hashes in it; it runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from typing_extensions import TypedDict

from autocompress.documents import Count, PlainName, Sha256, reading, validated
from autocompress.engines.artifact import hash_of
from autocompress.engines.base import EngineFile, EngineOptions
from autocompress.errors import ConfigError, VerificationError
from autocompress.files import read_json, write_json
from autocompress.policy import CompressionPolicy
from autocompress.runs.trust import NOBODY, Trust, code_of_settings

MANIFEST_VERSION = 1
MANIFEST_NAME = "manifest.json"


class FileEntry(TypedDict):
    """What the manifest says of one file."""

    sha256: Sha256
    bytes: Count


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
    file: PlainName
    files: Mapping[PlainName, FileEntry]
    policy: Mapping[str, Any]
    policy_hash: str
    trial: int | None
    stage: str | None
    task: str | None
    model: str | None
    device: Mapping[str, Any] | None
    measured: Mapping[str, Any] | None
    accuracy: Mapping[str, float | None]
    size_bytes: Count
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
        manifest = validated(cls, data, "The manifest")
        if manifest.file not in manifest.files:
            raise ConfigError(f"The manifest has no hash of the engine file {manifest.file!r}. Deploy the model again.")
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

    def engine_file(self, directory: Path, trust: Trust = NOBODY) -> EngineFile:
        """Return the engine file to open.

        Args:
            directory: The deployed one.
            trust: Which code its options may name.

        Raises:
            ConfigError: The options are not those of an engine, or name code.
        """
        source = directory / MANIFEST_NAME
        options = EngineOptions.from_dict(self.options, f"{source}: the options cannot be read:")
        trust.require(code_of_settings(dict(options.settings)), source)
        file = EngineFile(self.engine, directory / self.file, options)
        for path in file.files():
            # The description of a TensorRT engine only says who built it.
            if path.suffix != ".json" and path.name not in self.files:
                raise ConfigError(
                    f"{source} has no hash of {path.name!r}, a part of the engine. Deploy the model again."
                )
        return file

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
            if found["bytes"] != listed["bytes"]:
                raise VerificationError(
                    f"{path} is damaged: it has {found['bytes']} bytes, not {listed['bytes']}. Deploy it again."
                )
            if found["sha256"] != listed["sha256"]:
                raise VerificationError(
                    f"{path} is damaged or was changed: its SHA-256 is {found['sha256']}, not {listed['sha256']}. "
                    "Deploy the model again."
                )


def describe_file(path: Path) -> FileEntry:
    """Return ``{"sha256", "bytes"}`` of a file.

    Raises:
        ConfigError: It cannot be read.
    """
    with reading(path):
        return {"sha256": hash_of(path), "bytes": path.stat().st_size}
