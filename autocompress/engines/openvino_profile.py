"""Times of the kernels of an OpenVINO engine, from the CPU plugin's own counters (PERF_COUNT).

A counter adds up each run of its kernel in whole microseconds, cut off, and tells the sum divided by the number of
runs since compilation, cut off again (`PerfCount` in the plugin's sources). Where a convolution takes 4 µs, both cuts
matter, and both are undone here:

* The second one hides the sum s within ``runs * mean <= s < runs * (mean + 1)``, except in the moment at which the
  told mean steps from b down to b - 1: then s is ``b * runs``. Two steps give the time between them. Steps come when
  the mean starts too high and falls, so each engine first runs with cold caches for a while.
* The first one takes 0 to 1 µs off each run; as the runs of a kernel differ, 0.5 µs on average, which is added.

A counter simulated from known durations (5 % jitter, drift, bursts) is told to 0.2 µs rms, 0.4 µs in 95 % of cases. On
ResNet-20 in bf16 (26 kernels, 140 µs, one core of a Xeon 6) times repeat to 0.2 µs rms with 0.2 s of runs and to
0.13 µs with 1 s. In sums the errors cancel: the kernels add up to 0.99 to 1.06 of its end-to-end median less an empty
call. Of a model so slow that there are no 100 runs in the time given, each kernel is known to 0.5 µs. Interruptions by
other programs cost some kernels more; with 1 s or more, the rounds in which they fell are dropped.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.engines.kernel_attribution import Kernel, KernelTime, Node, attribute

_COUNTS = NDArray[np.int64]

# Each round compiles anew: other addresses, and another phase of the counters' cuts. The median over rounds counts.
# Shorter ones than this, or with fewer runs, say less than fewer rounds.
_ROUNDS = 5
_ROUND_S = 0.2
_LEAST_RUNS = 20
# Writing this much before a run leaves the caches without the model: more than any level 2 cache.
_COLD_BYTES = 64 * 2**20
# Cold runs of a round: enough that the told means fall by whole steps over hundreds of runs afterwards.
_COLD_RUNS = 60
_COLD_SHARE = 1 / 3
# Counters are read at every run at first, then at steps of this share of the runs, as reading takes as long as a run.
_READ_SHARE = 1 / 24
# Steps this near to each other say little, and this many runs between all of them are the least to go by.
_NEAR_RUNS = 8
_SURE_RUNS = 50
_CUT_US = 0.5
_MICROSECOND = timedelta(microseconds=1)
_DTYPES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8"}
# What the plugin's graph has beside kernels.
_NO_KERNELS = frozenset({"Const", "Input", "Output"})
_MARK = re.compile(r"@(\d+)")


def kernel_times(model: Any, compiled: Callable[[], Any], tensors: Sequence[Any], seconds: float) -> list[KernelTime]:
    """Run `model` with counters for about `seconds`, compiling not counted, and return its kernels as they run.

    `compiled` compiles `model` with counters. Renames the model's operations: the plugin tells which of them a kernel
    computes by their names, and a mark cannot be mistaken for a name that the plugin makes up.
    """
    names, nodes, node_of = _nodes(model)
    kernels: list[_KernelInfo] = []
    rounds: list[_Round] = []
    of = _ROUNDS
    while len(rounds) < of:
        engine = compiled()
        # What the plugin makes up is named anew each time, but the graph is the same.
        kernels = _kernels(engine, node_of)
        counters = _Counters(engine, tensors, [kernel.name for kernel in kernels])
        if not rounds:
            of = int(np.clip(seconds / max(_ROUND_S, _LEAST_RUNS * counters.run_s()), 1, _ROUNDS))
        rounds.append(counters.round(seconds / of))
    # Where other programs interrupted, times are too long and the counters' sums jump.
    rounds = sorted(rounds, key=lambda own: own.run_s)[: of // 2 + 1]
    times = np.array([own.times_us for own in rounds])
    runs = sum(own.runs for own in rounds)
    told = attribute(nodes, [kernel.place for kernel in kernels])
    # A kernel that never took a microsecond, not even the first time, does not run: it works in place.
    ran = np.isfinite(times)
    return [
        KernelTime(
            tuple(names[i] for i in own),
            info.op,
            info.kernel,
            info.dtype,
            float(np.median(times[ran[:, number], number])) / 1e3,
            runs,
        )
        for number, (info, own) in enumerate(zip(kernels, told, strict=True))
        if ran[:, number].any()
    ]


# -- the graph ----------------------------------------------------------------------------------------------------


class _KernelInfo:
    """One node of the plugin's graph: its name there, what it says of itself, and its place."""

    def __init__(self, name: str, said: dict[str, str], place: Kernel) -> None:
        self.name, self.op, self.place = name, place.op, place
        self.kernel = said["primitiveType"]
        precision = said["runtimePrecision"]
        self.dtype = _DTYPES.get(precision, precision)


