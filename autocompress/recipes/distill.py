"""Distillation without a search: a smaller model of the user's, taught by the task's own.

Owns the order of things (what can go wrong is found before anything is trained) and what is written; `recovery` owns
the losses and the training. Figures are of the engine files, the metric as well as the latency.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from autocompress.config import RunConfig
from autocompress.engines.artifact import write_engine
from autocompress.engines.base import EngineFile, dense_dtypes
from autocompress.engines.options import engine_options
from autocompress.errors import ConfigError, DeviceNotFoundError
from autocompress.evaluation.agreement import check_outputs_match
from autocompress.files import write_bytes, write_json
from autocompress.graph.builder import Ranges, exported
from autocompress.graph.export import save_onnx
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.protocol import Protocol
from autocompress.model.inventory import count_macs
from autocompress.policy import CompressionPolicy
from autocompress.recovery import fast_dtype
from autocompress.recovery.budget import Budget
from autocompress.recovery.distillation import Teacher, taught_by
from autocompress.recovery.finetune import finetune
from autocompress.runs.records import Measurement
from autocompress.runs.scratch import ScratchFolder
from autocompress.tasks.base import Batch, Task
from autocompress.tasks.validation import REFERENCE_SAMPLES

_BATCH = 256
_CHECKPOINT, _RESULT = "checkpoint.safetensors", "distill.json"


@dataclass(frozen=True)
class Figures:
    """What one of the two networks is like, as the engine runs it.

    Attributes:
        validation, test: The task's metric; the test data are read once.
        measurement: Latency, both networks interleaved; the teacher is the baseline.
        dtype: The engine's fastest dense dtype for this network, or the one that was asked for.
        size_bytes: Of the engine's files.
        macs, params: Multiply-accumulates of one sample, and parameters.
    """

    validation: float
    test: float
    measurement: Measurement
    dtype: str
    size_bytes: int
    macs: int
    params: int

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**asdict(self), "measurement": self.measurement.to_dict()}


@dataclass(frozen=True)
class DistillationResult:
    """A student that has been taught.

    Attributes:
        model: The student, in eval mode.
        teacher, student: Figures of both.
        engine: Name of the engine they are of.
        distilled: By which methods, and where inner outputs were compared.
        epochs: Passes over the training data.
        loss: Mean over the last epoch; None where a finished training was gone on with.
    """

    model: nn.Module
    teacher: Figures
    student: Figures
    engine: str
    distilled: str
    epochs: float
    loss: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without the model."""
        return {
            "teacher": self.teacher.to_dict(),
            "student": self.student.to_dict(),
            "engine": self.engine,
            "distilled": self.distilled,
            "epochs": self.epochs,
            "loss": self.loss,
        }


