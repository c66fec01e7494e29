"""Building a latency table: which networks are measured, and how far what was learned from them can be trusted.

Networks are forms of the user's own model under the user's own search space, so that fusion and changes of layout are
in them. Of every four, one is drawn at random and held out: it is never learned from, and gives the table's own error.
One is drawn at random and learned from. Two are those, of many drawn, that the predictor is least sure of (uncertainty
sampling, Lewis and Gale, 1994).
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from autocompress.compress import rewrite
from autocompress.config import RunConfig
from autocompress.engines import engine_class
from autocompress.engines.base import EngineFile, dense_dtypes
from autocompress.engines.kernel_attribution import KernelTime
from autocompress.errors import BuildError, EngineError, UnavailableError
from autocompress.evaluation.untrained import UntrainedNetworks
from autocompress.graph.builder import GraphBuilder
from autocompress.graph.qdq_rules import RULES
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.fingerprint import device_fingerprint
from autocompress.measurement.protocol import DISTURBED, Protocol
from autocompress.measurement.statistics import quiet_latency
from autocompress.model.inventory import take_inventory
from autocompress.policy import CompressionPolicy
from autocompress.prediction.layer_times import LayerTime
from autocompress.prediction.predictor import Observation
from autocompress.prediction.profile import Profile, layer_times, observations, open_profile, predictor_from
from autocompress.prediction.table import LatencyTable, table_path
from autocompress.prediction.table_rows import LayerRow, NetworkRow
from autocompress.runs.observer import Observer
from autocompress.runs.records import Measurement
from autocompress.runs.scratch import ScratchFolder
from autocompress.space.parameter import Parameter
from autocompress.space.search_space import Choice, SearchSpace, bind, configured_space
from autocompress.tasks.base import Task
from autocompress.tasks.seeding import seed_everything

# Every how many networks one is held out, and one is what is known least. The rest is drawn at random: a predictor that
# saw only what it knew least would know little of what is usual.
_HELD_OUT_EVERY, _UNSURE_EVERY = 4, 2
# Networks drawn for each one measured, once the predictor can tell which of them it knows least of.
_POOL = 48
# The predictor is fitted anew after this many networks; fitting costs about as much as measuring one.
_REFIT = 8
# Engines refuse a graph or two; when they refuse this many in a row and have taken none, nothing will come of it.
_HOPELESS = 8
_KERNEL_SECONDS, _KERNEL_TRIES = 0.2, 3
# Measurements that say what is usual of the uncompressed network.
_RECENT = 25


def random_choices(space: SearchSpace, rng: random.Random) -> dict[str, Choice]:
    """Return choices for every parameter: how much is done of each kind is drawn first, so that all amounts occur."""
    share: dict[str, float] = {}
    for name in space.parameters:
        share.setdefault(Parameter.of(name).kind, rng.random())
    return {
        name: rng.choice(offered[1:] or offered) if rng.random() < share[Parameter.of(name).kind] else offered[0]
        for name, offered in space.parameters.items()
    }


class Profiler:
    """Measure networks of one task's model and search space.

    Args:
        task: Its model and example inputs are used; no data is read.
        config: Engine, threads, batch size, space, dense dtype, seed.
        worker: Builds and measures.
        folder: Of all tables; None is the one in the user's cache.
        observer: Is told of progress.
        name: How the network is called in the table.

    Raises:
        ConfigError: The space leaves nothing to choose, or the table cannot be read.
        EngineError: The uncompressed model cannot be built or measured.
    """

    def __init__(
        self,
        task: Task,
        config: RunConfig,
        worker: EngineWorker,
        *,
        folder: Path | None = None,
        observer: Observer | None = None,
        name: str = "",
    ) -> None:
        self._worker, self._config = worker, config
        self._observer = observer or Observer()
        self._started = time.monotonic()
        self._observer.stage("Reading the model")
        described = worker.describe(config.engine, config.engine_options)
        self._capabilities: tuple[str, ...] = tuple(described["capabilities"])
        self._example = task.example_inputs(2)
        self._inputs = task.example_inputs(config.batch_size)
        self._base = rewrite(task.network())
        self.inventory = take_inventory(self._base, self._example, int8_lstm=RULES[config.engine].int8_lstm)
        self._graphs = GraphBuilder(self._base, self._inputs, self.inventory, config.engine)
        self.layout = self._graphs.layout
        self._networks = UntrainedNetworks(
            self._base, self._example, self.inventory, self._graphs, config=config, capabilities=self._capabilities
        )
        self.name = name or task.name
        self._temporary = ScratchFolder("profile")
        self._scratch = self._temporary.path
        self._files = 0
        self._baselines: deque[float] = deque(maxlen=_RECENT)
        # What a profiler's times add up to over the latency without it.
        self._inflations: deque[float] = deque(maxlen=_RECENT)
        wanted = dense_dtypes(self._capabilities, config.dense_dtype, f"{config.engine} ({described['device']})")
        self._observer.stage("Measuring the uncompressed model")
        self.dense_dtype, self._baseline = self._fastest(wanted)
        self.space = bind(configured_space(config), self._base, self.inventory, self.dense_dtype, self._capabilities)
        device = device_fingerprint(gpu=engine_class(config.engine).uses_gpu)
        self.path = table_path(config.engine, device, folder, threads=config.threads, batch_size=config.batch_size)
        self.table, moved = LatencyTable.resume(
            self.path, device, config.engine, described["version"],
            threads=config.threads, batch_size=config.batch_size,
        )  # fmt: skip
        if moved is not None:
            self._observer.warn(f"The table at {self.path} was measured on something else; it is now {moved}.")
        known = self.table.of_network(self.layout.hash).networks
        self._known = {row.policy for row in known}
        self.predictor = predictor_from(self.table, self.layout, self.dense_dtype, held_out=False)
        # A resumed profile goes on where it was, and draws what it has not drawn.
        self._rng = random.Random(f"{config.seed} {len(known)}")
        self._pending: list[Observation] = []
        self._pending_layers: list[LayerTime] = []
        self._profiles = True

    def close(self) -> None:
        """Remove temporary files."""
        self._temporary.close()

    def run(self, seconds: float, networks: int | None = None) -> Profile:
        """Measure until `seconds` have passed since this object was made, or `networks` are in the table.

        Raises:
            BuildError: The engine refused the first networks one after the other.
            ConfigError: The table cannot be written.
        """
        self._observer.stage("Profiling")
        added, refused = 0, 0
        until = self._started + seconds
        longest = 0.0
        while time.monotonic() + 0.5 * longest < until and (networks is None or len(self._known) < networks):
            begun = time.monotonic()
            held_out = len(self._known) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
            policy = self._next(adaptive=len(self._known) % _UNSURE_EVERY == 0)
            if policy is None:
                self._observer.warn("Every network of the search space has been measured.")
                break
            row = self._one(policy, held_out=held_out)
            added += 1
            refused = refused + 1 if not row.ok else 0
            if refused >= _HOPELESS and refused == added:
                raise BuildError(f"The engine refused {refused} networks in a row. The last one: {row.error}")
            longest = max(longest, time.monotonic() - begun)
            share = (time.monotonic() - self._started) / seconds
            if networks is not None:
                share = max(share, len(self._known) / networks)
            self._observer.progress(min(share, 1.0), f"{len(self._known)} networks")
        spent = time.monotonic() - self._started
        # The one that steered was tuned on whatever was known then; what is told is what whoever opens the table gets.
        final = predictor_from(self.table, self.layout, self.dense_dtype, held_out=False)
        return Profile.of(self.table, self.path, final, self.dense_dtype, seconds=spent, added=added)

    def measure(self, policy: CompressionPolicy, protocol: Protocol | None = None) -> NetworkRow:
        """Build and measure a network; it is neither put in the table nor learned from."""
        try:
            return self._row(policy, self._measure(self._write(policy), protocol), held_out=True)
        except EngineError as error:
            return self._refused(policy, error, held_out=True)

    # -- one network --------------------------------------------------------------------------------------------------

    def _next(self, *, adaptive: bool) -> CompressionPolicy | None:
        """Return a policy that has not been measured: at random, or the one whose latency is known least."""
        self._learn()
        count = _POOL if adaptive and self.predictor.ready else 1
        drawn: list[CompressionPolicy] = []
        for _ in range(20 * count):
            policy = self.space.policy(random_choices(self.space, self._rng))
            if policy not in self._known and policy not in drawn:
                drawn.append(policy)
            if len(drawn) == count:
                break
        if not drawn:
            return None
        if count == 1:
            return drawn[0]

        def unsure(policy: CompressionPolicy) -> float:
            ratio, deviation = self.predictor.moments(policy)
            # Between absolute and relative error: fast networks are not to be all that is measured, nor slow ones.
            return deviation / math.sqrt(max(ratio, 0.05))

        return max(drawn, key=unsure)

    def _learn(self) -> None:
        enough = len(self._pending) >= _REFIT or not self.predictor.ready
        if self._pending and enough:
            self.predictor.observe(self._pending)
            self.predictor.observe_layers(self._pending_layers)
            self._pending, self._pending_layers = [], []

    def _one(self, policy: CompressionPolicy, *, held_out: bool) -> NetworkRow:
        """Build and measure a network and put it in the table; one that the engine refuses is noted there as well."""
        layers: list[LayerRow] = []
        try:
            file = self._write(policy)
            found = self._measure(file)
            row = self._row(policy, found, held_out=held_out)
            if not held_out:
                layers = self._layers(policy, file, found)
                self._pending += observations([row], self._usual_ms)
                self._pending_layers += layer_times(layers, [row], self.layout, self._usual_ms)
        except EngineError as error:
            row = self._refused(policy, error, held_out=held_out)
        self.table.append(*layers, row)
        self._known.add(policy)
        return row

    def _row(self, policy: CompressionPolicy, found: Measurement, *, held_out: bool) -> NetworkRow:
        return NetworkRow(
            self.layout.hash, self.name, policy, found.ratio, found.ratio_low, found.ratio_high, found.latency_ms,
            found.baseline_ms, found.mad_ms, found.n, found.noisy, self.layout.macs(policy), held_out,
        )  # fmt: skip

    def _refused(self, policy: CompressionPolicy, error: EngineError, *, held_out: bool) -> NetworkRow:
        macs = self.layout.macs(policy)
        return NetworkRow.unsupported(self.layout.hash, self.name, policy, str(error), macs, held_out=held_out)

    def _write(self, policy: CompressionPolicy) -> EngineFile:
        # Two names in turn: the engine of the last one may still be open.
        self._files += 1
        return self._networks.write(policy, self._scratch / f"network-{self._files % 2}.onnx")

    def _fastest(self, dtypes: Sequence[str]) -> tuple[str, EngineFile]:
        """Return the dense dtype in which the uncompressed model is fastest, and its file."""
        files: dict[str, EngineFile] = {}
        for dtype in dtypes:
            file = self._write(CompressionPolicy(dense_dtype=dtype))
            kept = file.path.rename(file.path.with_name(f"baseline-{dtype}.onnx"))
            files[dtype] = EngineFile(file.engine, kept, file.options)
        measured = self._worker.measure(list(files.values()), self._array(), Protocol.quick())
        best = min(zip(files, measured, strict=True), key=lambda pair: pair[1].latency_ms)
        self._baselines.append(best[1].latency_ms)
        return best[0], files[best[0]]

    def _array(self) -> np.ndarray:
        return self._inputs.float().numpy()

    def _measure(self, file: EngineFile, protocol: Protocol | None = None) -> Measurement:
        """Measure against the baseline, in moments when that is as fast as usual."""
        timing = replace(protocol or Protocol.quick(), usual_ms=self._usual_ms)
        found = self._worker.measure([self._baseline, file], self._array(), timing)[1]
        self._baselines.append(found.baseline_ms)
        return found

    @property
    def _usual_ms(self) -> float:
        """The uncompressed network's usual latency."""
        return quiet_latency(list(self._baselines))

    def _kernels(self, file: EngineFile, latency_ms: float) -> list[KernelTime]:
        """Return the kernels' times from a moment in which they add up to as much as usual."""
        best: tuple[float, list[KernelTime]] = (math.inf, [])
        for _ in range(_KERNEL_TRIES):
            kernels = self._worker.profile(file, self._array(), seconds=_KERNEL_SECONDS)
            best = min(
                best, (sum(kernel.time_ms for kernel in kernels) / latency_ms, kernels), key=lambda pair: pair[0]
            )
            if not self._inflations or best[0] < DISTURBED * median(self._inflations):
                break
        self._inflations.append(best[0])
        return best[1]

    def _layers(self, policy: CompressionPolicy, file: EngineFile, found: Measurement) -> list[LayerRow]:
        """Return the layers' times by the engine's own profiler; none where it does not tell.

        They are scaled so that all kernels of the network add up to its latency: a profiler counts whole microseconds
        and slows the network down.
        """
        if not self._profiles:
            return []
        try:
            kernels = self._kernels(file, found.latency_ms)
        except UnavailableError:
            self._profiles = False
            return []
        except EngineError:
            # The network itself was built and measured.
            return []
        times = self._graphs.shares(kernels, found.latency_ms)
        rows = []
        for unit in self.layout.units(policy):
            if unit.layer not in times:
                continue
            dtype = "int8" if unit.int8 else policy.dense_dtype
            window = "x".join(map(str, self.inventory.layers[unit.layer].kernel))
            rows.append(
                LayerRow(
                    network=self.layout.hash,
                    name=self.name,
                    layer=unit.layer,
                    op=unit.kind,
                    in_channels=unit.in_channels,
                    out_channels=unit.out_channels,
                    kernel=window,
                    positions=unit.positions,
                    ranks=unit.ranks,
                    dtype=dtype,
                    inputs_int8=unit.context.inputs_int8,
                    outputs_int8=unit.context.outputs_int8,
                    macs=unit.macs,
                    time_ms=times[unit.layer],
                    baseline_ms=found.baseline_ms,
                    spread_ms=0.0,
                    n=kernels[0].n,
                    policy=policy.hash,
                    dense_dtype=policy.dense_dtype,
                )
            )
        return rows


