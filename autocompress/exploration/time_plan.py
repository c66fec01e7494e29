"""How a run's seconds are shared out, once the uncompressed network has shown what its stations take.

The end comes first: reading the test data, verifying and the report are kept back. What is left goes to sensitivities,
candidates and fine-tuning. Without ``--timeout`` there is no plan, and nothing is cut short.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

# Of what is left, for measuring what single choices do: at most this share, and no longer than so many candidates take.
_SENSITIVITY_SHARE, _SENSITIVITY_CANDIDATES = 0.15, 25
# Candidates that fine-tuning leaves room for, if they take no more than this share of what is left.
_LEAST_CANDIDATES, _MOST_SHARE = 6, 0.7
# Seconds to start a process and import a runtime, and to draw the report.
_START_S, _REPORT_S = 3.0, 3.0
# What estimates of the end are multiplied by, and the least and the most that is kept back of a timeout.
_CAUTION, _LEAST_RESERVE_S, _MOST_RESERVE = 1.2, 5.0, 0.5
# A candidate is compressed, exported, built, verified, scored and measured; what compressing takes of the others.
_STATIONS = ("export", "build", "verify", "proxy")
_TRIAL_MEASURE_S = 2.0


@dataclass(frozen=True)
class TimePlan:
    """When each stage has to end, in `time.monotonic()` seconds; infinite without a timeout.

    Attributes:
        started: When the user's clock began.
        made: When the plan was made.
        timeout: Seconds of the whole run, or infinity.
        reserve: Seconds kept back for test data, verification and report.
        sensitivity: Seconds for measuring what single choices do.
        candidate: Seconds that one candidate takes, about.
        candidates: Seconds for candidates.
    """

    started: float
    made: float
    timeout: float
    reserve: float
    sensitivity: float
    candidate: float
    candidates: float

    @classmethod
    def of(
        cls, started: float, timeout: float | None, baseline: Mapping[str, float], *, dtypes: int, compress: float,
        test_share: float, recovery_share: float, occasions: int,
    ) -> TimePlan:  # fmt: skip
        """Make a plan.

        Args:
            started: `time.monotonic()` when the user's clock began.
            timeout: Seconds of the whole run; None for no limit.
            baseline: Seconds of the uncompressed model's stations, by activity.
            dtypes: Dense dtypes that it was built for: all stations but ``proxy`` served each.
            compress: Seconds to make a compressed network.
            test_share: Samples of the test data over those of the validation data.
            occasions: Moments at which a file is measured again (`RunConfig.occasions`).
            recovery_share: Share of what is left after sensitivities that fine-tuning would have.
        """
        now = time.monotonic()
        stations = {name: baseline.get(name, 0.0) / (1 if name == "proxy" else max(dtypes, 1)) for name in _STATIONS}
        candidate = compress + sum(stations.values()) + _TRIAL_MEASURE_S
        if timeout is None:
            return cls(started, now, math.inf, 0.0, math.inf, candidate, math.inf)
        # Every dtype was measured once, if there were several, then the fastest and its copy as often as two files are
        # in the end.
        files = 2 * occasions + (0 if dtypes == 1 else dtypes)
        measuring = 2 * occasions * baseline.get("measure", 0.0) / files
        end = 2 * stations["proxy"] * test_share + measuring + _START_S + _REPORT_S
        reserve = min(max(_CAUTION * end, _LEAST_RESERVE_S), _MOST_RESERVE * timeout)
        left = max(started + timeout - reserve - now, 0.0)
        sensitivity = min(_SENSITIVITY_SHARE * left, _SENSITIVITY_CANDIDATES * candidate)
        rest = left - sensitivity
        candidates = max((1 - recovery_share) * rest, min(_LEAST_CANDIDATES * candidate, _MOST_SHARE * rest))
        if recovery_share == 0:
            candidates = rest
        return cls(started, now, timeout, reserve, sensitivity, candidate, candidates)

    @property
    def deadline(self) -> float:
        """When search and fine-tuning must have ended."""
        return self.started + self.timeout - self.reserve

    @property
    def sensitivity_until(self) -> float:
        """When measuring what single choices do must have ended."""
        return self.made + self.sensitivity

    def candidates_until(self) -> float:
        """Return when the last candidate must have been scored, what earlier stages saved included."""
        tuning = self.deadline - self.made - self.sensitivity - self.candidates
        return self.deadline - tuning if math.isfinite(self.timeout) else math.inf

    def describe(self) -> str:
        """Return the plan in a sentence."""
        if not math.isfinite(self.timeout):
            return f"No --timeout: the search ends with its trials, about {self.candidate:.0f} s each"
        tuning = max(self.deadline - self.candidates_until(), 0.0)
        stages = [
            f"{self.made - self.started:.0f} s so far",
            f"{self.sensitivity:.0f} s for what single choices do",
            f"{self.candidates:.0f} s for candidates (about {max(self.candidates / self.candidate, 0):.0f})",
            *([f"{tuning:.0f} s for fine-tuning"] if tuning >= 1 else []),
            f"{self.reserve:.0f} s for test data, verification and report",
        ]
        return f"Plan for {self.timeout:.0f} s: {', '.join(stages)}"
