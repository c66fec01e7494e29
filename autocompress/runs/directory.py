"""The run directory: the one place where a run's files are named, written and read back.

    config.yaml  env.json  study.db  trials.jsonl  pareto.json  summary.json  report.html
    baseline/    best/     artifacts/trial-00042/  artifacts/trial-00042/recovered/

Every folder that holds an engine is an *artefact*: ``engine.json`` (what to open and how), ``record.json``,
``policy.json``, ``weights.safetensors``, ``model.onnx``, ``model.<engine suffix>``, ``latency.json``. Writes are
atomic; ``trials.jsonl`` is append-only. Reading a run imports neither torch nor optuna.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from autocompress.config import RunConfig
from autocompress.documents import Lines, parse_yaml, read_bytes, read_lines, validated
from autocompress.errors import ConfigError
from autocompress.files import append_line, read_json, write_json, write_text
from autocompress.runs.lock import is_lock
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
        if path.exists() and not all(is_lock(entry) for entry in path.iterdir()):
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
        """Folder of one trial's files, or of its first fine-tuning's."""
        folder = self.path / "artifacts" / f"trial-{number:05d}"
        return folder / "recovered" if recovered else folder

    def new_recovered(self, number: int) -> Path:
        """Return the folder of a trial's next fine-tuning: ``recovered``, ``recovered-2``, …; none is written twice.

        What a process left there that died before it had finished is removed.
        """
        first = self.artifact(number, recovered=True)
        for attempt in itertools.count(1):
            folder = first if attempt == 1 else first.with_name(f"{first.name}-{attempt}")
            if not (folder / "record.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
                return folder
        raise AssertionError  # an endless loop ends by returning

    def folders(self) -> dict[int, Path]:
        """Return the folder of every trial's result: of its best fine-tuning, else of the trial, where it has files."""
        records, found = self.records(), {}
        for folder in sorted((self.path / "artifacts").glob("trial-*")):
            number = folder.name.removeprefix("trial-")
            if not number.isdigit():
                continue
            record = records.get(int(number))
            named = [] if record is None or record.artifact is None else [self.path / record.artifact]
            # The others where the log has lost the line.
            for candidate in (*named, folder / "recovered", folder):
                if (candidate / "engine.json").exists():
                    found[int(number)] = candidate
                    break
        return found

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
        append_line(self.trials_file, json.dumps(record.to_dict(), allow_nan=False))

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
        """Read the record of every trial, by number: of its most accurate fine-tuning where there is one.

        A network may be measured again: of each artefact the latest record counts.
        """
        latest: dict[tuple[int, str, str | None], TrialRecord] = {}
        for record in self.history():
            latest[record.number, record.stage, record.artifact] = record
        found: dict[int, TrialRecord] = {}
        for record in latest.values():
            known = found.get(record.number)
            if known is None or _rank(record) >= _rank(known):
                found[record.number] = record
        return found


def _rank(record: TrialRecord) -> tuple[bool, float]:
    recovered = record.stage == "recovered"
    return recovered, (record.accuracy or 0.0) if recovered else 0.0
