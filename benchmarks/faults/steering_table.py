"""A latency table of this machine whose kernels take exactly what their arithmetic says, for deterministic searches."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from autocompress.compress import rewrite
from autocompress.engines import get_engine
from autocompress.evaluation.profiler import random_choices
from autocompress.graph.builder import GraphBuilder
from autocompress.graph.layout import Unit
from autocompress.measurement.fingerprint import device_fingerprint
from autocompress.model.inventory import take_inventory
from autocompress.prediction.table import LatencyTable
from autocompress.prediction.table_rows import LayerRow, NetworkRow
from autocompress.space.search_space import SearchSpace, load_space
from autocompress.tasks import Task

ENGINE, DTYPE = "onnxruntime", "fp32"
_BASELINE_MS, _NETWORKS = 0.4, 40


def _time(unit: Unit) -> float:
    return 2e-3 + unit.macs * (1e-9 if unit.int8 else 2e-9)


def write_table(task: Task, path: Path) -> Path:
    """Write what ``autocompress profile`` would leave of a task's network on such a machine; return `path`."""
    base = rewrite(task.model())
    inventory = take_inventory(base, task.example_inputs(2))
    layout = GraphBuilder(base, task.example_inputs(1), inventory, ENGINE).layout
    space = SearchSpace(load_space("default"), inventory, DTYPE, int8=True, sparse=False)
    table = LatencyTable(device_fingerprint(gpu=False), ENGINE, get_engine(ENGINE).version())
    table.save(path)
    whole = sum(_time(unit) for unit in layout.units(space.policy({})))
    rng = random.Random(0)
    for _ in range(_NETWORKS):
        policy = space.policy(random_choices(space, rng))
        units = layout.units(policy)
        ratio = sum(map(_time, units)) / whole
        own: dict[str, Any] = {"network": layout.hash, "name": task.name, "baseline_ms": _BASELINE_MS, "n": 1000}
        rows = [
            LayerRow(
                **own, layer=unit.layer, op=unit.kind, in_channels=unit.in_channels, out_channels=unit.out_channels,
                kernel="x".join(map(str, inventory.layers[unit.layer].kernel)), positions=unit.positions,
                ranks=unit.ranks, dtype="int8" if unit.int8 else DTYPE, inputs_int8=unit.context.inputs_int8,
                outputs_int8=unit.context.outputs_int8, macs=unit.macs, time_ms=_time(unit) / whole * _BASELINE_MS,
                spread_ms=0.0, policy=policy.hash, dense_dtype=DTYPE,
            )
            for unit in units
        ]  # fmt: skip
        network = NetworkRow(
            **own, policy=policy, ratio=ratio, ratio_low=0.99 * ratio, ratio_high=1.01 * ratio, mad_ms=0.0, noisy=False,
            latency_ms=ratio * _BASELINE_MS, macs=sum(unit.macs for unit in units),
        )  # fmt: skip
        table.append(*rows, network)
    return path