def _nodes(model: Any) -> tuple[list[str], list[Node], dict[int, int]]:
    """Mark the operations of a model; return the names and places of the ONNX nodes, and the node of each mark.

    The outputs of ONNX nodes have their tensors' names. Operations without one are parts of the node they lead to.
    """
    operations = model.get_ordered_ops()
    index_of = {operation.get_name(): index for index, operation in enumerate(operations)}
    sources = [
        [index_of[port.get_source_output().get_node().get_name()] for port in operation.inputs()]
        for operation in operations
    ]
    results = {source for own, op in zip(sources, operations, strict=True) if _type(op) == "Result" for source in own}
    names: list[str] = []
    nodes: list[Node] = []
    node_of: dict[int, int] = {}
    for index, operation in enumerate(operations):
        if _type(operation) in ("Constant", "Parameter", "Result") or not any(
            p.get_names() for p in operation.outputs()
        ):
            continue
        node_of[index] = len(nodes)
        parts, reads, waiting = {index}, set(), list(sources[index])
        while waiting:
            source = waiting.pop()
            if source in parts or _type(operations[source]) in ("Constant", "Parameter"):
                continue
            if any(port.get_names() for port in operations[source].outputs()):
                reads.add(node_of[source])
                continue
            parts.add(source)
            node_of.setdefault(source, len(nodes))
            waiting += sources[source]
        types = {_type(operations[part]) for part in parts}
        # The one node whose place depends on its kind and that becomes several operations.
        dequantizes = _type(operation) == "Multiply" and "Convert" in types
        op = "DequantizeLinear" if dequantizes else _type(operation)
        names.append(operation.get_friendly_name())
        nodes.append(Node(op, tuple(sorted(reads)), bool(parts & results)))
    for index, operation in enumerate(operations):
        operation.set_friendly_name(f"@{index}")
    return names, nodes, node_of


def _type(operation: Any) -> str:
    return str(operation.get_type_name())


def _kernels(engine: Any, node_of: dict[int, int]) -> list[_KernelInfo]:
    """Return what the plugin made of a marked model, in the order of execution."""
    counted = {info.node_name: info.node_type for info in engine.create_infer_request().profiling_info}
    infos: list[_KernelInfo] = []
    number_of: dict[str, int] = {}
    for operation in engine.get_runtime_model().get_ordered_ops():
        name = operation.get_friendly_name()
        said = {key: str(value.value) for key, value in operation.get_rt_info().items()}
        # What prepares weights ran at compilation and has no counter.
        if said["layerType"] in _NO_KERNELS or name not in counted:
            continue
        marks = (int(mark) for mark in _MARK.findall(said["originalLayersNames"]))
        sources = (port.get_source_output().get_node().get_friendly_name() for port in operation.inputs())
        place = Kernel(
            counted[name],
            frozenset(node_of[mark] for mark in marks if mark in node_of),
            tuple(number_of[source] for source in sources if source in number_of),
        )
        number_of[name] = len(infos)
        infos.append(_KernelInfo(name, said, place))
    return infos


# -- the counters -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Round:
    """What one compiled model showed: microseconds of each kernel (NaN: it does not run), and of how many runs."""

    times_us: NDArray[np.float64]
    runs: int
    run_s: float


