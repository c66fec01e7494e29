"""What a run produces: measurements, trial records, the run's summary and the deployed manifest, as plain data.

Everything here round-trips through JSON and imports nothing heavy: reading a run needs neither torch nor optuna.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from autocompress.documents import Count, NotNegative, RelativeFolder, reading, validated
from autocompress.errors import ConfigError
from autocompress.files import read_json
from autocompress.policy import CompressionPolicy

SCHEMA_VERSION = 1
MEASURED, PREDICTED, ELSEWHERE = "measured", "predicted", "elsewhere"
# States of the machine: nothing else runs; we keep a neighbouring processor busy; somebody else does, seen by calls of
# two kinds.
QUIET, BUSY, SHARED = "quiet", "busy", "shared"
# Two opened copies of one file differ by up to this: where their memory lies differs.
SAME_FILE = 0.01
# What nobody would notice.
EQUAL = 0.02


class _Json:
    """JSON round trip for flat dataclasses; unknown keys are ignored so that old releases read new runs."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form.

        Raises:
            ConfigError: A key is missing, or a value is not of its type or range.
        """
        return validated(cls, data, cls.__name__)


@dataclass(frozen=True)
class Figures(_Json):
    """What one state of the machine gave on one occasion.

    Attributes:
        latency_ms, baseline_ms: Medians over calm rounds.
        ratio: Of the two in the same rounds.
        all_ms, all_baseline_ms: Medians over all calls, as a timer sees them that knows nothing of rounds; 0 where
            that was not kept.
    """

    latency_ms: float
    baseline_ms: float
    ratio: float
    all_ms: float = 0.0
    all_baseline_ms: float = 0.0


@dataclass(frozen=True)
class Occasion(_Json):
    """One measurement at one moment, every file alone in its process: the unit that intervals are made of.

    Attributes:
        at: When it ended, in s since 1970.
        states: Figures by state of the machine, ``"quiet"``, ``"busy"`` or ``"shared"``.
    """

    at: float
    states: Mapping[str, Figures] = field(hash=False)


@dataclass(frozen=True)
class Measurement(_Json):
    """Latency of one engine file, measured interleaved with a baseline by `measurement.measure`.

    **What the interval means.** Where there are occasions, `ratio_low` to `ratio_high` is where the ratio of one
    further occasion is expected to lie, of the same files by one fresh process each, in turns, at another moment, with
    95 % confidence: a prediction interval over occasions (see `measurement.occasions`). It covers every state of the
    machine that was measured: its upper end is that of the least favourable one, and a limit is met when that end meets
    it. `low_ms` and `high_ms` are the same of the latency. `expected_low` to `expected_high` is the wider one of a
    further measurement that times one file after the other: what the machine does in the seconds between is in it.
    Without occasions (tables, throughput, results of old releases) all of them are the bootstrap interval of the median
    over the rounds of one moment, which says nothing of the next hour.

    Attributes:
        latency_ms: Median over all iterations of one inference call of `batch_size` samples.
        p90_ms, p95_ms, p99_ms: Percentiles of the same samples.
        mad_ms: Median absolute deviation.
        n: Number of timed iterations.
        low_ms, high_ms: 95 % interval of the median; see above.
        ratio: Median over rounds of this engine's median divided by the baseline's in the same round; below 1 is
            faster.
        ratio_low, ratio_high: 95 % interval of `ratio`; see above.
        baseline_ms: The baseline's median in the same interleaved run.
        noisy: Whether the figures are not to be trusted to the last digits, after measuring longer: the interval stayed
            wider than the protocol allows, the median drifted, or something took a share of the processor.
        batch_size, threads: As the engine was opened.
        noise: What disturbed the measurement, in words; may name something that did no harm.
        aa_ratio, aa_low, aa_high: The baseline against itself in the same rounds, and its bootstrap 95 % interval.
        mode: ``"latency"``, or ``"throughput"``, where `latency_ms` is that of a call among `streams` at once and
            `ratio` is of the time per sample, so that below 1 is faster all the same.
        streams: Calls in flight at once.
        throughput_per_s: Samples a second; None in results of old releases.
        energy_mj: Energy of one call, idle share included; None where the device does not tell.
        gpu: Of a GPU: clocks (``sm_mhz``: lowest and highest), temperature, power, why the driver held it back, and
            whether its clock was locked; None for engines of the processor.
        source: ``"measured"`` on the run's device; ``"predicted"`` from a latency table, without running anything; or
            ``"elsewhere"``, measured on another device than the run's other figures.
        occasions: Every moment at which it was measured.
        states: Ratio and the bounds of its interval by state of the machine; `ratio` and `latency_ms` are the quiet
            one's.
        expected_low, expected_high: See above; `ratio_low` and `ratio_high` where nothing more is known.
    """

    latency_ms: NotNegative
    p90_ms: NotNegative
    p95_ms: NotNegative
    p99_ms: NotNegative
    mad_ms: NotNegative
    n: Count
    low_ms: NotNegative
    high_ms: NotNegative
    ratio: NotNegative
    ratio_low: NotNegative
    ratio_high: NotNegative
    baseline_ms: NotNegative
    noisy: bool
    batch_size: Count
    threads: Count
    noise: tuple[str, ...] = ()
    aa_ratio: float = 1.0
    aa_low: float = 1.0
    aa_high: float = 1.0
    mode: str = "latency"
    streams: int = 1
    throughput_per_s: float | None = None
    energy_mj: float | None = None
    gpu: Mapping[str, Any] | None = None
    source: str = MEASURED
    occasions: tuple[Occasion, ...] = ()
    states: Mapping[str, tuple[float, float, float]] = field(default_factory=dict, hash=False)
    expected_low: float = 0.0
    expected_high: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise", tuple(self.noise))
        object.__setattr__(self, "occasions", tuple(self.occasions))
        if not self.expected_high:
            object.__setattr__(self, "expected_low", self.ratio_low)
            object.__setattr__(self, "expected_high", self.ratio_high)

    @property
    def quiet(self) -> tuple[float, float, float]:
        """Ratio and the bounds of its interval on the quiet machine, or of all where states were not told apart."""
        known = (self.states[state] for state in (QUIET, SHARED) if state in self.states)
        return next(known, (self.ratio, self.ratio_low, self.ratio_high))

    @property
    def worst_ratio(self) -> float:
        """The ratio in the least favourable state of the machine."""
        return max((middle for middle, _, _ in self.states.values()), default=self.ratio)

    def expects(self, later: Measurement) -> bool:
        """Whether the ratio of a later measurement lies where this one expects it."""
        return self.expected_low <= later.ratio <= self.expected_high

    @property
    def span_s(self) -> float:
        """Seconds from the first occasion to the last; 0 for one or none."""
        moments = [occasion.at for occasion in self.occasions]
        return max(moments) - min(moments) if moments else 0.0

    @classmethod
    def predicted(
        cls, ratio: tuple[float, float, float], baseline_ms: float, *, batch_size: int, threads: int
    ) -> Measurement:
        """Return what a prediction of a ratio, with the bounds of its 95 % interval, comes to; `n` is 0."""
        middle, low, high = (one * baseline_ms for one in ratio)
        return cls(
            latency_ms=middle, p90_ms=middle, p95_ms=middle, p99_ms=middle, mad_ms=0.0, n=0, low_ms=low, high_ms=high,
            ratio=ratio[0], ratio_low=ratio[1], ratio_high=ratio[2], baseline_ms=baseline_ms, noisy=False,
            batch_size=batch_size, threads=threads, source=PREDICTED,
        )  # fmt: skip

    @property
    def verdict(self) -> str:
        """``"faster"``, ``"slower"`` or ``"equal"`` (within `EQUAL`) to the baseline, or ``"unsure"``.

        The interval of the ratio must clear `SAME_FILE`. That of one moment is widened by what the baseline differed
        from itself by; between occasions it holds what a file differs from its copy by.
        """
        spread = 1.0 if self.occasions else max(self.aa_high, 1 / self.aa_low if self.aa_low > 0 else math.inf)
        low, high = self.ratio_low / spread, self.ratio_high * spread
        if high * (1 + SAME_FILE) < 1:
            return "faster"
        if low > 1 + SAME_FILE:
            return "slower"
        return "equal" if low * (1 + EQUAL) >= 1 and high <= 1 + EQUAL else "unsure"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, with the verdict for readers of it."""
        data = super().to_dict()
        data |= {"noise": list(self.noise), "occasions": list(data["occasions"]), "verdict": self.verdict}
        data["states"] = {state: list(interval) for state, interval in self.states.items()}
        return data