def profile(
    task: Task,
    config: RunConfig,
    *,
    seconds: float,
    networks: int | None = None,
    folder: Path | None = None,
    observer: Observer | None = None,
    name: str = "",
) -> Profile:
    """Build or extend the latency table of a task's model on this device and engine.

    Args:
        task: Whose model it is; no data is read.
        config: Engine, threads, batch size, space.
        seconds: Time to spend.
        networks: Stop as soon as the table holds this many of this model.
        folder: Of all tables; None is the one in the user's cache.
        observer: Is told of progress.
        name: How the network is called in the table.

    Raises:
        ConfigError: The space leaves nothing to choose, or the table cannot be read or written.
        EngineError: The model cannot be built or measured.
    """
    seed_everything(config.seed)
    with EngineWorker() as worker:
        profiler = Profiler(task, config, worker, folder=folder, observer=observer, name=name)
        try:
            return profiler.run(seconds, networks)
        finally:
            profiler.close()


def known_profile(task: Task, config: RunConfig, folder: Path | None = None) -> Profile:
    """Return what the table of this device knows of a task's model; nothing is measured.

    Raises:
        ConfigError: There is no table, or it is damaged, or knows nothing of this model.
        EngineError: The model cannot be read.
    """
    base = rewrite(task.network())
    inventory = take_inventory(base, task.example_inputs(2), int8_lstm=RULES[config.engine].int8_lstm)
    graphs = GraphBuilder(base, task.example_inputs(config.batch_size), inventory, config.engine)
    return open_profile(graphs, config, folder)
