"""A latency table as the search uses it: found, checked against this device, and learned from.

`prediction.table` owns the file; `evaluation.profiler` fills it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from autocompress.config import ANY_TABLE, NO_TABLE, RunConfig
from autocompress.engines import engine_class
from autocompress.engines.tensorrt.options import TensorRTOptions
from autocompress.errors import ConfigError, TableMismatchError
from autocompress.graph.builder import GraphBuilder
from autocompress.graph.layout import Layout, Unit
from autocompress.measurement.fingerprint import device_fingerprint
from autocompress.measurement.statistics import quiet_latency
from autocompress.policy import CompressionPolicy
from autocompress.prediction.layer_times import LayerTime
from autocompress.prediction.predictor import LEAST_NETWORKS, LatencyPredictor, Observation, Prediction, PredictionError
from autocompress.prediction.remote_device import RemoteDevicePredictor
from autocompress.prediction.table import LatencyTable, find_table, table_path
from autocompress.prediction.table_rows import LayerRow, NetworkRow
from autocompress.runs.observer import Observer

# A baseline slower than usual by this spoils what was measured beside it. Less is often the whole machine's pace, which
# ratios do not feel.
SPOILED = 1.5


def observations(rows: Sequence[NetworkRow], usual_ms: float | None = None) -> list[Observation]:
    """Return what a predictor learns from rows of one network; those that the engine refused teach nothing.

    Where the uncompressed network was disturbed, the ratio may be off by as much: what disturbs one network may leave
    another alone.
    `usual_ms` is the uncompressed network's usual latency, by default as the rows tell it.
    """
    known = [row for row in rows if row.ok]
    if not known:
        return []
    quiet = usual_ms or quiet_latency([row.baseline_ms for row in known])
    slower = [row.baseline_ms / quiet for row in known]
    doubts = [factor - 1 if factor > SPOILED else 0.0 for factor in slower]
    return [
        Observation.of(row.policy, row.ratio, row.ratio_low, row.ratio_high, least=doubt)
        for row, doubt in zip(known, doubts, strict=True)
    ]


def uncompressed(dense_dtype: str) -> Observation:
    """Return what is known without measuring: the uncompressed network's ratio to itself."""
    return Observation(CompressionPolicy(dense_dtype=dense_dtype), 1.0, 0.003)


def layer_times(
    rows: Sequence[LayerRow], networks: Sequence[NetworkRow], layout: Layout, usual_ms: float | None = None
) -> list[LayerTime]:
    """Return the layers' times of a table for a predictor.

    Left out are rows of networks that are not among these, and of measurements that were disturbed.
    """
    policies = {row.policy.hash: row.policy for row in networks}
    baselines = [row.baseline_ms for row in networks if row.ok]
    quiet = usual_ms or (quiet_latency(baselines) if baselines else math.inf)
    known: dict[str, dict[str, Unit]] = {}
    found = []
    for row in rows:
        if row.policy not in known:
            units = layout.units(policies[row.policy]) if row.policy in policies else ()
            known[row.policy] = {unit.layer: unit for unit in units}
        if row.layer in known[row.policy] and row.baseline_ms <= SPOILED * quiet:
            unit = known[row.policy][row.layer]
            found.append(LayerTime(unit, row.time_ms / row.baseline_ms, row.time_ms, row.policy))
    return found


def predictor_from(table: LatencyTable, layout: Layout, dense_dtype: str, *, held_out: bool = True) -> LatencyPredictor:
    """Return a predictor of what a table knows of this model and dense dtype, with the held-out networks or without.

    It knows the uncompressed network in any case.
    """
    predictor = LatencyPredictor(layout)
    predictor.observe([uncompressed(dense_dtype)])
    own = table.of_network(layout.hash)
    known = [row for row in own.networks if row.policy.dense_dtype == dense_dtype]
    predictor.observe(observations([row for row in known if held_out or not row.held_out]))
    predictor.observe_layers(layer_times(own.layers, known, layout))
    return predictor


