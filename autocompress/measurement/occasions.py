"""What measurements of several moments say together, and where the next one is expected to lie.

Calls of one process at one moment agree with each other far better than with those of the next process, or of the same
one an hour later: where memory comes to lie, a neighbour on the same core, clocks, caches. So an occasion, every file
alone in a fresh process, is the unit of variance (Kalibera and Jones, "Rigorous benchmarking in reasonable time", ISMM
2013), and intervals are prediction intervals of one further occasion, in the logarithm of the ratio. What a run knows
of the spread of its machine (a file against its copy, and whatever else was measured repeatedly) counts as further
degrees of freedom, so that a single occasion has an interval, too.

Who times one file and then the other has no rounds to pair. What the machine does in the seconds between is seen where
occasions follow each other: one file's latency on one against the other's on the next (`crossed`).

States of the machine are kept apart: quiet, beside a processor that we keep busy, and shared, where rounds fall
into two kinds although nothing of ours ran. A ratio is always of two latencies of the same state.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autocompress.measurement.measure import Taken
from autocompress.runs.records import BUSY, QUIET, SHARED, Figures, Measurement, Occasion

# Standard deviation of a log ratio between occasions before any is known, and the degrees of freedom of that guess;
# what a run's spread counts for at most beside a file's own occasions.
_GUESS, _GUESS_N, _MOST_N = 0.012, 4.0, 8.0
# The same where the two latencies are of different moments.
_GUESS_CROSSED = 0.025
# The same of a log latency, which the machine's speed moves whole.
_GUESS_MS = 0.02
_CONFIDENCE = 0.95
# A round is compared with this quantile of all; it is calm within the first factor of it, of another kind beyond the
# second. So are occasions with each other, where calm is all that is not beyond the third.
_FAST, _CALM, _APART, _OTHER = 0.2, 1.08, 1.25, 1.12
# Rounds of a kind, at least: calm ones, and share of all.
_LEAST_CALM, _SHARE = 3, 0.3
# Occasions that follow each other within this belong to one burst.
_AT_ONCE_S = 60.0
# The shared state counts where it was seen on as many occasions: one is chance.
_SEEN = 2


@dataclass(frozen=True)
class Spread:
    """What log ratios of one file differ by from occasion to occasion on this machine, in this run.

    Attributes:
        deviation: Standard deviation.
        freedom: Degrees of freedom that it is known with.
        crossed: Standard deviation where the two latencies are of successive occasions.
    """

    deviation: float = _GUESS
    freedom: float = _GUESS_N
    crossed: float = _GUESS_CROSSED

    @classmethod
    def of(cls, measured: Iterable[Measurement], copies: Iterable[Measurement] = ()) -> Spread:
        """Pool what was measured repeatedly.

        Args:
            measured: Files with their occasions; each deviates from its own mean.
            copies: A file against its copy: it deviates from 1.
        """
        squares, crossed = _GUESS_N * _GUESS**2, _GUESS_N * _GUESS_CROSSED**2
        freedom = cross_freedom = _GUESS_N
        for measurement, middle in (*((m, None) for m in measured), *((m, 0.0) for m in copies)):
            logs = _logs(measurement.occasions, QUIET)
            if len(logs):
                squares += float(((logs - (logs.mean() if middle is None else middle)) ** 2).sum())
                freedom += len(logs) - (middle is None)
            across = crossings(measurement.occasions)
            if len(across):
                crossed += float(((across - (across.mean() if middle is None else middle)) ** 2).sum()) / 2
                cross_freedom += len(across) / 2
        deviation = math.sqrt(squares / freedom)
        return cls(deviation, freedom, max(deviation, math.sqrt(crossed / cross_freedom)))


def crossings(occasions: Sequence[Occasion]) -> NDArray[np.float64]:
    """Return log ratios ``(n,)`` of each latency to the baseline's of the next occasion, and of the one before.

    Two a pair of occasions that followed each other at once, so that they are worth one each.
    """
    found = []
    for one, other in itertools.pairwise(occasions):
        if other.at - one.at > _AT_ONCE_S:
            continue
        for own, dense in ((one, other), (other, one)):
            (first, _), (_, second) = (_all_ms(moment) for moment in (own, dense))
            if first and second:
                found.append(math.log(first / second))
    return np.array(found)


def _all_ms(occasion: Occasion) -> tuple[float, float]:
    """Return latency and baseline's latency as a plain timer sees them when nothing of ours runs."""
    found = occasion.states.get(QUIET) or occasion.states.get(SHARED)
    return (0.0, 0.0) if found is None else (found.all_ms, found.all_baseline_ms)


def interval(logs: NDArray[np.float64], spread: Spread) -> tuple[float, float, float]:
    """Return the median of values ``(n,)`` and the bounds between which the next one is expected, all as exp()."""
    half = _half(float(((logs - logs.mean()) ** 2).sum()), len(logs) - 1, len(logs), spread.deviation, spread.freedom)
    middle = float(np.median(logs))
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def _half(squares: float, freedom: float, count: int, deviation: float, known: float) -> float:
    """Return the half-width of a prediction interval from deviations of one's own and those that are known beside."""
    known = min(known, _MOST_N)
    variance = (known * deviation**2 + squares) / (known + freedom)
    return _student(known + freedom) * math.sqrt(variance * (1 + 1 / count))


