"""Every error a user can meet, in one tree, each with the exit code the command line returns for it.

    AutoCompressError                 1
    ├── ConfigError                   2   options, run file, search space, data, weights
    │   └── TaskError                         the user's own code: it raised, hung, or gave what it must not
    │       └── NotANumberError               a metric, a loss or a divergence that is NaN or infinite
    ├── NoFeasibleTrialError          3   nothing met the constraints; the best so far is on disk
    ├── UnavailableError              4
    │   ├── MissingDependencyError        an engine's package is not installed (names the extra)
    │   ├── DeviceNotFoundError           the device is not there
    │   └── UnsupportedDtypeError         the engine does not run this dtype on this device
    ├── EngineError                   5
    │   ├── ExportError                   PyTorch to ONNX
    │   ├── BuildError                    ONNX to engine, or the runtime crashed, hung or ran out of memory
    │   │   └── WorkerLostError               the process that builds and measures died or hung
    │   └── CompressionError              a policy that cannot be applied to the model
    ├── VerificationError             6   two forms of the same model disagree
    └── MismatchError                 7
        ├── TableMismatchError            a latency table from another device
        └── StudyMismatchError            a run directory made with other settings

A message says what happened, the offending value, and what to do. A run that a signal stopped exits with 128 and the
signal's number: 130 of Ctrl-C, 143 of a scheduler's SIGTERM, 129 of a terminal that was closed.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable
from pathlib import Path

# How a `WorkerLostError` ended that was given up when its time was.
HUNG = "hung"


class Stopped(KeyboardInterrupt):
    """A signal asks the process to end: Ctrl-C, a scheduler's SIGTERM, or SIGHUP of a terminal that was closed.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """What the process exits with."""
        return 128 + self.signal


class AutoCompressError(Exception):
    """Base of every error this package raises on purpose.

    Attributes:
        run: The run directory, where a search that ended with this error has summarised what it had found before.
    """

    exit_code = 1
    run: Path | None = None


class ConfigError(AutoCompressError):
    """Something the user wrote or pointed at cannot be used: an option, the run file, data, weights."""

    exit_code = 2


class TaskError(ConfigError):
    """A method of the user's task raised, hung, or returned what it must not."""


class NotANumberError(TaskError):
    """A metric, a loss or a divergence is NaN or infinite: the user's code, or what one candidate gives."""


class NoFeasibleTrialError(AutoCompressError):
    """No candidate met every constraint. The best so far has been written and is named in the message."""

    exit_code = 3


class UnavailableError(AutoCompressError):
    """Something the run needs is not on this machine."""

    exit_code = 4


class MissingDependencyError(UnavailableError):
    """An optional package is not installed."""


class DeviceNotFoundError(UnavailableError):
    """The device asked for is not there, or its driver is not."""


class UnsupportedDtypeError(UnavailableError):
    """The engine cannot run this dtype on this device."""


class EngineError(AutoCompressError):
    """A station between the policy and the running engine failed for one candidate."""

    exit_code = 5


class ExportError(EngineError):
    """The model cannot be exported to ONNX."""


class BuildError(EngineError):
    """The runtime refused the graph, crashed, hung, or ran out of memory."""


class WorkerLostError(BuildError):
    """The process that builds, runs and measures died, hung, or answered nonsense.

    Attributes:
        ending: What became of it, after "the worker process".
        again: Whether the same request may well succeed in a new process.
    """

    def __init__(self, message: str, *, ending: str = "was lost", again: bool = False) -> None:
        super().__init__(message)
        self.ending, self.again = ending, again

    def after(self, first: WorkerLostError) -> WorkerLostError:
        """Return this error as that of a second attempt, which is the last."""
        return WorkerLostError(
            f"Tried twice (the first time the worker process {first.ending}): {self}", ending=self.ending
        )


class CompressionError(EngineError):
    """The policy cannot be applied to this model."""


class VerificationError(AutoCompressError):
    """Two forms of one model (torch, ONNX, engine, deployed file) disagree beyond the stated tolerance."""

    exit_code = 6


class MismatchError(AutoCompressError):
    """Stored results do not belong to what is being run now."""

    exit_code = 7


class TableMismatchError(MismatchError):
    """A latency table was measured on another device or engine."""


class StudyMismatchError(MismatchError):
    """A run directory was made with another task, search space, engine or seed."""


def in_a_line(error: Exception) -> str:
    """Return an error's message, with its class in front where it is none of this package's."""
    return str(error) if isinstance(error, AutoCompressError) else f"{type(error).__name__}: {error}"


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest allowed name, followed by the whole list."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Available: {', '.join(names)}."
