"""Times of the kernels of an ONNX Runtime engine, from the runtime's own profiler.

The profiler writes an event for each run of each node, in whole microseconds, cut off, and spends 2 to 4 µs inside
each of them looking at memory, ten times what a small node takes. Both are undone. Half a microsecond is added.
Subtracted is what makes the kernels add up to the latency without the profiler, less a call's own overhead: the same
for each kernel, and not less than in a chain of trivial nodes, where all is in the caches, nor over twice that. So the
sum is right, and a kernel's time contains its dispatch, but what the profiler costs one node more than another, 1 µs
perhaps, remains.

Which nodes of the graph a kernel computes is found in the optimised graph: nodes keep their names or get new ones made
of them, and tensors that still exist keep theirs.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from autocompress._optional import optional
from autocompress.engines.base import Array, EngineOptions
from autocompress.engines.kernel_attribution import Kernel, KernelTime, Node, attribute

# Where a profiled session writes: the start of its events' file name, and the graph that it runs.
EVENTS, OPTIMISED = "events", "optimised.onnx"
_EVENT = "_kernel_time"
_DTYPES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8"}
_CUT_US = 0.5
# Each round is a new session, whose buffers lie elsewhere. An event is 700 bytes of JSON, and more in the runtime.
_ROUNDS = 3
_MOST_EVENTS = 30_000
_LEAST_RUNS = 10
_WARM_UP_SHARE = 0.1
# The profiler costs a node at most this many times what it costs one whose memory is in the caches.
_MOST_COST = 2.0
# Ops that move data without computing. One that the runtime inserted stands between a kernel and the tensor it makes.
_LAYOUT = frozenset({"ReorderInput", "ReorderOutput", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Identity"})
# A convolution in blocked layout is named after the tensor it made when it was still a node of the plain graph.
_BLOCKED = re.compile(r"(.+)_nchwc(_token_\d+)?")
# What the runtime appends to make a name new.
_TOKEN = re.compile(r"_token_\d+$")
# Lengths of the chains of trivial nodes that show what the profiler costs, and how often they run.
_SHORT_CHAIN, _LONG_CHAIN, _CHAIN_RUNS = 20, 120, 100


class ProfiledRunner(Protocol):
    """What is asked of a runner here."""

    def prepare(self, inputs: Array) -> None:
        """Bind inputs."""

    def run(self) -> None:
        """Run once."""

    def end_profiling(self) -> Path:
        """Return the file of events."""


# Opens a graph, with the folder to profile into, or None not to profile.
Opening = Callable[[Path, EngineOptions, Path | None], AbstractContextManager[ProfiledRunner]]


@dataclass(frozen=True)
class Overhead:
    """What is not a kernel's time.

    Attributes:
        call_us: Of one call, without its nodes and without the profiler.
        node_us: What the profiler adds to the event of a node, at least.
    """

    call_us: float
    node_us: float


def kernel_times(
    opening: Opening, path: Path, options: EngineOptions, inputs: Array, *, seconds: float, overhead: Overhead
) -> list[KernelTime]:
    """Run a graph for about `seconds`, less where events would become many, and return its kernels.

    Half of the runs are without the profiler. `overhead` is that of this machine, from `measure_overhead`.
    """
    with tempfile.TemporaryDirectory(prefix="autocompress-profile-") as name:
        folder = Path(name)
        graph = _Graph(path, folder)
        setting = _Setting(opening, options, inputs, folder)
        most = max(_LEAST_RUNS, _MOST_EVENTS // max(1, len(graph.nodes)))
        rounds: list[_Round] = []
        of = _ROUNDS
        while len(rounds) < of:
            rounds.append(_Round(setting, graph.path, seconds / of, most))
            # Few runs in many sessions would say less than many in few.
            of = int(np.clip(seconds * 1e6 / (2 * _LEAST_RUNS * rounds[0].alone_us), 1, of))
        # The runtime may number what it inserts anew in each session: the graph is the last one's.
        said = rounds[-1].said
        kernels, domains = graph.kernels(folder / OPTIMISED, [args["name"] for args in said])
    alike = [r for r in rounds if [args["op_name"] for args in r.said] == [args["op_name"] for args in said]]
    least = overhead.node_us
    cost_us = np.clip(np.median([r.node_cost_us(overhead.call_us) for r in alike]), least, _MOST_COST * least)
    times_us = np.median([r.times_us for r in alike], axis=0) - cost_us
    return [
        KernelTime(
            tuple(graph.names[index] for index in own),
            args["op_name"],
            f"{domain}{args['op_name']} {args['provider']}",
            _dtype(args),
            max(0.0, float(time_us)) / 1e3,
            sum(r.runs for r in alike),
        )
        for args, domain, time_us, own in zip(said, domains, times_us, attribute(graph.nodes, kernels), strict=True)
    ]


def measure_overhead(opening: Opening) -> Overhead:
    """Return what calls and the profiler cost on this machine, from chains of nodes that do next to nothing."""
    with tempfile.TemporaryDirectory(prefix="autocompress-profile-") as name:
        folder = Path(name)
        setting = _Setting(opening, EngineOptions(), np.zeros((1, 1), np.float32), folder)
        graphs = [_chain(folder / f"{length}.onnx", length) for length in (_SHORT_CHAIN, _LONG_CHAIN)]
        turns = [[_Round(setting, graph, np.inf, _CHAIN_RUNS) for graph in graphs] for _ in range(_ROUNDS)]
    return overhead_of([(short.alone_us, long.alone_us, float(np.median(long.times_us))) for short, long in turns])


def overhead_of(turns: Sequence[tuple[float, float, float]]) -> Overhead:
    """Return the usual overhead of several turns.

    A machine that changes its speed between the chains of one turn makes a call of that turn cost nothing, or too much.

    Args:
        turns: The µs of a call of the short chain, of one of the long chain, and of a node as the profiler tells it.
    """
    costs = []
    for short_us, long_us, told_us in turns:
        each = max(0.0, long_us - short_us) / (_LONG_CHAIN - _SHORT_CHAIN)
        costs.append((max(0.0, short_us - _SHORT_CHAIN * each), max(0.0, told_us - each)))
    call_us, node_us = np.median(np.array(costs), axis=0)
    return Overhead(call_us=float(call_us), node_us=float(node_us))


def _dtype(args: dict[str, Any]) -> str:
    """Return the element type of a kernel's first input."""
    types = [kind for tensor in args.get("input_type_shape", ()) for kind in tensor]
    return _DTYPES.get(types[0], types[0]) if types else "none"