@dataclass(frozen=True)
class TrialRecord:
    """One candidate and everything measured of it.

    Attributes:
        number: Optuna's trial number; also names the artefact folder.
        policy: What was done to the model.
        state: ``"complete"``, ``"failed"``, or ``"rejected"``: at first sight too far behind to be built.
        stage: ``"proxy"`` (reconstructed, not trained) or ``"recovered"`` (fine-tuned).
        accuracy: The task's metric on VALIDATION data, computed by the engine file itself, in [0, 1]; higher is better.
            Of a rejected one an estimate from its first samples, in torch.
        measurement: Latency of the engine file; None when failed or rejected.
        size_bytes: Bytes of the engine's files on disk.
        macs, params: Multiply-accumulates of one sample, and parameters, of the compressed network.
        seconds: Wall time by activity (``apply``, ``proxy``, ``export``, ``build``, ``measure``, ``recovery``).
        error: The error's class and message when failed.
        artifact: Folder with the files, relative to the run directory.
        predicted_ratio: What `measurement.ratio` was predicted to be before it was measured; None where it was not.
        layer_ms: What each layer takes of the latency, going by the engine's profiler; empty where that was not asked.
        samples: Validation samples that `accuracy` is of; None where that was not kept.
        metric: What the task calls `accuracy`, as ``"cosine"``; None except in the baseline's record.
        sha256: Of the artefact's ``engine.json``, which names the hashes of its files; None where there is none, and in
            results of old releases.
        choices: Of a trial, by parameter of the search space; None otherwise, and in results of old releases.
    """

    number: Count
    policy: CompressionPolicy
    state: Literal["complete", "failed", "rejected"]
    stage: str = "proxy"
    accuracy: float | None = None
    measurement: Measurement | None = None
    size_bytes: Count | None = None
    macs: Count | None = None
    params: Count | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    artifact: RelativeFolder | None = None
    predicted_ratio: float | None = None
    layer_ms: Mapping[str, float] = field(default_factory=dict)
    samples: Count | None = None
    metric: str | None = None
    sha256: str | None = None
    choices: Mapping[str, str | int | float | bool] | None = field(default=None, compare=False)

    @property
    def latency_ms(self) -> float | None:
        """Median latency, or None when failed."""
        return None if self.measurement is None else self.measurement.latency_ms

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["policy"] = self.policy.to_dict()
        data["measurement"] = None if self.measurement is None else self.measurement.to_dict()
        data["seconds"], data["layer_ms"] = dict(self.seconds), dict(self.layer_ms)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: object = "A trial's record") -> Self:
        """Read the JSON form; `source` is how messages name the file or line.

        Raises:
            ConfigError: A key is missing, a value is not of its type or range, or the policy is of a newer release.
        """
        with reading(source):
            if not isinstance(data, Mapping):
                raise ConfigError(f"{source} is a mapping of keys, found {type(data).__name__}.")
            if "policy" not in data:
                raise ConfigError(f"{source} lacks 'policy'.")
            try:
                policy = CompressionPolicy.from_dict(data["policy"])
            except ConfigError as error:
                raise ConfigError(f"{source}: {error}") from error
            return validated(cls, {**data, "policy": policy}, source)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a record's file.

        Raises:
            ConfigError: It is missing or damaged, or of a newer release; names file, key and value.
        """
        return cls.from_dict(read_json(path), path)
