"""Which fine-tunings of a run have finished, and what came of them: a resumed run runs none of them again."""

from __future__ import annotations

import json
from dataclasses import dataclass

from typing_extensions import TypedDict

from autocompress.documents import RelativeFolder, read_lines, validated
from autocompress.files import append_line
from autocompress.runs.directory import RunDirectory
from autocompress.runs.records import TrialRecord

_FILE = "trainings.jsonl"


class _Line(TypedDict):
    key: str
    artifact: RelativeFolder | None


@dataclass(frozen=True)
class Finished:
    """A fine-tuning that has ended.

    Attributes:
        record: What came of it; None where it was discarded.
    """

    record: TrialRecord | None


class FinishedTrainings:
    """The fine-tunings of a run that have finished, by a key of whatever makes two of them the same.

    Args:
        run: Its log has the records, ``trainings.jsonl`` says which training each came of.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run, self._path = run, run.path / _FILE

    def get(self, key: str) -> Finished | None:
        """Return what came of a training; None where it has not finished, or its record or files are gone."""
        lines = read_lines(self._path, lambda data, source: validated(_Line, data, source)).values
        artifacts = [line["artifact"] for line in lines if line["key"] == key]
        if not artifacts:
            return None
        if artifacts[-1] is None:
            return Finished(None)
        records = [r for r in self._run.history() if r.artifact == artifacts[-1]]
        if not records or not (self._run.path / artifacts[-1] / "record.json").exists():
            return None
        return Finished(records[-1])

    def add(self, key: str, record: TrialRecord | None) -> None:
        """Note that a training has finished, with its record, or None where it was discarded."""
        line = {"key": key, "artifact": None if record is None else record.artifact}
        append_line(self._path, json.dumps(line))