def distill(
    task: Task,
    student: nn.Module,
    config: RunConfig,
    worker: EngineWorker,
    *,
    epochs: float,
    to: Path | None = None,
    protocol: Protocol | None = None,
    stage: Callable[[str], None] = lambda text: None,
    progress: Callable[[float, str], None] = lambda fraction, text: None,
) -> DistillationResult:
    """Train a student to be like a task's model, and measure both.

    Args:
        task: Gives the teacher, data and metric.
        student: Takes and gives what the teacher does; not changed.
        config: Engine, threads, batch size, dense dtype, the timeout, and the recovery section.
        worker: Builds, runs and measures engines.
        epochs: Passes over the training data; as many as the timeout leaves time for, where it sets one.
        to: Gets ``weights.safetensors``, ``model.onnx``, the engine, ``distill.json`` and, in ``teacher/``, the
            teacher's engine; a checkpoint in it is gone on from. None writes nothing.
        protocol: How long to measure.
        stage: Called with what begins.
        progress: Called with the fraction of the training done and a short text.

    Raises:
        ConfigError: Teacher and student do not fit each other, or there is nothing to train (on).
        UnavailableError: The engine or its device is not here.
        EngineError: The student cannot be exported or built, or its training diverged.
        VerificationError: An engine does not compute what its model does.
    """
    started = time.monotonic()
    described = worker.describe(config.engine, config.engine_options)
    if not described["runs_here"]:
        raise DeviceNotFoundError(
            f"{described['device']} is not here, and distill measures. Take another engine, then `autocompress build`."
        )
    where = f"{config.engine} ({described['device']})"
    policies = [CompressionPolicy(d) for d in dense_dtypes(described["capabilities"], config.dense_dtype, where)]
    teacher, student = task.network(), copy.deepcopy(student).eval()
    _check(task, teacher, student, epochs)
    distiller = taught_by(task.network(), student, task, config.recovery)
    stage("Exporting the student")
    exported(student, task.example_inputs(config.batch_size), Ranges(), config.engine)
    stage(f"Teaching the student: {distiller}")
    allowed = config.working_seconds
    seconds = math.inf if allowed is None else max(allowed - (time.monotonic() - started), 0.0)
    asked = Teacher(task.network(), fast_dtype(teacher, task.example_inputs(2)))
    report = finetune(
        student, asked, task, config.recovery, Budget(epochs, seconds),
        checkpoint=None if to is None else to / _CHECKPOINT, progress=progress, untrained=True,
    )  # fmt: skip
    student.to(memory_format=torch.contiguous_format)
    stage("Measuring teacher and student")
    with ScratchFolder("distill") as folder:
        bench = _Bench(task, config, worker, folder, described["capabilities"])
        files = [bench.build(model, policies, name) for name, model in (("teacher", teacher), ("student", student))]
        chosen, measured = bench.measure(files, protocol or Protocol.standard())
        stage("Reading the test data")
        figures = [bench.figures(*three) for three in zip((teacher, student), chosen, measured, strict=True)]
        loss = report.loss if math.isfinite(report.loss) else None
        found = DistillationResult(student, figures[0], figures[1], config.engine, distiller, report.epochs, loss)
        if to is not None:
            _write(found, chosen, to, described["version"])
    return found


def begun(to: Path) -> bool:
    """Return whether `to` holds a training that was interrupted."""
    return (to / _CHECKPOINT).is_file() and not (to / _RESULT).exists()


def width_of_outputs(task: Task) -> int:
    """Return how many outputs a task's model gives for a sample (or for a pixel of it)."""
    with torch.no_grad():
        return int(task.network()(task.example_inputs(2)).shape[1])


def _check(task: Task, teacher: nn.Module, student: nn.Module, epochs: float) -> None:
    """Refuse what would only be found out while training, or after it.

    Raises:
        ConfigError: See `distill`.
    """
    if not epochs > 0:
        raise ConfigError(f"epochs is {epochs}; give more than 0.")
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ConfigError(
            f"Student {type(student).__name__} has no trainable parameters: it has none at all, or every one has "
            "requires_grad=False."
        )
    if task.train_size() < 1:
        raise ConfigError(f"Task {task.name!r} has no training data to teach a student on.")
    # A task that cannot measure says so now.
    seen = next(task.validation(_BATCH), None)
    if seen is None:
        raise ConfigError(f"Task {task.name!r} has no validation data to measure a student on.")
    with torch.no_grad():
        task.metric(teacher(seen[0]), seen[1])
    inputs = task.example_inputs(2)
    outputs = {}
    for who, model in (("teacher", teacher), ("student", student)):
        try:
            with torch.no_grad():
                outputs[who] = model(inputs)
        except Exception as error:  # whatever the user's network raises
            raise ConfigError(
                f"The {who}, {type(model).__name__}, does not take inputs {tuple(inputs.shape)}: {error}"
            ) from error
    shapes = {who: tuple(o.shape) if isinstance(o, Tensor) else type(o).__name__ for who, o in outputs.items()}
    if shapes["teacher"] != shapes["student"]:
        raise ConfigError(
            f"Teacher and student differ in what they give for inputs {tuple(inputs.shape)}: the teacher "
            f"{shapes['teacher']}, the student {shapes['student']}. Give the student as many outputs as the teacher."
        )
    for who, found in outputs.items():
        if not bool(found.isfinite().all()):
            raise ConfigError(f"The {who} gives NaN or infinite outputs before any training; check its weights.")