@dataclass(frozen=True)
class _Setting:
    """How rounds run: what opens a session, how, on which inputs, and the folder it may write to."""

    opening: Opening
    options: EngineOptions
    inputs: Array
    folder: Path


class _Round:
    """One session without and one with the profiler.

    Attributes:
        said: What the profiler says of each kernel, its ``name`` too, in the order of execution.
        times_us: Typical length of each kernel's events in one run ``(kernels,)``.
        runs: Runs that they were taken from.
        alone_us: Typical length of a call without the profiler.
    """

    def __init__(self, setting: _Setting, graph: Path, seconds: float, most: int) -> None:
        with setting.opening(graph, setting.options, None) as runner:
            runner.prepare(setting.inputs)
            took_us = _run(runner, seconds / 2, most)
            self.alone_us = _middle(took_us[int(len(took_us) * _WARM_UP_SHARE) :])
        with setting.opening(graph, setting.options, setting.folder) as runner:
            runner.prepare(setting.inputs)
            _run(runner, seconds / 2, most)
            file = runner.end_profiling()
        events = json.loads(file.read_bytes())
        file.unlink()
        said: dict[str, dict[str, Any]] = {}
        took: dict[str, list[int]] = {}
        for event in events:
            if event["cat"] == "Node" and event["name"].endswith(_EVENT):
                name = event["name"].removesuffix(_EVENT)
                said.setdefault(name, {**event["args"], "name": name})
                took.setdefault(name, []).append(event["dur"])
        ran = sum(event["name"] == "model_run" for event in events)
        warm = 1 + int(ran * _WARM_UP_SHARE)
        self.said, self.runs = list(said.values()), ran - warm
        # A node within a loop has several events in a run.
        self.times_us = np.array(
            [_middle(np.array(own[: len(own) // ran * ran]).reshape(ran, -1).sum(1)[warm:]) for own in took.values()]
        )
        self.times_us += _CUT_US

    def node_cost_us(self, call_us: float) -> float:
        """Return how much longer an event is than a node, if calls alone take `call_us`."""
        return (float(self.times_us.sum()) + call_us - self.alone_us) / max(1, len(self.times_us))


def _run(runner: ProfiledRunner, seconds: float, most: int) -> NDArray[np.float64]:
    """Run for `seconds`, at most `most` times, and return the microseconds that each run took."""
    took: list[int] = []
    start = time.perf_counter_ns()
    while len(took) < _LEAST_RUNS or (len(took) < most and time.perf_counter_ns() - start < seconds * 1e9):
        begin = time.perf_counter_ns()
        runner.run()
        took.append(time.perf_counter_ns() - begin)
    return np.array(took) / 1e3


def _middle(values: NDArray[Any]) -> float:
    """Return the mean of the middle half: as deaf to interruptions as a median, but finer than whole microseconds."""
    cut = len(values) // 4
    return float(np.sort(values)[cut : len(values) - cut].mean()) if len(values) else 0.0


# -- the graph ----------------------------------------------------------------------------------------------------


class _Graph:
    """The graph of an engine file.

    Attributes:
        path: A file of it in which each node has a name of its own.
        names: Of its nodes.
        nodes: Their places.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        onnx = _onnx()
        model = onnx.load(str(path))
        own = model.graph.node
        counts = Counter(node.name for node in own)
        self.path = path
        self.names = [node.name if node.name and counts[node.name] == 1 else _first_output(node) for node in own]
        if self.names != [node.name for node in own]:
            for node, name in zip(own, self.names, strict=True):
                node.name = name
            self.path = folder / "named.onnx"
            onnx.save(model, str(self.path))
        self._maker = {tensor: index for index, node in enumerate(own) for tensor in node.output if tensor}
        self._index = {name: index for index, name in enumerate(self.names)}
        outputs = {value.name for value in model.graph.output}
        self.nodes = [
            Node(
                node.op_type,
                tuple(self._maker[tensor] for tensor in node.input if tensor in self._maker),
                not outputs.isdisjoint(node.output),
            )
            for node in own
        ]

    def kernels(self, optimised: Path, ran: Sequence[str]) -> tuple[list[Kernel], list[str]]:
        """Return the place of each kernel that ran, and the prefix of its op if that is the runtime's own."""
        by_name = {node.name: node for node in _onnx().load(str(optimised)).graph.node}
        # Nodes of a loop's body are not in the graph itself.
        own = [by_name.get(name, _onnx().NodeProto(name=name)) for name in ran]
        maker = {tensor: number for number, node in enumerate(own) for tensor in node.output if tensor}
        inputs = [tuple(maker[tensor] for tensor in node.input if tensor in maker) for node in own]
        named = [self._by_name(name) for name in ran]
        told = [set(found) for found in named]
        inserted = [node.op_type in _LAYOUT and not found for node, found in zip(own, named, strict=True)]
        for number, node in enumerate(own):
            for tensor in node.output:
                made = self._maker.get(tensor)
                if made is None:
                    continue
                source = number
                if self.nodes[made].op != node.op_type:
                    while inserted[source] and inputs[source]:
                        source = inputs[source][0]
                told[source].add(made)
        kernels = [
            Kernel(node.op_type, frozenset(found), sources)
            for node, found, sources in zip(own, told, inputs, strict=True)
        ]
        return kernels, [f"{node.domain}." if node.domain else "" for node in own]

    def _by_name(self, name: str) -> set[int]:
        """Return the node, if any, that an optimised one is named after.

        Such names are ``node/SomeFusion/``, ``node_token_1``, and ``tensor_nchwc`` after what the node makes.
        """
        blocked = _BLOCKED.fullmatch(name)
        if blocked is not None and blocked[1] in self._maker:
            return {self._maker[blocked[1]]}
        while name:
            for known in (name, _TOKEN.sub("", name)):
                if known in self._index:
                    return {self._index[known]}
            name = name.rpartition("/")[0]
        return set()


def _first_output(node: Any) -> str:
    return next((str(tensor) for tensor in node.output if tensor), "")


def _chain(path: Path, length: int) -> Path:
    """Write a graph of `length` negations of one number."""
    onnx = _onnx()
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [make.make_node("Neg", [f"t{i}"], [f"t{i + 1}"], name=f"n{i}") for i in range(length)]
    ends = [make.make_tensor_value_info(name, kind, (1, 1)) for name in ("t0", f"t{length}")]
    graph = make.make_graph(nodes, "chain", ends[:1], ends[1:])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10), str(path))
    return path


def _onnx() -> Any:
    return optional("onnx", "onnxruntime", "Profiling with ONNX Runtime")
