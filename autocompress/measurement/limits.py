"""How long one request to the measuring process may take, and whether it is asked a second time.

A runtime that hangs tells nobody. What tells is the time: what is left of the run (`Deadline`), of which one request
takes a share at most; the limit that the caller or the run file sets; and, where candidates are forms of one network,
what the same request took before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from autocompress.runs.deadline import Deadline

# Of what is left, one request takes this at most: a hang, and the second attempt after it, leave a quarter.
_SHARE = 0.5
# A request that takes this many times the longest of its kind hangs; it is never taken for hanging before so many
# seconds, as a busy machine starts a process and imports a runtime in ten.
_TIMES_LONGEST, _LEAST_S = 10.0, 30.0
# A build without a limit of its own has so many seconds for each MiB of its graph, where those are more than the usual.
_BUILD_S_PER_MIB = 3.0
# A process that used this share of its time computes, even beside others: it is slow, and would be as slow again. What
# it takes to start and to import a runtime says nothing.
_COMPUTES, _STARTS_S = 0.15, 3.0
# Hangs that one candidate may cost. The second one fails it.
_HANGS = 2


@dataclass
class RequestLimits:
    """The limits of one worker and of the processes that it times files in; shared by them.

    Attributes:
        deadline: By when every answer must be here.
        share: Of what is left until then, what one request may take.
        build_s: The user's own limit of a build; None finds one.
        learns: Whether requests of one kind are alike, as of candidates of one search: then what one takes says
            when the next one hangs.
    """

    deadline: Deadline = field(default_factory=Deadline)
    share: float = _SHARE
    build_s: float | None = None
    learns: bool = False
    _longest: dict[tuple[str, str], float] = field(default_factory=dict)
    _hangs: int = 0

    @contextmanager
    def until(self, deadline: Deadline, *, share: float = _SHARE) -> Iterator[None]:
        """Have requests answered by another deadline meanwhile."""
        before = self.deadline, self.share
        self.deadline, self.share = deadline, share
        try:
            yield
        finally:
            self.deadline, self.share = before

    def seconds(self, operation: str, engine: str, size: float, usual_s: float, onnx: Path | None = None) -> float:
        """Return what a request may take.

        Args:
            operation: Its name.
            engine: That it is for.
            size: How much of it there is, such as samples.
            usual_s: The caller's own limit.
            onnx: The graph that is built.
        """
        limit = usual_s
        if operation == "build":
            limit = self.build_s or max(usual_s, _BUILD_S_PER_MIB * _mib(onnx))
            if self.build_s is not None:
                # The user knows: neither a share nor what is usual cuts it short.
                return min(limit, self.deadline.left())
        longest = self._longest.get((operation, engine))
        if self.learns and longest is not None:
            limit = min(limit, max(_LEAST_S, _TIMES_LONGEST * longest * size))
        return min(limit, self.deadline.share(self.share).left()) if self.deadline.finite else limit

    def answered(self, operation: str, engine: str, size: float, seconds: float) -> None:
        """Note what a request took."""
        key = operation, engine
        self._longest[key] = max(self._longest.get(key, 0.0), seconds / max(size, 1.0))

    def new_candidate(self) -> None:
        """Count hangs anew."""
        self._hangs = 0

    def again_after_hang(self, seconds: float, used_s: float | None) -> bool:
        """Count a hang, and return whether the request is worth asking once more.

        Args:
            seconds: After which it was given up.
            used_s: Processor time that its process used meanwhile; None where that is not known.
        """
        self._hangs += 1
        computes = used_s is not None and used_s - _STARTS_S > _COMPUTES * seconds
        return self._hangs < _HANGS and not computes and not self.deadline.passed()

    def copy(self) -> RequestLimits:
        """Return limits of the same deadline that others do not change."""
        return replace(self, _longest={}, _hangs=0)


def _mib(path: Path | None) -> float:
    """Return the size of a graph with the weights that lie beside it, or 0."""
    if path is None:
        return 0.0
    files = [path, path.with_name(f"{path.name}.data")]
    return sum(file.stat().st_size for file in files if file.exists()) / 2**20