@dataclass
class _Bench:
    """Where engines of both networks are built, checked and measured."""

    task: Task
    config: RunConfig
    worker: EngineWorker
    folder: Path
    capabilities: tuple[str, ...]

    def build(self, model: nn.Module, policies: Sequence[CompressionPolicy], name: str) -> list[EngineFile]:
        """Return an engine file of a model for every policy, checked against it."""
        graph = exported(model, self.task.example_inputs(self.config.batch_size), Ranges(), self.config.engine)
        reference = self.task.example_inputs(REFERENCE_SAMPLES).float()
        with torch.no_grad():
            expected = model(reference).float().numpy()
        files = []
        for policy in policies:
            folder = self.folder / f"{name}-{policy.dense_dtype}"
            folder.mkdir()
            onnx = folder / "model.onnx"
            save_onnx(graph.model, onnx)
            options = engine_options(policy, self.config, self.capabilities)
            files.append(self.worker.build(self.config.engine, onnx, options, folder / "model"))
            found = self.worker.infer(files[-1], reference.numpy(), threads=self.config.threads)
            check_outputs_match(f"The engine of the {name}", expected, found, policy, onnx)
        return files

    def measure(self, files: list[list[EngineFile]], protocol: Protocol) -> tuple[list[EngineFile], list[Measurement]]:
        """Return the fastest file of each network, and their latencies measured against each other."""
        inputs = self.task.example_inputs(self.config.batch_size).float().numpy()
        chosen = [of_one[0] for of_one in files]
        if len(files[0]) > 1:
            every = [file for of_one in files for file in of_one]
            latency = {
                file.path: found.latency_ms
                for file, found in zip(every, self.worker.measure(every, inputs, protocol), strict=True)
            }
            chosen = [min(of_one, key=lambda file: latency[file.path]) for of_one in files]
        return chosen, self.worker.measure(chosen, inputs, protocol)

    def figures(self, model: nn.Module, file: EngineFile, measurement: Measurement) -> Figures:
        return Figures(
            validation=self._metric(file, self.task.validation(_BATCH)),
            test=self._metric(file, self.task.test(_BATCH)),
            measurement=measurement,
            dtype=file.options.dtype,
            size_bytes=file.size_bytes,
            macs=sum(count_macs(model, self.task.example_inputs(1)).values()),
            params=sum(p.numel() for p in model.parameters()),
        )

    def _metric(self, file: EngineFile, batches: Iterator[Batch]) -> float:
        outputs, targets = [], []
        for inputs, target in batches:
            outputs.append(torch.from_numpy(self.worker.infer(file, inputs.float().numpy())))
            targets.append(target)
        if not outputs:
            raise ConfigError(f"Task {self.task.name!r} has no data to score a model on.")
        return self.task.metric(torch.cat(outputs), torch.cat(targets))


def _write(result: DistillationResult, files: list[EngineFile], to: Path, engine_version: str) -> None:
    for folder, file in ((to / "teacher", files[0]), (to, files[1])):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for path in {file.path.parent / "model.onnx", *file.files()}:
                shutil.copy2(path, folder / path.name)
        except OSError as error:
            raise ConfigError(f"Cannot write {folder}: {error.strerror or error}. Free some space.") from error
        if folder is to:
            state = {name: tensor.detach().contiguous().clone() for name, tensor in result.model.state_dict().items()}
            write_bytes(to / "weights.safetensors", save(state))
        write_engine(folder, replace(file, path=folder / file.path.name), engine_version)
    write_json(to / _RESULT, result.to_dict())
    (to / _CHECKPOINT).unlink(missing_ok=True)
