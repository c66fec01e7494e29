"""What a search tells its caller while it runs. The command line draws it; the Python API may ignore it."""

from __future__ import annotations

from pathlib import Path

from autocompress.runs.records import TrialRecord


class Observer:
    """Receive progress; every method may be overridden and does nothing by default."""

    def opened(self, run: Path) -> None:
        """The run directory is there; an interrupted search is resumed from it."""

    def stage(self, text: str) -> None:
        """A new stage begins: ``"Measuring the baseline"``."""

    def progress(self, fraction: float, text: str = "") -> None:
        """The current stage is done to this fraction, in [0, 1]."""

    def baseline(self, record: TrialRecord) -> None:
        """The uncompressed model has been measured."""

    def trial(self, record: TrialRecord) -> None:
        """A trial or a fine-tuned candidate has finished, or failed."""

    def warn(self, text: str) -> None:
        """Something the user should know, which stops nothing."""