class _Counters:
    """The counters of one compiled model, which count from its first run on."""

    def __init__(self, engine: Any, tensors: Sequence[Any], names: Sequence[str]) -> None:
        self._request = engine.create_infer_request()
        for index, tensor in enumerate(tensors):
            self._request.set_input_tensor(index, tensor)
        place = {info.node_name: index for index, info in enumerate(self._request.profiling_info)}
        self._places = [place[name] for name in names]
        self._runs: list[int] = []
        self._means: list[list[int]] = []
        self._count = 0

    def run_s(self) -> float:
        """Run a few times and return the seconds that the last run took."""
        for _ in range(3):
            start = time.perf_counter()
            self._run()
            self._read()
        return time.perf_counter() - start

    def round(self, seconds: float) -> _Round:
        """Run for `seconds`, cold for a share of it, and return the times of the warm runs."""
        start = time.perf_counter()
        rubbish = np.zeros(_COLD_BYTES // 8)
        run_s = self.run_s()
        cold = int(np.clip(seconds / run_s / 10, 1, _COLD_RUNS))
        for _ in range(cold):
            rubbish += 1
            self._run()
            self._read()
            if time.perf_counter() - start > seconds * _COLD_SHARE:
                break
        warm = due = self._count
        spent = 0.0
        while (begin := time.perf_counter()) - start < seconds or self._count < warm + _LEAST_RUNS // 2:
            self._run()
            spent += time.perf_counter() - begin
            if self._count >= due:
                self._read()
                due = self._count + max(1, int(self._count * _READ_SHARE))
        self._read()
        runs, means = np.array(self._runs), np.array(self._means)
        times = [time_per_run(runs, own, warm) + _CUT_US if own.any() else np.nan for own in means.T]
        taken = self._count - warm
        return _Round(np.array(times), taken, spent / taken)

    def _run(self) -> None:
        self._request.infer(share_outputs=True)
        self._count += 1

    def _read(self) -> None:
        if self._runs[-1:] == [self._count]:
            return
        info = self._request.profiling_info
        self._runs.append(self._count)
        self._means.append([info[place].real_time // _MICROSECOND for place in self._places])


def time_per_run(runs: _COUNTS, means: _COUNTS, start: int) -> float:
    """Return what a counter grew by in each run after run `start`, in its unit, from its mean over all runs so far.

    `means` ``(r,)`` was read after `runs` ``(r,)`` runs, `start` among them, and is rounded down.
    """
    change = np.diff(means)
    later = runs[1:] > start
    # A mean that rises does so because a run was interrupted: what grew there is not the kernel's.
    falls, rises = np.flatnonzero((change == -1) & later), np.flatnonzero((change > 0) & later)
    at = (runs[falls] + runs[falls + 1]) / 2
    total = at * means[falls]
    stretch = np.searchsorted(rises, falls)
    lengths = np.diff(at)
    # Nearer to each other than this, what is not known about the moment of the fall counts.
    clear = (np.diff(stretch) == 0) & (lengths >= _NEAR_RUNS)
    if lengths[clear].sum() >= _SURE_RUNS:
        return _weighted_median(np.diff(total)[clear] / lengths[clear], lengths[clear])
    # The two points, between interruptions, from which growth is known best: falls, and ends that are vague.
    ends = np.array([np.flatnonzero(runs == start)[0], *rises, *(rises + 1), len(runs) - 1])
    points = np.concatenate([at, runs[ends]])
    sums = np.concatenate([total, runs[ends] * (means[ends] + 0.5)])
    vague = np.concatenate([(runs[falls + 1] - runs[falls]) / 2 + 1, runs[ends] / 2])
    places = np.concatenate([stretch, np.searchsorted(rises, ends)])
    spans = points[None] - points[:, None]
    same = (places[None] == places[:, None]) & (spans > 0)
    doubt = np.where(same, (vague[None] + vague[:, None]) / np.where(same, spans, 1), np.inf)
    first, last = np.unravel_index(np.argmin(doubt), doubt.shape)
    return max(0.0, float((sums[last] - sums[first]) / (points[last] - points[first])))


def _weighted_median(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, reached[-1] / 2)])
