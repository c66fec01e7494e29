"""How long, how often and in which mode engines are timed. Plain data; `measurement.measure` obeys it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from autocompress.errors import ConfigError, nearest

LATENCY, THROUGHPUT = "latency", "throughput"
# A baseline slower than usual by this was disturbed. Two networks do not slow down alike: beside a program that halved
# the speed of one, ratios of 0.49 and 1.59 became 0.37 and 1.32.
DISTURBED = 1.12
WARM_UP_PATIENCE = 4
# Half-width of the interval of one occasion's ratio above which that occasion is noisy: what counts is the interval
# between occasions.
_NOISE = 0.1
# Rounds of one occasion, at least: its ratio is a median over them.
_LEAST_ROUNDS = 4


@dataclass(frozen=True)
class Protocol:
    """How long and how often to time.

    Attributes:
        warm_up_s: Untimed running of each engine before the first round, at least one iteration; up to
            `WARM_UP_PATIENCE` times as long until the median of its windows settles. Of an engine that is open more
            than once, that is for the first instance; the others share about as much again.
        min_iterations, min_seconds: Timed work of each engine, at least both, spread over the rounds.
        rounds: Interleaved rounds before noise is judged. More and shorter ones pair the engines better on a busy
            machine (a file against itself: standard deviation of the ratio 0.9 % with 10, 0.4 % with 20).
        max_seconds: Timed seconds of each engine after which measuring stops although noisy. Rounds beyond `rounds` are
            made so long that a few dozen reach it.
        noise_limit: Half-width of the 95 % interval of the ratio to the baseline, relative to the ratio (of the
            latency for one engine alone), above which a result is noisy.
        seed: Of the bootstrap.
        mode: ``"latency"``, one call at a time, or ``"throughput"``, several streams side by side.
        streams: Inference calls in flight in throughput mode; None for as many as the processors hold.
        baseline_instances, instances: How often the baseline, and each other engine, is opened in latency mode. Where
            its weights come to lie in memory makes one opened engine a few per cent faster than another of the same
            file (VGG-11 in OpenVINO: standard deviation 1.5 to 3.5 %). Rounds take them in turns.
        usual_ms: What the baseline takes when nothing disturbs it; 0 when that is not known. Rounds in which it took
            over `DISTURBED` times as long are taken anew.
        patience_s: How long may be spent on that; then all rounds count, and the result says so.
        occasions: Moments at which every file is timed alone in a process of its own, with fresh inputs, as it is where
            it is deployed; the timed work above is of all of them. 0 times all files in one process at one moment, with
            one input: enough for a table's thousands of networks, whose errors are independent.
        max_occasions: Taken while the interval between them is wider than `precision`.
        precision: Half-width of the interval of the ratio, relative to it, at which no more occasions are taken.
        restart: Whether every occasion starts processes anew; else they stay for the next measurement.
        beside_busy: Whether each occasion is repeated for half as long while another process keeps a neighbouring
            processor busy: what the ratio is where the core is shared.
        deviation, freedom: What log ratios of one file are known to differ by between occasions on this machine
            (standard deviation), and the degrees of freedom it is known with; 0 for unknown. See `occasions`.
        crossed: The same where the two latencies are of successive occasions.
    """

    warm_up_s: float = 0.2
    min_iterations: int = 50
    min_seconds: float = 1.0
    rounds: int = 20
    max_seconds: float = 4.0
    noise_limit: float = 0.02
    seed: int = 0
    mode: str = LATENCY
    streams: int | None = None
    baseline_instances: int = 5
    instances: int = 5
    usual_ms: float = 0.0
    patience_s: float = 6.0
    occasions: int = 0
    max_occasions: int = 0
    precision: float = 0.04
    restart: bool = True
    beside_busy: bool = False
    deviation: float = 0.0
    freedom: float = 0.0
    crossed: float = 0.0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        for name in (
            "warm_up_s", "min_seconds", "max_seconds", "seed", "usual_ms", "patience_s",
            "occasions", "max_occasions", "deviation", "freedom",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ConfigError(f"Latency protocol: {name} must be at least 0, not {getattr(self, name)!r}.")
        for name in ("min_iterations", "rounds", "baseline_instances", "instances"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"Latency protocol: {name} must be at least 1, not {getattr(self, name)!r}.")
        for name in ("noise_limit", "precision"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"Latency protocol: {name} must be above 0, not {getattr(self, name)!r}.")
        if self.mode not in (LATENCY, THROUGHPUT):
            raise ConfigError(
                f"Latency protocol: unknown mode {self.mode!r}.{nearest(str(self.mode), (LATENCY, THROUGHPUT))}"
            )
        if self.streams is not None and not self.streams >= 1:
            raise ConfigError(f"Latency protocol: streams must be at least 1, not {self.streams!r}.")
        if self.streams is not None and self.mode == LATENCY:
            raise ConfigError(
                f"{self.streams} streams are for the throughput mode; latency is that of one call at a time. Add "
                "--throughput, or leave --streams away."
            )

    @classmethod
    def quick(cls, **changes: Any) -> Self:
        """Return the protocol for tables of many small engines: 0.3 s of each, 0.4 s when noisy."""
        values: dict[str, Any] = {
            "warm_up_s": 0.04,
            "min_iterations": 20,
            "min_seconds": 0.2,
            "rounds": 10,
            "max_seconds": 0.25,
            "noise_limit": 0.03,
            "patience_s": 8.0,
            "instances": 1,
        }
        return cls(**{**values, **changes})

    @classmethod
    def standard(cls, **changes: Any) -> Self:
        """Return the protocol of what is reported, offered and deployed: four occasions, or up to six."""
        values: dict[str, Any] = {
            "warm_up_s": 0.1, "min_iterations": 60, "min_seconds": 1.0, "rounds": 24, "max_seconds": 1.0,
            "occasions": 4, "max_occasions": 6, "precision": 0.04, "beside_busy": True, "patience_s": 1.0,
        }  # fmt: skip
        return cls(**{**values, **changes})

    @classmethod
    def again(cls, occasions: int = 3) -> Self:
        """Return the standard protocol for further occasions of what a run has measured before, or will again.

        Each is a third of a second long, however few they are.
        """
        return cls.standard(
            occasions=occasions, max_occasions=occasions, rounds=8 * occasions, min_iterations=20 * occasions,
            min_seconds=occasions / 3, max_seconds=occasions / 3,
        )  # fmt: skip

    @classmethod
    def trial(cls) -> Self:
        """Return the protocol of a search's trials: one occasion of 0.3 s of each engine, half of that beside a load.

        It orders candidates; those that are to be fine-tuned or offered are measured by the standard one.
        """
        return cls(
            warm_up_s=0.05, min_iterations=20, min_seconds=0.25, rounds=6, max_seconds=0.25, noise_limit=0.03,
            patience_s=0.5, occasions=1, max_occasions=1, restart=False, beside_busy=True,
        )  # fmt: skip

    def occasion(self) -> Self:
        """Return what is timed on one of the occasions: an equal share of the rounds, an even number of them."""
        count = max(1, self.occasions)
        rounds = max(_LEAST_ROUNDS, -(-self.rounds // count))
        return replace(
            self, rounds=rounds + rounds % 2, min_iterations=-(-self.min_iterations // count),
            min_seconds=self.min_seconds / count, max_seconds=self.max_seconds / count, baseline_instances=1,
            instances=1, occasions=0, noise_limit=_NOISE,
        )  # fmt: skip

    def loaded(self) -> Self:
        """Return what is timed beside a busy processor: half of an occasion, as it comes."""
        half = replace(self, usual_ms=0.0, patience_s=0.0, warm_up_s=0.0, min_seconds=self.min_seconds / 2)
        return replace(
            half, rounds=_LEAST_ROUNDS, min_iterations=self.min_iterations // 2 + 1, max_seconds=half.min_seconds
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form.

        Raises:
            ConfigError: An unknown key, or a value out of range.
        """
        names = {f.name for f in fields(cls)}
        for key in data:
            if key not in names:
                raise ConfigError(f"Latency protocol: unknown key {key!r}. Allowed: {', '.join(sorted(names))}.")
        return cls(**data)