@dataclass(frozen=True)
class Profile:
    """What a table knows of one model.

    Attributes:
        table: The whole of it, other networks included.
        path: Its file.
        network: Hash of this model's layout.
        predictor: Fitted to what is not held out.
        predictions: Of the held-out networks, with their rows.
        error: Over these; None while too few are known.
        seconds: Spent measuring in this session.
        added: Networks measured in this session.
    """

    table: LatencyTable
    path: Path
    network: str
    predictor: LatencyPredictor
    predictions: tuple[tuple[NetworkRow, Prediction], ...]
    error: PredictionError | None
    seconds: float = 0.0
    added: int = 0

    @classmethod
    def of(cls, table: LatencyTable, path: Path, predictor: LatencyPredictor, dense_dtype: str, **session: Any) -> Self:
        """Compare a predictor with the held-out networks of its model that are of this dense dtype."""
        network = predictor.layout.hash
        known = table.of_network(network).networks
        held = [row for row in known if row.held_out and row.ok and row.policy.dense_dtype == dense_dtype]
        predictions: tuple[tuple[NetworkRow, Prediction], ...] = ()
        error = None
        if predictor.ready and held:
            predictions = tuple((row, predictor.predict(row.policy)) for row in held)
            error = PredictionError.of([p for _, p in predictions], [row.ratio for row in held])
        return cls(table, path, network, predictor, predictions, error, **session)

    @property
    def networks(self) -> int:
        """Forms of this model in the table."""
        return len(self.table.of_network(self.network).networks)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; what was measured is in the table's file."""
        own = self.table.of_network(self.network)
        return {
            "table": str(self.path),
            "network": self.network,
            "networks": len(own.networks),
            "unsupported": sum(not row.ok for row in own.networks),
            "held_out_error": None if self.error is None else self.error.to_dict(),
            "leave_one_out_error": self.predictor.leave_one_out().to_dict() if self.predictor.ready else None,
            "baseline_ms": self.table.baseline_ms(self.network),
            "seconds": self.seconds,
            "added": self.added,
        }


def open_profile(graphs: GraphBuilder, config: RunConfig, folder: Path | None = None) -> Profile:
    """Return what the table of this device knows of a model, in the dense dtype that was measured last.

    Args:
        graphs: Of the model.
        config: Engine, threads, batch size.
        folder: Of all tables; None is the one in the user's cache, and after it the shipped ones.

    Raises:
        ConfigError: There is no table, or it is damaged, or knows nothing of this model.
        ExportError: The model's structure cannot be read off a graph.
    """
    layout, device = graphs.layout, device_fingerprint(gpu=engine_class(config.engine).uses_gpu)
    threads, batch_size = config.threads, config.batch_size
    path = find_table(config.engine, device, layout.hash, folder, threads=threads, batch_size=batch_size)
    if path is None:
        wanted = table_path(config.engine, device, folder, threads=threads, batch_size=batch_size)
        raise ConfigError(f"No latency table knows this model; {wanted} would. Make it with 'autocompress profile'.")
    table = LatencyTable.load(path)
    dense_dtype = table.of_network(layout.hash).networks[-1].policy.dense_dtype
    return Profile.of(table, path, predictor_from(table, layout, dense_dtype, held_out=False), dense_dtype)


def open_ahead(graphs: GraphBuilder, config: RunConfig, engine_version: str) -> RemoteDevicePredictor:
    """Return what the table that `config.table` names says of the GPUs that engines are built for.

    Raises:
        ConfigError: No table is named, it is damaged, or knows too little of this model.
        TableMismatchError: It is of another engine or version, or of a GPU that is not built for.
        ExportError: The model's structure cannot be read off a graph.
    """
    chosen = TensorRTOptions.from_settings(config.engine_options).compute_capability
    targets = ", ".join(map(str, chosen))
    if config.table in (ANY_TABLE, NO_TABLE):
        raise ConfigError(
            f"Latency cannot be measured here for compute capability {targets}, so it is predicted from a table of "
            f"that GPU, and none was named. Make one there ('autocompress profile --engine {config.engine}') and give "
            "it with --table FILE; or search on this machine's own engine and build its front with 'autocompress "
            "build'."
        )
    path = Path(config.table)
    table = LatencyTable.load(path)
    # The device is another one by intent; what it must be is the GPU that is built for.
    table.check(
        table.device, config.engine, engine_version, config.threads, config.batch_size,
        allow_foreign=config.allow_foreign_table,
    )  # fmt: skip
    gpu = (table.device.get("gpu") or {}).get("compute_capability")
    if gpu not in {str(target) for target in chosen} and not config.allow_foreign_table:
        raise TableMismatchError(
            f"Latency table {path} is of compute capability {gpu or 'unknown'}, engines are built for {targets}. "
            f"Name the table of that GPU, or use this one with --allow-foreign-table."
        )
    return _frozen(table, path, graphs, config, "'autocompress profile' on the GPU adds more.")


