"""A latency table as the search uses it: found, checked against this device, and learned from.

`latency.table` owns the file; `search.profiling` fills it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from autocompress.compress.shapes import LayerShape
from autocompress.config import RunConfig
from autocompress.errors import ConfigError, TableMismatchError
from autocompress.graphs import GraphBuilder
from autocompress.latency.fingerprint import device_fingerprint
from autocompress.latency.predictor import LatencyPredictor, Observation
from autocompress.latency.table import LatencyTable, find_table
from autocompress.latency.table_rows import LayerRow, NetworkRow
from autocompress.latency.unit_times import LayerTime
from autocompress.latency.units import Layout
from autocompress.policy import CompressionPolicy
from autocompress.search.observer import Observer

AUTO, NONE = "auto", "none"


# A measurement in which the uncompressed network was slower than usual by this: something else was running, and two
# networks do not slow down alike. (A ratio of 1.2 became 0.9 beside a program that halved the speed.)
DISTURBED, _DOUBT = 1.12, 0.15


def observations(rows: Sequence[NetworkRow], usual_ms: float | None = None) -> list[Observation]:
    """Return what a predictor learns from rows of one network; those that the engine refused teach nothing.

    `usual_ms` is the uncompressed network's usual latency, by default its median over the rows.
    """
    known = [row for row in rows if row.ok]
    if not known:
        return []
    usual = usual_ms or median(row.baseline_ms for row in known)
    return [
        Observation(
            row.policy,
            row.ratio,
            max((row.ratio_high - row.ratio_low) / 4, _DOUBT * row.ratio * (row.baseline_ms > DISTURBED * usual)),
        )
        for row in known
    ]


def uncompressed(dense_dtype: str) -> Observation:
    """Return what is known without measuring: the uncompressed network's ratio to itself."""
    return Observation(CompressionPolicy(dense_dtype=dense_dtype), 1.0, 0.003)


def layer_times(rows: Sequence[LayerRow], layout: Layout) -> list[LayerTime]:
    """Return what a predictor learns from layers' rows; layers that the model does not have are left out."""
    found = []
    for row in rows:
        shape = LayerShape(row.in_channels, row.out_channels, row.ranks, row.dtype)
        unit = layout.unit(row.layer, shape, inputs_int8=row.inputs_int8, outputs_int8=row.outputs_int8)
        if unit is not None:
            found.append(LayerTime(unit, row.time_ms / row.baseline_ms, row.time_ms))
    return found


def predictor_from(table: LatencyTable, layout: Layout, dense_dtype: str) -> LatencyPredictor:
    """Return a predictor that knows every network of this model and dense dtype in a table, the held-out ones too."""
    predictor = LatencyPredictor(layout)
    predictor.observe([uncompressed(dense_dtype)])
    own = table.of_network(layout.hash)
    predictor.observe(observations([row for row in own.networks if row.policy.dense_dtype == dense_dtype]))
    predictor.observe_layers(layer_times([row for row in own.layers if row.dense_dtype == dense_dtype], layout))
    return predictor


def open_predictor(
    graphs: GraphBuilder, config: RunConfig, engine_version: str, dense_dtype: str, observer: Observer
) -> LatencyPredictor:
    """Return a predictor with what the table of this device knows of this model; an empty one where there is none.

    `config.table` names a file, or ``"auto"``: the user's table of this device, else one that was shipped.

    Raises:
        TableMismatchError: The table that was named is of another device, engine or thread count.
        ConfigError: It is damaged, or knows nothing of this model.
        ExportError: The model's structure cannot be read off a graph.
    """
    layout = graphs.layout
    if config.table == NONE:
        return LatencyPredictor(layout)
    device = device_fingerprint()
    named = config.table != AUTO
    path: Path | None = Path(config.table)
    if not named:
        path = find_table(config.engine, device, layout.hash, threads=config.threads, batch_size=config.batch_size)
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
