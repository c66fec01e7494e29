"""One search's results on disk, as Python sees them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.deploy.manifest import Manifest
from autocompress.deploy.package import deploy
from autocompress.errors import ConfigError
from autocompress.measurement.fingerprint import device_fingerprint
from autocompress.report.html import write_report
from autocompress.runs.directory import RunDirectory
from autocompress.runs.lock import owned
from autocompress.runs.records import TrialRecord
from autocompress.runs.summaries import SUMMARY_NAME, read_summary
from autocompress.runs.trust import code_of_task, trust_of

if TYPE_CHECKING:
    import optuna
    import pandas as pd
    from torch import nn

    from autocompress.tasks import Task


class Run:
    """A search's results on disk.

    Args:
        path: The run directory.
        task: The task it ran on; None loads the one its run file names when it is needed.
        trust: Whether code that the run names may run: the module of its task, plugins of its engine. Without it only
            a run that you began here runs what you began it with; see `autocompress.runs.trust`.
    """

    def __init__(self, path: Path | str, task: Task | None = None, *, trust: bool = False) -> None:
        self.directory = RunDirectory.open(path)
        self._task, self._trust = task, trust

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory.path

    @property
    def summary(self) -> dict[str, Any]:
        """The document of ``search --json``.

        Raises:
            ConfigError: The run has not finished.
        """
        if not (self.directory.path / SUMMARY_NAME).exists():
            raise ConfigError(f"{self.directory.path / SUMMARY_NAME} does not exist: the run has not finished.")
        return read_summary(self.directory)

    @property
    def records(self) -> list[TrialRecord]:
        """The latest record of every trial, by number."""
        return [record for _, record in sorted(self.directory.records().items())]

    @property
    def best(self) -> TrialRecord:
        """The result offered; its stage is ``"baseline"`` where no candidate was worth more than the model itself.

        Raises:
            ConfigError: No trial has finished yet.
        """
        return TrialRecord.read(self.directory.best / "record.json")

    @property
    def front(self) -> pd.DataFrame:
        """The Pareto front, fastest first.

        One row per trial: ``trial, stage, accuracy`` (validation), ``latency_ms, latency_ratio, size_bytes, macs,
        params, policy`` (the `CompressionPolicy`).
        """
        import pandas as pd

        from autocompress.exploration.pareto import run_front

        rows = [
            {
                "trial": r.number, "stage": r.stage, "accuracy": r.accuracy, "latency_ms": r.latency_ms,
                "latency_ratio": r.measurement.ratio if r.measurement else None, "size_bytes": r.size_bytes,
                "macs": r.macs, "params": r.params, "policy": r.policy,
            }
            for r in run_front(self.directory)
        ]  # fmt: skip
        columns = (
            "trial", "stage", "accuracy", "latency_ms", "latency_ratio", "size_bytes", "macs", "params", "policy",
        )  # fmt: skip
        return pd.DataFrame(rows, columns=columns)

    @property
    def study(self) -> optuna.Study:
        """The Optuna study, for its own plots and tools."""
        from autocompress.exploration.study import load_study

        return load_study(self.directory)

    def deploy(self, to: Path | str, trial: int | None = None, *, force: bool = False) -> Manifest:
        """Package the best result, or one trial, into `to`; see `autocompress.deploy.package.deploy`.

        Args:
            to: A directory that does not exist or is empty.
            trial: Its number; None takes the best.
            force: Deploy what missed a limit of the run all the same.

        Raises:
            ConfigError: Nothing to deploy, it misses a limit, or `to` holds something.
            VerificationError: The copy is not what was measured, or is slower than the baseline.
        """
        return deploy(self.directory, Path(to), trial, device=device_fingerprint(), force=force, trust=self._trust)

    def load_model(self, trial: int | None = None) -> nn.Module:
        """Return the compressed `nn.Module` of the best result or of one trial, rebuilt from policy and weights.

        It is in eval mode, simulates int8 where the policy says so, and can be trained on.

        Raises:
            ConfigError: There is no such trial, or its files are gone.
        """
        from autocompress.compress.reload import load_compressed

        folder = self.directory.best
        if trial is not None:
            folder = self.directory.folders().get(trial, self.directory.artifact(trial))
        if not (folder / "record.json").exists():
            numbers = ", ".join(str(r.number) for r in self.records if r.state == "complete") or "none"
            raise ConfigError(f"{self.path} has no model of trial {trial}. Finished trials: {numbers}.")
        record = TrialRecord.read(folder / "record.json")
        return load_compressed(self.task, folder, record)

    def report(self) -> Path:
        """Write ``report.html`` and return its path."""
        return write_report(self.directory)

    @property
    def task(self) -> Task:
        """The task it ran on.

        Raises:
            ConfigError: It cannot be loaded from the run file, or is code that nobody trusted.
        """
        if self._task is None:
            from autocompress.tasks import load_task
            from autocompress.tasks.guard import guarded

            config = self.directory.config()
            trust_of(self.path, self._trust).require(code_of_task(config.task.name), self.directory.config_file)
            try:
                self._task = guarded(load_task(config.task))
            except ConfigError as error:
                raise ConfigError(
                    f"The task of {self.path} cannot be loaded ({error}). If the search was given a Task object, "
                    "open the run with it: open_run(path, task)."
                ) from error
        return self._task


def repair(path: Path | str) -> list[str]:
    """Look a run over and mend what can be; return what was found and done, a sentence each, none for a sound run.

    Half-made files are removed, damaged lines of the log and a database that tells something else are set aside,
    ``best/`` is made anew of the artefact it is a copy of. Artefacts that are damaged are named.

    Args:
        path: The run directory, which no other process may own.

    Raises:
        ConfigError: There is no run there, or another process owns it.
    """
    from autocompress.exploration.repair import repair as repair_run

    run = RunDirectory.open(path)
    with owned(run.path):
        return repair_run(run)


def open_run(path: Path | str, task: Task | None = None, *, trust: bool = False) -> Run:
    """Open the directory of a finished or interrupted search; nothing that it names is run unless `trust` says so.

    Raises:
        ConfigError: There is no run there.
    """
    return Run(path, task, trust=trust)