def open_frozen(graphs: GraphBuilder, config: RunConfig, engine_version: str) -> RemoteDevicePredictor:
    """Return what the latency table of this device says of a model, for a search that measures nothing.

    `config.table` names a file, or ``"auto"``: the user's table of this device, else one that was shipped.

    Raises:
        ConfigError: There is no table, it is damaged, or knows too little of this model.
        TableMismatchError: It is of another device, engine, version or thread count.
        ExportError: The model's structure cannot be read off a graph.
    """
    layout, device = graphs.layout, device_fingerprint(gpu=engine_class(config.engine).uses_gpu)
    path: Path | None = Path(config.table)
    if config.table == ANY_TABLE:
        path = find_table(
            config.engine, device, layout.hash, threads=config.threads, batch_size=config.batch_size,
            engine_version=engine_version,
        )  # fmt: skip
    mend = f"'autocompress profile --engine {config.engine}' with the same task and space makes one."
    if path is None:
        raise ConfigError(f"A deterministic search is steered by a latency table, and none knows this model. {mend}")
    table = LatencyTable.load(path)
    table.check(
        device, config.engine, engine_version, config.threads, config.batch_size,
        allow_foreign=config.allow_foreign_table,
    )  # fmt: skip
    return _frozen(table, path, graphs, config, mend)


def _frozen(
    table: LatencyTable, path: Path, graphs: GraphBuilder, config: RunConfig, mend: str
) -> RemoteDevicePredictor:
    layout = graphs.layout
    dtypes = [row.policy.dense_dtype for row in table.of_network(layout.hash).networks]
    dense_dtype = config.dense_dtype if config.dense_dtype != "best" or not dtypes else dtypes[-1]
    predictor = predictor_from(table, layout, dense_dtype)
    baseline_ms = table.baseline_ms(layout.hash)
    if not predictor.ready or baseline_ms is None:
        raise ConfigError(
            f"Latency table {path} knows {dtypes.count(dense_dtype)} forms of this model in {dense_dtype}, too few to "
            f"predict the others; at least {LEAST_NETWORKS}, and the times of their layers, are needed. {mend}"
        )
    return RemoteDevicePredictor(predictor, dense_dtype, baseline_ms)


def open_predictor(
    graphs: GraphBuilder, config: RunConfig, engine_version: str, dense_dtype: str, observer: Observer
) -> LatencyPredictor | None:
    """Return a predictor with what the table of this device knows of this model; an empty one where there is none.

    `config.table` names a file, or ``"auto"``: the user's table of this device, else one that was shipped; or
    ``"none"``, for which None is returned: nothing is to be predicted.

    Raises:
        TableMismatchError: The table that was named is of another device, engine or thread count.
        ConfigError: It is damaged, or knows nothing of this model.
        ExportError: The model's structure cannot be read off a graph.
    """
    if config.table == NO_TABLE:
        return None
    layout = graphs.layout
    device = device_fingerprint(gpu=engine_class(config.engine).uses_gpu)
    named = config.table != ANY_TABLE
    path: Path | None = Path(config.table)
    if not named:
        path = find_table(
            config.engine, device, layout.hash, threads=config.threads, batch_size=config.batch_size,
            engine_version=engine_version,
        )  # fmt: skip
    if path is None:
        return LatencyPredictor(layout)
    table = LatencyTable.load(path)
    try:
        table.check(
            device, config.engine, engine_version, config.threads, config.batch_size,
            allow_foreign=config.allow_foreign_table,
        )  # fmt: skip
    except TableMismatchError as error:
        if named:
            raise
        # Nobody asked for it: an engine that was updated since, usually.
        observer.warn(f"Latency is not predicted at first. {error}")
        return LatencyPredictor(layout)
    if table.foreign:
        observer.warn(f"Predicted latencies are of another device ({path}): {'; '.join(table.differences)}.")
    predictor = predictor_from(table, layout, dense_dtype)
    if named and predictor.size <= 1:
        raise ConfigError(
            f"Latency table {path} knows nothing of this model in {dense_dtype}. It knows "
            f"{', '.join(table.names.values()) or 'no network at all'}; 'autocompress profile' adds this one."
        )
    return predictor