def combined(latest: Measurement, occasions: Sequence[Occasion], spread: Spread | None = None) -> Measurement:
    """Return a measurement with what all its occasions say of ratio and latency.

    Args:
        latest: Whose other figures are kept.
        occasions: All of them; without any the measurement stays as it is.
        spread: Of this run; None where nothing is known of it.
    """
    if not occasions:
        return latest
    spread, told_apart = spread or Spread(), sorted_out(occasions)
    known = [state for state in (QUIET, SHARED, BUSY) if _has(told_apart, state)]
    if QUIET not in known and SHARED not in known:
        known = [SHARED, *known]
    states = {state: interval(_logs(told_apart, state), spread) for state in known}
    # Where no occasion was quiet, what there is.
    first = known[0]
    across = crossings(occasions)
    squares = float(((across - across.mean()) ** 2).sum()) / 2 if len(across) else 0.0
    wide = _half(squares, max(0.0, len(across) / 2 - 1), len(occasions), spread.crossed, spread.freedom)
    low, high = (min(low for _, low, _ in states.values()), max(high for _, _, high in states.values()))
    middles = [middle for middle, _, _ in states.values()]
    latencies = Spread(max(_GUESS_MS, spread.deviation), spread.freedom)
    ms = {state: interval(_log_ms(told_apart, state), latencies) for state in known}
    return replace(
        latest,
        latency_ms=ms[first][0],
        low_ms=min(low for _, low, _ in ms.values()),
        high_ms=max(high for _, _, high in ms.values()),
        ratio=states[first][0],
        ratio_low=low,
        ratio_high=high,
        expected_low=min(low, min(middles) * math.exp(-wide)),
        expected_high=max(high, max(middles) * math.exp(wide)),
        # Of an even number of occasions the same middle as that of the latency.
        baseline_ms=float(
            np.exp(np.median([math.log(o.states[first].baseline_ms) for o in told_apart if first in o.states]))
        ),
        occasions=tuple(occasions),
        states=states,
    )


def sorted_out(occasions: Sequence[Occasion]) -> list[Occasion]:
    """Return occasions with those as shared in which nothing of ours ran, but one of the files was clearly slower.

    A neighbour may stay for minutes: all rounds of an occasion are then alike, and only other occasions tell.
    """
    quiet = [occasion.states[QUIET] for occasion in occasions if QUIET in occasion.states]
    if len(quiet) < _LEAST_CALM:
        return list(occasions)
    own, dense = (np.quantile([getattr(one, name) for one in quiet], _FAST) for name in ("latency_ms", "baseline_ms"))
    found = []
    for occasion in occasions:
        states = dict(occasion.states)
        one = states.get(QUIET)
        if one is not None and max(one.latency_ms / own, one.baseline_ms / dense) > _OTHER:
            states[SHARED] = states.pop(QUIET)
        found.append(replace(occasion, states=states))
    return found


def half_width(measurement: Measurement) -> float:
    """Return the half-width of the quiet state's interval, relative to its middle."""
    middle, low, high = measurement.quiet
    return (high - low) / (2 * middle)


def figures(baseline: Taken, file: Taken, *, loaded: bool, usual_ms: float = 0.0) -> Mapping[str, Figures]:
    """Return what one occasion gave: one state's figures, or two where rounds fell into two kinds.

    A round is calm where both engines were about as fast as in their fast rounds. What the machine does in the others
    (a neighbour for some milliseconds, or for the whole occasion but those) moves a median of all of them by chance.

    Args:
        baseline, file: Rounds of the same moments.
        loaded: Whether we kept a neighbouring processor busy.
        usual_ms: What the baseline takes on the quiet machine; 0 where that is not known. Clearly slower, it shared.
    """
    dense, own = baseline.rounds, file.rounds
    above = np.maximum(dense / np.quantile(dense, _FAST), own / np.quantile(own, _FAST))
    calm, slow = above <= _CALM, above >= _APART
    if calm.sum() < max(_LEAST_CALM, _SHARE * len(own)):
        calm = np.ones_like(calm)
        slow = ~calm
    every = file.measurement.latency_ms, baseline.measurement.latency_ms
    first = _of(dense[calm], own[calm], every)
    if not loaded and usual_ms and first.baseline_ms > _OTHER * usual_ms:
        return {SHARED: first}
    found = {BUSY if loaded else QUIET: first}
    if not loaded and slow.sum() >= _SHARE * len(own):
        found[SHARED] = _of(dense[slow], own[slow], every)
    return found


def _of(dense: NDArray[np.float64], own: NDArray[np.float64], every: tuple[float, float]) -> Figures:
    return Figures(float(np.median(own)), float(np.median(dense)), float(np.median(own / dense)), *every)


def _has(occasions: Sequence[Occasion], state: str) -> bool:
    seen = sum(state in occasion.states for occasion in occasions)
    return seen >= (_SEEN if state == SHARED else 1)


def _logs(occasions: Sequence[Occasion], state: str) -> NDArray[np.float64]:
    return np.log([occasion.states[state].ratio for occasion in occasions if state in occasion.states])


def _log_ms(occasions: Sequence[Occasion], state: str) -> NDArray[np.float64]:
    return np.log([occasion.states[state].latency_ms for occasion in occasions if state in occasion.states])


def _student(freedom: float) -> float:
    """Return the two-sided quantile of Student's distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + _CONFIDENCE / 2))
