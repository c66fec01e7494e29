"""The run directory: the one place where a run's files are named, written and read back.

    config.yaml  env.json  study.db  trials.jsonl  pareto.json  summary.json  report.html
    baseline/    best/     artifacts/trial-00042/  artifacts/trial-00042/recovered/

Every folder that holds an engine is an *artefact*: ``engine.json`` (what to open and how), ``record.json``,
``policy.json``, ``weights.safetensors``, ``model.onnx``, ``model.<engine suffix>``, ``latency.json``. Writes are
atomic; ``trials.jsonl`` is append-only. Reading a run imports neither torch nor optuna.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from autocompress.config import RunConfig
from autocompress.documents import Lines, parse_yaml, read_bytes, read_lines, validated
from autocompress.errors import ConfigError
from autocompress.files import read_json, write_json, write_text
from autocompress.runs.records import TrialRecord


class RunDirectory:
    """Files of one run. Holds no state beyond its path."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    # -- life ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, *, resume: bool) -> RunDirectory:
        """Make the directory, or take one that a run left.

        Raises:
            ConfigError: It holds something and `resume` is off, it holds something that is no run, or it cannot be
                written.
        """
        run = cls(path)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--out {path} is a file; give a directory.")
        if path.exists() and any(path.iterdir()):
            if not resume:
                raise ConfigError(
                    f"--out {path} is not empty. Continue the run in it with --resume, or choose another directory."
                )
            if not run.config_file.exists():
                raise ConfigError(f"--out {path} holds no run (no config.yaml), so --resume cannot continue it.")
        elif resume:
            raise ConfigError(f"--resume: there is no run in {path}. Check --out, or leave --resume away.")
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"--out {path} cannot be written: {error.strerror}.") from error
        return run

    @classmethod
    def open(cls, path: Path | str) -> RunDirectory:
        """Open a finished or interrupted run for reading.

        Raises:
            ConfigError: There is no run there.
        """
        run = cls(path)
        if not run.config_file.exists():
            raise ConfigError(f"{path} holds no run (no config.yaml). Give the directory that `search --out` named.")
        return run

    # -- names --------------------------------------------------------------------------------------------------

    @property
    def config_file(self) -> Path:
        """The resolved run file."""
        return self.path / "config.yaml"

    @property
    def study_file(self) -> Path:
        """Optuna's SQLite database."""
        return self.path / "study.db"

    @property
    def trials_file(self) -> Path:
        """One `TrialRecord` a line, in the order they finished; of one trial the last counts (`records`)."""
        return self.path / "trials.jsonl"

    @property
    def baseline(self) -> Path:
        """Artefact of the uncompressed model at the engine's best dense dtype."""
        return self.path / "baseline"

    @property
    def best(self) -> Path:
        """Artefact of the best result so far."""
        return self.path / "best"

    @property
    def report_file(self) -> Path:
        """The HTML report."""
        return self.path / "report.html"

    def artifact(self, number: int, *, recovered: bool = False) -> Path:
        """Folder of one trial's files."""
        folder = self.path / "artifacts" / f"trial-{number:05d}"
        return folder / "recovered" if recovered else folder

    # -- config and summaries -----------------------------------------------------------------------------------

    def write_config(self, config: RunConfig) -> None:
        """Write the resolved run file."""
        write_text(self.config_file, yaml.safe_dump(config.model_dump(), sort_keys=False))

    def config(self) -> RunConfig:
        """Read the resolved run file."""
        return validated(RunConfig, parse_yaml(read_bytes(self.config_file), self.config_file), self.config_file)

    def write(self, name: str, data: Any) -> None:
        """Write one of the JSON summaries (``env.json``, ``pareto.json``, ``summary.json``, …)."""
        write_json(self.path / name, data)

    def read(self, name: str) -> Any:
        """Read one of the JSON summaries."""
        return read_json(self.path / name)

    # -- trials -------------------------------------------------------------------------------------------------

    def append(self, record: TrialRecord) -> None:
        """Append one record to ``trials.jsonl`` and make sure that it is on disk."""
        line = json.dumps(record.to_dict(), allow_nan=False) + "\n"
        try:
            # A line cut short by a crash must not swallow the next one.
            whole = not self.trials_file.exists() or self.trials_file.read_bytes()[-1:] in (b"", b"\n")
            with self.trials_file.open("a") as file:
                file.write(line if whole else "\n" + line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ConfigError(
                f"Cannot write {self.trials_file}: {error.strerror}. Free some space; --resume goes on from here."
            ) from error

    def history(self) -> list[TrialRecord]:
        """Read every record in the order they finished; damaged lines are set aside (`log`)."""
        return list(self.log().values)

    def log(self) -> Lines[TrialRecord]:
        """Read every record in the order they finished, and what is wrong with the lines that are none.

        Raises:
            ConfigError: The file itself cannot be read.
        """
        return read_lines(self.trials_file, TrialRecord.from_dict)

    def records(self) -> dict[int, TrialRecord]:
        """Read the latest record of every trial, by number: the fine-tuned one where there is one.

        A trial may be measured again, before another round of fine-tuning: that hides no earlier round's result.
        """
        found: dict[int, TrialRecord] = {}
        for record in self.history():
            known = found.get(record.number)
            if known is None or known.stage != "recovered" or record.stage == "recovered":
                found[record.number] = record
        return found
