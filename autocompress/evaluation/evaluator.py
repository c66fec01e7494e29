"""One candidate through every station: policy, compressed model, ONNX, engine, accuracy and latency.

Used by the search, by recovery and by the baseline alike, so that all figures of a run come from the same code. Owns
the order of the stations, the check that all forms of a model agree, and where the seconds went; it decides nothing.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.compress import rewrite
from autocompress.compress.layout import in_fast_layout
from autocompress.compress.task_evidence import channel_scores
from autocompress.config import NO_TABLE, RunConfig
from autocompress.engines.artifact import read_artifact, write_artifact, write_record
from autocompress.engines.base import EngineFile, dense_dtypes
from autocompress.errors import ConfigError, EngineError, UnavailableError, VerificationError
from autocompress.evaluation.background import BackgroundTask
from autocompress.evaluation.verified_build import NO_BACKGROUND_TASK, VerifiedBuilder
from autocompress.files import write_json
from autocompress.graph.builder import GraphBuilder
from autocompress.graph.qdq_rules import RULES
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.measure import Protocol
from autocompress.measurement.occasions import Spread, combined
from autocompress.measurement.statistics import quiet_latency
from autocompress.model.inventory import Inventory, count_macs, take_inventory
from autocompress.policy import CompressionPolicy
from autocompress.prediction.remote_device import RemoteDevicePredictor
from autocompress.recovery import TrainingFreeCompressor
from autocompress.runs.directory import RunDirectory
from autocompress.runs.metric import metric_name
from autocompress.runs.records import Measurement, TrialRecord
from autocompress.runs.time_ledger import TimeLedger
from autocompress.runs.trust import Trust, code_of
from autocompress.tasks.base import Task
from autocompress.tasks.checks import check_validation
from autocompress.tasks.validation import ProxyEstimate, ValidationData, estimate_accuracy, write_validation

_BATCH = 256
# Measurements that say what is usual of the baseline.
_RECENT = 15
_KERNEL_SECONDS = 0.2
# What making a candidate takes, over reading calibration data and one pass of the uncompressed network.
_PASSES = 2.0
# A dtype that is so much faster than the next on one occasion is the fastest.
_CLEARLY = 1.15


@dataclass
class _Prepared:
    """A candidate that was compressed before its turn, and what that took."""

    policy: CompressionPolicy
    model: nn.Module
    seen: ProxyEstimate | None
    ledger: TimeLedger = field(default_factory=TimeLedger)


class CandidateEvaluator:
    """Stations for the candidates of one task on one engine.

    Args:
        task: Model, data and metric.
        config: Engine, threads, batch size.
        run: Where artefacts go.
        worker: The child process that builds, runs and measures.
        importance: How channels are scored, a key of `compress.IMPORTANCES`.
    """

    def __init__(
        self, task: Task, config: RunConfig, run: RunDirectory, worker: EngineWorker, importance: str = "magnitude"
    ) -> None:
        self.task = task
        self.run = run
        self.worker = worker
        self.engine = config.engine
        self._config = config
        self.ledger = TimeLedger()
        with self.ledger.charge("profile"):
            described = worker.describe(config.engine, config.engine_options)
            self.engine_version: str = described["version"]
            self.device: str = described["device"]
            self.capabilities: tuple[str, ...] = tuple(described["capabilities"])
            # Engines are built for a device that is not here.
            self.device_absent: bool = not described["runs_here"]
            self.original = task.network()
            self.base = in_fast_layout(rewrite(self.original), task.example_inputs(2))
            self.inputs = task.example_inputs(config.batch_size)
            self.inventory: Inventory = take_inventory(
                self.base, task.example_inputs(2), int8_lstm=RULES[config.engine].int8_lstm
            )
            self.graphs = GraphBuilder(self.base, self.inputs, self.inventory, config.engine)
            self.scores = channel_scores(task, self.base, self.inventory, importance)
            begun = time.monotonic()
            self.compressor = TrainingFreeCompressor(
                self.base, self.inventory, self.scores, task.example_inputs(2), self.calibration(),
                quantization=config.quantization,
            )  # fmt: skip
            # A candidate is made in as many passes over the same data, and a few solutions.
            self.compress_seconds = _PASSES * (time.monotonic() - begun)
        self.data = self._validation()
        self._builder = VerifiedBuilder(
            worker, config, self.graphs, capabilities=self.capabilities, calibration=self.compressor.data,
            reference=self.data.reference, device_absent=self.device_absent,
        )  # fmt: skip
        self._baseline: TrialRecord | None = None
        # The machine may change for good while a search runs: what is usual follows.
        self._baselines_ms: deque[float] = deque(maxlen=_RECENT)
        self._baseline_file: EngineFile | None = None
        # What was measured on several occasions, by the first of them.
        self._repeated: dict[float, Measurement] = {
            m.occasions[0].at: m for r in run.history() if (m := r.measurement) is not None and len(m.occasions) > 1
        }
        # Dense dtypes that the baseline was built for.
        self.dtypes = 1
        self._prepared: _Prepared | None = None
        # What latencies are taken from when the device is not here; to be set before anything is scored then.
        self.forecast: RemoteDevicePredictor | None = None

    def close(self) -> None:
        """Remove the validation inputs that were laid out for the worker."""
        self.data.inputs.unlink(missing_ok=True)

    # -- set-up ---------------------------------------------------------------------------------------------------

    def _validation(self) -> ValidationData:
        with torch.no_grad():
            # What a network gives may be larger than what it takes: maps of class scores.
            given = self.base(self.inputs)[0].nbytes
        config = self._config
        path = self.run.path / "validation.npy"
        data = write_validation(self.task, path, config.validation_limit, given, config.drop_limit)
        check_validation(self.task, data)
        return data

    def validation_inputs(self, count: int) -> Tensor:
        """Return the first `count` validation inputs ``(N, ...)``, which no compressed form was fitted to."""
        stored = np.load(self.data.inputs, mmap_mode="r", allow_pickle=False)
        return torch.from_numpy(stored[:count].copy())

    def test_share(self) -> float:
        """Return the samples of the test data over those of the validation data; 1 where that is not known."""
        size = self.task.test_size()
        return 1.0 if size is None else size / max(len(self.data.targets), 1)

    def calibration(self) -> Iterator[Tensor]:
        """Yield calibration batches."""
        return self.task.calibration(_BATCH)

    # -- baseline -------------------------------------------------------------------------------------------------

    def open_baseline(self, on_message: Callable[[str], None] = lambda text: None) -> TrialRecord:
        """Build, check and measure the uncompressed model at every dense dtype; keep the fastest as the baseline.

        Args:
            on_message: Called with what a dtype that the model cannot run in is left out for.

        Raises:
            ConfigError: The dtype that the user fixed does not run here.
            EngineError, VerificationError: The model runs in none of them.
        """
        folder = self.run.baseline
        # What a process left that died while it built.
        shutil.rmtree(folder, ignore_errors=True)
        ledger = TimeLedger()
        files: list[tuple[CompressionPolicy, EngineFile]] = []
        where = f"{self.engine} ({self.device})"
        wanted = self._config.dense_dtype if self.forecast is None else self.forecast.dense_dtype
        dtypes = dense_dtypes(self.capabilities, wanted, where)
        failed: EngineError | VerificationError | None = None
        with ledger.charge("profile"):
            self.graphs.export_base()
        for dtype in dtypes:
            policy = CompressionPolicy(dense_dtype=dtype)
            try:
                files.append((policy, self.build(self.original, policy, folder / dtype, ledger)))
            except (EngineError, VerificationError) as error:
                # Another dtype may do: token ids above 256 are none in bf16.
                failed = error
                if len(dtypes) > 1:
                    on_message(f"{dtype} is left out, as the uncompressed model cannot run in it: {error}")
                shutil.rmtree(folder / dtype, ignore_errors=True)
        if failed is not None and not files:
            raise failed
        self.dtypes = len(dtypes)
        policy, file = files[0] if len(files) == 1 else self._fastest(files, ledger)
        for path in (folder / policy.dense_dtype).iterdir():
            path.replace(folder / path.name)
        file = replace(file, path=folder / file.path.name)
        for _, other in files:
            for path in other.path.parent.glob("*") if other.path.parent != folder else ():
                path.unlink()
            if other.path.parent != folder:
                other.path.parent.rmdir()
        with ledger.charge("proxy"):
            accuracy = self.accuracy(file)
        with ledger.charge("measure"):
            measurement = self._against_its_copy(file) if self.forecast is None else self._predicted(policy)
        self._baseline = baseline = TrialRecord(
            number=0, policy=policy, state="complete", stage="baseline", accuracy=accuracy, measurement=measurement,
            size_bytes=file.size_bytes, macs=self.inventory.macs,
            params=sum(p.numel() for p in self.original.parameters()),
            seconds=dict(ledger.seconds), artifact="baseline", samples=len(self.data.targets),
            metric=metric_name(self.task),
        )  # fmt: skip
        self._baseline_file = file
        self._baseline = write_artifact(folder, baseline, file, self.engine_version)
        self.ledger.merge(ledger)
        return self._baseline

    def _against_its_copy(self, file: EngineFile) -> Measurement:
        """Return the baseline's measurement; its A/A figures and occasions are those of a copy of its file."""
        with tempfile.TemporaryDirectory(dir=self.run.path, prefix=".copy-") as folder:
            copies = {path: Path(folder) / path.name for path in file.files()}
            for path, copy in copies.items():
                shutil.copyfile(path, copy)
            own, copied = self.worker.measure(
                [file, replace(file, path=copies[file.path])], self._latency_inputs(), self._again()
            )
        middle, low, high = copied.quiet
        return replace(own, aa_ratio=middle, aa_low=low, aa_high=high, occasions=copied.occasions)

    def _fastest(
        self, files: Sequence[tuple[CompressionPolicy, EngineFile]], ledger: TimeLedger
    ) -> tuple[CompressionPolicy, EngineFile]:
        with ledger.charge("measure"):
            for protocol in dict.fromkeys((Protocol.again(1), self._again())):
                measured = self.worker.measure([file for _, file in files], self._latency_inputs(), protocol)
                first, second, *_ = sorted(one.latency_ms for one in measured)
                if second > _CLEARLY * first:
                    break
        return min(zip(files, measured, strict=True), key=lambda pair: pair[1].latency_ms)[0]

    def left_alone(self) -> str | None:
        """Say what cannot be compressed, and which share of the baseline's time it takes; None where all can be."""
        inventory = self.inventory
        names = {*inventory.whole_left_alone, *inventory.axes_left_alone}
        shares: dict[str, float] = {}
        if names and self.forecast is None:
            with self.ledger.charge("profile"), suppress(UnavailableError, EngineError):
                kernels = self.worker.profile(self.baseline_file, self._latency_inputs(), seconds=_KERNEL_SECONDS)
                shares = self.graphs.module_shares(kernels, names)
        return inventory.left_alone(shares)

    def reopen_baseline(self, record: TrialRecord, file: EngineFile) -> None:
        """Take the baseline that an interrupted run left."""
        self._baseline, self._baseline_file = record, file

    @property
    def baseline(self) -> TrialRecord:
        """The uncompressed network's record; `open_baseline` or `reopen_baseline` comes first.

        Raises:
            ConfigError: Neither has.
        """
        if self._baseline is None:
            raise ConfigError("The baseline has not been measured yet.")
        return self._baseline

    @property
    def baseline_file(self) -> EngineFile:
        """The baseline's engine file; `open_baseline` or `reopen_baseline` comes first."""
        if self._baseline_file is None:
            raise ConfigError("The baseline has not been measured yet.")
        return self._baseline_file

    # -- stations -------------------------------------------------------------------------------------------------

    def compress(self, policy: CompressionPolicy, ledger: TimeLedger) -> nn.Module:
        """Return the compressed model as good as it gets without training.

        Raises:
            CompressionError: The policy does not fit the model.
        """
        return self.compressor.model(policy, ledger)

    def build(
        self,
        model: nn.Module,
        policy: CompressionPolicy,
        folder: Path,
        ledger: TimeLedger,
        background: BackgroundTask = NO_BACKGROUND_TASK,
    ) -> EngineFile:
        """Return a verified engine file of `model`: see `VerifiedBuilder.build`."""
        return self._builder.build(model, policy, folder, ledger, background)

    def accuracy(self, file: EngineFile) -> float:
        """Return the metric on the validation data of the engine file itself, or of its graph (`device_absent`)."""
        outputs = self.worker.infer(self._builder.runnable(file), self.data.inputs)
        return self.task.metric(torch.from_numpy(outputs), self.data.targets)

    def test_accuracy(self, file: EngineFile) -> float:
        """Return the metric of one file on the test data; see `test_accuracies`."""
        return self.test_accuracies([file])[0]

    def test_accuracies(self, files: Sequence[EngineFile]) -> list[float]:
        """Return the metric of each file on the test data, which are read once, when every choice has been made.

        Raises:
            ConfigError: They cannot be read, there are none, or the metric gives no number.
        """
        outputs: list[list[Tensor]] = [[] for _ in files]
        targets: list[Tensor] = []
        for inputs, target in self.task.test(4 * _BATCH):
            values = inputs.float().numpy()
            for file, own in zip(files, outputs, strict=True):
                own.append(torch.from_numpy(self.worker.infer(self._builder.runnable(file), values)))
            targets.append(target)
        if not targets:
            raise ConfigError(f"Task {self.task.name!r} gave no test data when they were read in the end.")
        return [self.task.metric(torch.cat(own), torch.cat(targets)) for own in outputs]

    def _latency_inputs(self) -> np.ndarray:
        return self.inputs.float().numpy()

    def measure(
        self, file: EngineFile, protocol: Protocol | None = None, earlier: Measurement | None = None
    ) -> Measurement:
        """Measure an engine file interleaved with the baseline; the raw samples are kept beside it.

        Args:
            file: What is measured.
            protocol: How long; None for further occasions, as many as the run has time for.
            earlier: Of the same network (its latency does not depend on its weights), whose occasions count as well.
        """
        kept = file.path.parent / "samples.npz"
        timing = self.timing(protocol)
        files = [self.baseline_file, file]
        found = self.worker.measure(files, self._latency_inputs(), timing, keep_samples=kept)[1]
        self._baselines_ms.append(found.baseline_ms)
        if earlier is not None and earlier.occasions:
            found = combined(found, [*earlier.occasions, *found.occasions], self.spread)
        if len(found.occasions) > 1:
            self._repeated[found.occasions[0].at] = found
        return found

    @property
    def spread(self) -> Spread:
        """What a ratio differs by from occasion to occasion, going by all that was measured repeatedly in this run."""
        recorded = self._baseline.measurement if self._baseline is not None else None
        return Spread.of(self._repeated.values(), [recorded] if recorded is not None else [])

    def timing(self, protocol: Protocol | None = None) -> Protocol:
        """Return a protocol (None for that of further occasions) with what this run knows of its machine."""
        spread = self.spread
        return replace(
            protocol or self._again(), usual_ms=self.usual_ms, deviation=spread.deviation, freedom=spread.freedom,
            crossed=spread.crossed,
        )  # fmt: skip

    def _again(self) -> Protocol:
        """Return the protocol of further occasions."""
        return Protocol.again(self._config.occasions)

    def _predicted(self, policy: CompressionPolicy) -> Measurement:
        assert self.forecast is not None
        return self.forecast.measurement(policy, batch_size=self._config.batch_size, threads=self._config.threads)

    @property
    def usual_ms(self) -> float:
        """The baseline's latency in the last undisturbed measurements; 0 before any."""
        recorded = self._baseline.measurement if self._baseline is not None else None
        return quiet_latency(list(self._baselines_ms) or [recorded.latency_ms if recorded is not None else 0.0])

    def score(
        self, model: nn.Module, policy: CompressionPolicy, number: int, folder: Path, ledger: TimeLedger, *,
        stage: str, protocol: Protocol | None = None, background: BackgroundTask = NO_BACKGROUND_TASK,
        earlier: Measurement | None = None,
    ) -> TrialRecord:  # fmt: skip
        """Take a compressed model through build, check, accuracy and latency, and write its artefact.

        `earlier` is of the same policy with other weights. `background` goes on while the engine is built and its
        accuracy taken; it has ended before anything is measured.
        """
        file = self.build(model, policy, folder, ledger, background)
        with ledger.charge("proxy" if stage == "proxy" else "recovery"):
            accuracy = self.accuracy(file)
            background.join()
        with ledger.charge("measure"):
            measurement = self.measure(file, protocol, earlier) if self.forecast is None else self._predicted(policy)
        layer_ms: dict[str, float] = {}
        if stage == "proxy" and self.forecast is None:
            with ledger.charge("profile"):
                layer_ms = self._layer_ms(file, measurement)
        record = TrialRecord(
            number=number, policy=policy, state="complete", stage=stage, accuracy=accuracy, measurement=measurement,
            size_bytes=file.size_bytes, macs=sum(count_macs(model, self.data.reference[:1]).values()),
            params=sum(p.numel() for p in model.parameters()), seconds=dict(ledger.seconds),
            artifact=str(folder.relative_to(self.run.path)), layer_ms=layer_ms, samples=len(self.data.targets),
        )  # fmt: skip
        return write_artifact(folder, record, file, self.engine_version)

    def _layer_ms(self, file: EngineFile, measurement: Measurement) -> dict[str, float]:
        """Return what each layer takes, for a predictor to learn from; nothing where the engine does not tell."""
        if self._config.table == NO_TABLE:
            return {}
        try:
            kernels = self.worker.profile(file, self._latency_inputs(), seconds=_KERNEL_SECONDS)
            found = self.graphs.shares(kernels, measurement.latency_ms)
        except (UnavailableError, EngineError):
            # The candidate itself was built, checked and measured.
            return {}
        write_json(file.path.parent / "kernels.json", [kernel.to_dict() for kernel in kernels])
        return {name: float(f"{time_ms:.7g}") for name, time_ms in found.items()}

    def measure_again(self, record: TrialRecord, protocol: Protocol | None = None) -> TrialRecord:
        """Return a finished record with further occasions; its artefact says so too."""
        assert record.artifact is not None
        self.worker.limits.new_candidate()
        folder, ledger = self.run.path / record.artifact, TimeLedger()
        file = read_artifact(folder, Trust(code=frozenset(code_of(self._config))))
        try:
            with ledger.charge("measure"):
                measurement = self.measure(file, protocol, record.measurement)
        finally:
            self.ledger.merge(ledger)
        return write_record(folder, replace(record, measurement=measurement))

    def prepare(self, policy: CompressionPolicy, *, look: bool) -> None:
        """Compress what is evaluated next, and look at it where wanted; the last one prepared is kept."""
        ledger = TimeLedger()
        model = self.compress(policy, ledger)
        self._prepared = _Prepared(policy, model, self._estimated(model, ledger) if look else None, ledger)

    def evaluate(
        self, policy: CompressionPolicy, number: int, protocol: Protocol | None = None, *,
        hopeless: Callable[[ProxyEstimate], bool] | None = None, meanwhile: Callable[[], None] | None = None,
    ) -> TrialRecord:  # fmt: skip
        """Score one policy without fine-tuning, by `Protocol.trial`; what a search trial does.

        What is `hopeless` at first sight is not built; its record says ``"rejected"``. `meanwhile` is run in a thread
        of its own while the engine is built and its accuracy taken; it has ended before anything is measured.
        """
        made, self._prepared = self._prepared, None
        if made is None or made.policy != policy:
            made = None
        # What was done while another candidate was scored took none of the run's time.
        before = made.ledger if made is not None else TimeLedger()
        ledger, protocol = before.copy(), protocol or Protocol.trial()
        try:
            model = made.model if made is not None else self.compress(policy, ledger)
            if hopeless is not None:
                seen = made.seen if made is not None and made.seen is not None else self._estimated(model, ledger)
                if hopeless(seen):
                    return TrialRecord(number, policy, "rejected", accuracy=seen.accuracy, seconds=dict(ledger.seconds))
            with BackgroundTask(meanwhile) as background:
                return self.score(
                    model, policy, number, self.run.artifact(number), ledger,
                    stage="proxy", protocol=protocol, background=background,
                )  # fmt: skip
        finally:
            self.ledger.merge(ledger.since(before))

    def _estimated(self, model: nn.Module, ledger: TimeLedger) -> ProxyEstimate:
        with ledger.charge("proxy"):
            return estimate_accuracy(model, self.data, self.task.metric, self.compressor.dtype)
