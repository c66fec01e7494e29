"""The run file: everything a search needs, validated; unknown keys are errors that name the nearest known one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from autocompress import quantities
from autocompress.documents import parse_yaml, read_bytes, shown
from autocompress.errors import ConfigError, nearest

SAMPLERS = ("knapsack", "tpe", "nsga2", "gp", "random")

# Values of `RunConfig.table` that are no file: the user's table of this device, else a shipped one; no prediction.
ANY_TABLE, NO_TABLE = "auto", "none"

# Kept back of the timeout for what comes after search and training.
_RESERVE_SHARE, _RESERVE_MIN, _RESERVE_MAX = 0.05, 10.0, 60.0
# Seconds of a run from which there is time for another occasion whenever something is measured again: each takes two.
_MORE_OCCASIONS_S = (60.0, 120.0)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TaskConfig(_Section):
    """What is compressed: see `autocompress.tasks.load_task`."""

    name: str = "digits"
    model: str | None = None
    weights: str | None = None
    data: str | None = None
    metric: Literal["agreement", "top1", "cosine", "kl", "r2"] | None = None
    outputs: str | dict[str, str] | None = None
    length: int | None = Field(default=None, ge=1)
    validation_fraction: float | None = Field(default=None, gt=0, lt=0.5)
    calibration_size: int = Field(default=1024, ge=16)
    seed: int = 0


class QuantizationConfig(_Section):
    """How ranges of activations are set: see `autocompress.compress.calibrations`."""

    calibration: str = "mse"
    percentile: float = Field(default=99.99, gt=0, le=100)


# Passes over the training data of one fine-tuning.
DEFAULT_EPOCHS = 24.0


class RecoveryConfig(_Section):
    """How finalists are fine-tuned: see `autocompress.recovery.finetune`.

    `optimizer` and `learning_rate` (None) are found from the network unless given; `batch_size` is the most that a step
    takes, fewer where there are few samples. `epochs` (None) are `DEFAULT_EPOCHS` unless given, and under a time limit
    ten times as many, or as make 40,000 steps, so that the time is what ends the training. `mixtures` says when mixed
    inputs are learned from: ``"auto"`` where samples are few and inputs continuous.

    `distill` maps methods of distillation to their weights (None: the method's own), and may be written as a list of
    methods. `distill_at` maps modules of the teacher to those of the student; a list names both alike.
    """

    enabled: bool = True
    candidates: int = Field(default=3, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    share: float = Field(default=0.65, gt=0, lt=1)
    optimizer: Literal["auto", "sgd", "adamw"] = "auto"
    learning_rate: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=128, ge=2)
    weight_decay: float = Field(default=5e-4, ge=0)
    temperature: float = Field(default=4.0, gt=0)
    alpha: float = Field(default=0.9, ge=0, le=1)
    mixtures: Literal["auto", "never"] = "auto"
    distill: dict[str, float | None] = Field(default={"logits": None}, min_length=1)
    distill_at: dict[str, str] | None = None
    qat_fraction: float = Field(default=0.25, gt=0, le=1)
    qat: Literal["straight_through", "lsq"] = "straight_through"

    @property
    def whole_epochs(self) -> float:
        """Passes over the training data of a whole fine-tuning without a time limit."""
        return DEFAULT_EPOCHS if self.epochs is None else self.epochs

    @field_validator("distill", mode="before")
    @classmethod
    def _methods_without_weights(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        return dict.fromkeys(map(str, names)) if isinstance(names, list) else value

    @field_validator("distill")
    @classmethod
    def _weights_above_zero(cls, value: dict[str, float | None]) -> dict[str, float | None]:
        for name, weight in value.items():
            if weight is not None and not 0 < weight < math.inf:
                raise ValueError(f"the weight of {name!r} is {weight}; it must be above 0 (or leave the method out)")
        return value

    @field_validator("distill_at", mode="before")
    @classmethod
    def _modules_of_one_name(cls, value: Any) -> Any:
        return {str(name): str(name) for name in value} if isinstance(value, list) else value


class RunConfig(_Section):
    """One search run.

    Limits are kept as written (``"5ms"``, ``"0.5x"``, ``"1pp"``); the `latency_limit`, `drop_limit`, `size_limit` and
    `timeout_seconds` properties give them parsed, as `build_seconds` gives `build_timeout`, the most that one engine
    may take to build. `importance` stands in for the search space's own. Trials begin with `first_candidates`, what a
    good engineer tries, and end when nothing more can be won (`stop_early`). A latency limit is judged in the least
    favourable state of the machine that is measured, beside a busy processor, unless `latency_state` is ``"quiet"``. A
    `deterministic` search is steered by a latency table of this device alone, never by a clock: the same seed gives the
    same networks, also after interruptions; its latencies are predictions.
    """

    task: TaskConfig = TaskConfig()
    engine: str = "openvino"
    threads: int = Field(default=1, ge=1)
    batch_size: int = Field(default=1, ge=1)
    engine_options: dict[str, Any] = Field(default_factory=dict)
    dense_dtype: Literal["best", "fp32", "bf16", "fp16"] = "best"
    space: str = "default"
    importance: str | None = None
    target_latency: str | None = None
    max_drop: str | None = None
    max_size: str | None = None
    n_trials: int = Field(default=100, ge=1)
    timeout: str | None = None
    build_timeout: str | None = None
    sampler: str = "knapsack"
    first_candidates: bool = True
    stop_early: bool = True
    latency_state: Literal["worst", "quiet"] = "worst"
    seed: int = 0
    deterministic: bool = False
    table: str = ANY_TABLE
    allow_foreign_table: bool = False
    validation_limit: int = Field(default=5000, ge=1)
    quantization: QuantizationConfig = QuantizationConfig()
    recovery: RecoveryConfig = RecoveryConfig()

    @field_validator("sampler")
    @classmethod
    def _known_sampler(cls, value: str) -> str:
        if value not in SAMPLERS:
            raise ValueError(f"unknown sampler {value!r}.{nearest(value, SAMPLERS)}")
        return value

    @field_validator("target_latency", "max_drop", "max_size", "timeout", "build_timeout", mode="before")
    @classmethod
    def _number_without_unit(cls, value: Any) -> Any:
        # YAML reads `timeout: 90` as a number; as text, the parser below names the units to choose from.
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @property
    def latency_limit(self) -> quantities.Limit | None:
        """Latency bound of one inference call, in ms or relative to the baseline."""
        return None if self.target_latency is None else quantities.parse_latency(self.target_latency)

    @property
    def drop_limit(self) -> float | None:
        """Largest allowed loss of the metric, as a fraction."""
        return None if self.max_drop is None else quantities.parse_drop(self.max_drop)

    @property
    def size_limit(self) -> quantities.Limit | None:
        """Size bound of the engine's files, in bytes or relative to the baseline."""
        return None if self.max_size is None else quantities.parse_size(self.max_size)

    @property
    def timeout_seconds(self) -> float | None:
        """Wall time for the whole run, recovery included."""
        return None if self.timeout is None else quantities.parse_duration(self.timeout)

    @property
    def build_seconds(self) -> float | None:
        """The longest that one engine may take to build; None finds it from the network's size and what is left."""
        return None if self.build_timeout is None else quantities.parse_duration(self.build_timeout, "build_timeout")

    @property
    def occasions(self) -> int:
        """Moments at which what was measured before is measured again; a short run has no time for many."""
        seconds = math.inf if self.timeout_seconds is None else self.timeout_seconds
        return 1 + sum(seconds >= least for least in _MORE_OCCASIONS_S)

    @property
    def working_seconds(self) -> float | None:
        """The part of it for search and training; the rest is for the test data, the verification and the report."""
        total = self.timeout_seconds
        if total is None:
            return None
        return total - min(max(_RESERVE_SHARE * total, _RESERVE_MIN), _RESERVE_MAX, total / 2)


def load_config(
    file: Path | None = None, overrides: Mapping[str, Any] | None = None, sets: Sequence[str] = ()
) -> RunConfig:
    """Read a run file and lay overrides over it.

    Args:
        file: YAML run file, or None for the defaults.
        overrides: Top-level keys from options; None values are skipped.
        sets: ``"dotted.key=value"`` texts, applied last; values are read as YAML scalars.

    Raises:
        ConfigError: The file is missing or not YAML, a key is unknown, or a value is out of range; names the key path.
    """
    data: dict[str, Any] = {}
    source = "the options" if file is None else str(file)
    if file is not None:
        if not file.exists():
            raise ConfigError(f"Run file {file} does not exist.")
        loaded = parse_yaml(read_bytes(file), f"Run file {file}")
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"Run file {file} must be a mapping of keys, found {type(loaded).__name__}.")
        data = loaded or {}
    for key, value in (overrides or {}).items():
        if value is not None:
            _assign(data, key, value)
    for text in sets:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {text!r} must be written key=value, such as --set task.data=cifar10.tar.")
        _assign(
            data,
            key.strip(),
            parse_yaml(value, f"--set {text!r}: the value is not a YAML scalar:") if value else None,
        )
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from error
    # Parsing here makes every bad limit an error before anything is loaded.
    _ = (
        config.latency_limit, config.drop_limit, config.size_limit, config.timeout_seconds, config.build_seconds,
    )  # fmt: skip
    if config.deterministic and config.timeout is not None:
        raise ConfigError(
            f"deterministic and timeout = {config.timeout!r} exclude each other: a clock ends a search elsewhere every "
            "time. Leave --timeout away, and bound the search with --n-trials and recovery.epochs."
        )
    if config.deterministic and config.sampler != "knapsack":
        raise ConfigError(
            f"deterministic needs the sampler 'knapsack'; {config.sampler!r} proposes something else once it was "
            "interrupted."
        )
    if config.deterministic and config.table == NO_TABLE:
        raise ConfigError(f"deterministic needs a latency table to be steered by; table is {NO_TABLE!r}.")
    return config


def _assign(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        child = data.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{dotted!r} cannot be set: {parent!r} is not a section.")
        data = child
    data[last] = value


def _explain(error: ValidationError, source: str) -> str:
    lines = []
    for item in error.errors():
        path = [str(p) for p in item["loc"]]
        if item["type"] == "extra_forbidden":
            section: type[BaseModel] = RunConfig
            for part in path[:-1]:
                inner = section.model_fields[part].annotation
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    section = inner
            lines.append(f"unknown key {'.'.join(path)!r}.{nearest(path[-1], section.model_fields)}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{'.'.join(path)} = {shown(item['input'])}: {message}")
    return f"In {source}: " + "; ".join(lines)
