"""The schemas of a run's summaries: ``summary.json``, ``env.json``, ``offered.json``.

Every key may be missing, as releases add some; a key that is there has its type. Keys that this release does not know
are kept. Documents are written by those who fill them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from autocompress.documents import Count, NotNegative, validated
from autocompress.files import read_json
from autocompress.runs.directory import RunDirectory

SUMMARY_NAME, ENVIRONMENT_NAME, OFFERED_NAME = "summary.json", "env.json", "offered.json"
_KEEP = ConfigDict(extra="allow")
_Positive = Annotated[float, Field(gt=0)]
_Interval = tuple[float, float, float]


@with_config(_KEEP)
class _Network(TypedDict, total=False):
    accuracy: float | None
    validation_accuracy: float | None
    latency_ms: NotNegative | None
    size_bytes: Count | None
    macs: Count | None
    params: Count | None
    dtype: str


@with_config(_KEEP)
class _Best(_Network, total=False):
    trial: Count | None
    stage: str
    latency_ratio: NotNegative
    accuracy_drop_pp: float
    latency_ratio_interval: tuple[float, float] | None
    latency_states: dict[str, _Interval] | None
    latency_occasions: Count | None
    latency_span_s: NotNegative
    macs_ratio: NotNegative | None
    feasible: bool
    verified: bool
    latency_source: str
    path: str


@with_config(_KEEP)
class _Limits(TypedDict, total=False):
    latency_ms: _Positive | None
    latency_ratio: _Positive | None
    max_drop: NotNegative | None
    size_bytes: _Positive | None
    latency_state: str


@with_config(_KEEP)
class _Missed(TypedDict, total=False):
    limit: str
    reached: float
    allowed: float
    unit: str
    over: float
    upper: float
    state: str


@with_config(_KEEP)
class _Alternative(TypedDict, total=False):
    trial: Count | None
    latency_ratio: NotNegative
    accuracy: float
    drop: float
    size_bytes: Count | None
    slowest_layers: dict[str, float] | None


@with_config(_KEEP)
class _Prediction(TypedDict, total=False):
    screened_out: Count | None
    rejected: Count | None
    mape: float | None


@with_config(_KEEP)
class SummaryDocument(TypedDict, total=False):
    """What ``summary.json`` says."""

    run_dir: str
    task: str | None
    model: str | None
    engine: str | None
    device: str | None
    threads: Count | None
    batch_size: Count | None
    metric: str | None
    baseline: _Network | None
    best: _Best | None
    constraints: _Limits | None
    missed: list[_Missed] | None
    fastest_within_drop: _Alternative | None
    most_accurate_within_latency: _Alternative | None
    lowest_ratio: NotNegative | None
    last_error: str | None
    n_trials: Count
    n_failed: Count
    prediction: _Prediction | None
    explanation: list[dict[str, str | bool | int | float | None]] | None
    seconds: dict[str, NotNegative | None] | None


@with_config(_KEEP)
class _Device(TypedDict, total=False):
    gpu: dict[str, Any] | None


@with_config(_KEEP)
class EnvironmentDocument(TypedDict, total=False):
    """What ``env.json`` says."""

    device: _Device | None


_Offered = dict[str, list[bool | int | float | str]]


def read_summary(run: RunDirectory) -> dict[str, Any]:
    """Return a run's summary; empty while it has none.

    Raises:
        ConfigError: It is damaged; names file, key and value.
    """
    path = run.path / SUMMARY_NAME
    return cast(dict[str, Any], validated(SummaryDocument, read_json(path), path)) if path.exists() else {}


def read_environment(run: RunDirectory) -> dict[str, Any]:
    """Return what a run ran on; empty where it does not say.

    Raises:
        ConfigError: The document is damaged.
    """
    path = run.path / ENVIRONMENT_NAME
    return cast(dict[str, Any], validated(EnvironmentDocument, read_json(path), path)) if path.exists() else {}


def read_offered(run: RunDirectory) -> Mapping[str, list[bool | int | float | str]] | None:
    """Return the choices that a latency table left of the search space; None where it left all of them.

    Raises:
        ConfigError: The document is damaged.
    """
    path = run.path / OFFERED_NAME
    return validated(_Offered, read_json(path), path) if path.exists() else None
