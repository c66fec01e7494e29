"""Is a directory still what was measured? Its hashes, and its engine's outputs on the reference samples.

Works on any machine that has the engine; needs no run directory, no task and no torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from autocompress.deploy.manifest import Manifest
from autocompress.documents import reading
from autocompress.engines.base import Array, EngineFile
from autocompress.errors import VerificationError
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.measure import Protocol as TimingProtocol
from autocompress.runs.records import EQUAL, Measurement
from autocompress.runs.trust import Trust, trust_of

REFERENCE_NAME = "reference.safetensors"
# Largest |difference| over largest |reference output|. One file on one machine repeats itself but for the order of
# sums over threads; anything near this is another model.
TOLERANCE = 1e-3
# Measurements of which one must show that the file is not slower.
_TRIES = 3


class Worker(Protocol):
    """What verification needs of `autocompress.measurement.client.EngineWorker`."""

    def describe(self, engine: str) -> dict[str, Any]:
        """Return the engine's ``version`` and ``device``."""

    def infer(self, file: EngineFile, inputs: Array) -> Array:
        """Run ``(n, ...)`` inputs and return ``(n, ...)`` outputs."""

    def measure(self, files: Sequence[EngineFile], inputs: Array, protocol: TimingProtocol) -> list[Measurement]:
        """Measure files interleaved; the first is the baseline."""


@contextlib.contextmanager
def fresh(worker: Worker | None) -> Iterator[Worker]:
    """Yield `worker`, or a new child process that ends afterwards."""
    if worker is not None:
        yield worker
    else:
        with EngineWorker() as started:
            yield started


def verify(
    directory: Path, worker: Worker | None = None, tolerance: float = TOLERANCE, *, trust: bool | Trust = False
) -> dict[str, Any]:
    """Check a deployed directory and return what was found.

    Args:
        directory: As `deploy.package.deploy` wrote it.
        worker: Runs the engine; None starts a fresh process.
        tolerance: Largest allowed difference from the reference outputs, relative to the largest of them. Another
            processor may round bf16, fp16 and int8 differently; allow for that here.
        trust: Whether code that its options name may run; see `runs.trust`.

    Raises:
        ConfigError: It is no deployed directory, or names code.
        VerificationError: A file is damaged, or the outputs differ.
        BuildError: The engine does not open the file here.
    """
    manifest = Manifest.read(directory)
    manifest.check_files(directory)
    file = manifest.engine_file(directory, trust_of(directory, trust))
    with fresh(worker) as running:
        outputs = check_outputs(running, file, directory / REFERENCE_NAME, tolerance)
        found = running.describe(file.engine)
    return {
        "directory": str(directory),
        "engine": manifest.engine,
        "engine_version": found["version"],
        "device": found["device"],
        "file": str(file.path),
        "policy_hash": manifest.policy_hash,
        "files": len(manifest.files),
        "outputs": outputs,
    }


def read_reference(path: Path) -> tuple[Array, Array]:
    """Return the reference inputs ``(n, ...)`` and the outputs ``(n, ...)`` of the measured engine file.

    Raises:
        VerificationError: The file is missing or damaged.
    """
    mend = "There is nothing to verify outputs against."
    with reading(path, mend, VerificationError, also=(SafetensorError,)):
        tensors = load_file(path)
        inputs, outputs = tensors["inputs"], tensors["outputs"]
        if not all(len(one.shape) and np.issubdtype(one.dtype, np.number) for one in (inputs, outputs)):
            raise ValueError(f"inputs {inputs.dtype} {inputs.shape}, outputs {outputs.dtype} {outputs.shape}")
    if len(inputs) == 0 or len(inputs) != len(outputs) or not np.isfinite(outputs).all():
        raise VerificationError(f"{path} holds no usable reference: {inputs.shape} inputs, {outputs.shape} outputs.")
    return inputs, outputs


def check_outputs(worker: Worker, file: EngineFile, reference: Path, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Run the reference samples and compare; returns samples, tolerance and the largest relative difference.

    Raises:
        VerificationError: Shapes differ, an output is not finite, or a difference exceeds `tolerance`.
    """
    inputs, expected = read_reference(reference)
    found = worker.infer(file, inputs)
    if found.shape != expected.shape:
        raise VerificationError(f"{file.path} returns outputs of shape {found.shape}, not {expected.shape}.")
    if not np.isfinite(found).all():
        raise VerificationError(f"{file.path} returns values that are not finite.")
    scale = max(float(np.abs(expected).max()), float(np.finfo(np.float32).tiny))
    difference = float(np.abs(found - expected).max()) / scale
    same = float(np.mean(_decisions(found) == _decisions(expected)))
    if difference > tolerance:
        raise VerificationError(
            f"{file.path} does not compute what was measured: outputs differ by up to {difference:.2g} of the largest "
            f"reference output (allowed {tolerance:g}); {same:.1%} of {len(inputs)} samples keep their top answer. "
            "On another processor, rounding differs: repeat with a larger tolerance, or search on that device."
        )
    return {"samples": len(inputs), "tolerance": tolerance, "difference": difference, "same_top_1": same}


def never_slower(
    worker: Worker, baseline: EngineFile, file: EngineFile, inputs: Array, timing: TimingProtocol | None = None
) -> Measurement:
    """Measure a file against the baseline and return the measurement that shows it to be no slower.

    One measurement suffices that says so: a ratio of at most 1 + `EQUAL`, and no verdict of slower. Without one it is
    measured again, since noise looks like either.

    Raises:
        VerificationError: It is slower, or the machine is too noisy to tell that it is not.
    """
    tries = []
    for _ in range(_TRIES):
        measured = worker.measure([baseline, file], inputs, timing or TimingProtocol.standard())[1]
        if measured.verdict != "slower" and measured.ratio <= 1 + EQUAL:
            return measured
        tries.append(measured)
    worst = next((m for m in tries if m.verdict == "slower"), None)
    last = worst or tries[-1]
    figures = (
        f"{last.latency_ms:.4g} ms against {last.baseline_ms:.4g} ms, {last.ratio:.3f}x (95 % interval "
        f"{last.ratio_low:.3f} to {last.ratio_high:.3f})"
    )
    if worst is not None:
        raise VerificationError(
            f"{file.path.name} is slower than the uncompressed model here: {figures}. It was not deployed; choose "
            "another trial with --trial."
        )
    disturbed = f" Disturbed: {'; '.join(last.noise)}." if last.noise else ""
    raise VerificationError(
        f"{file.path.name} could not be shown to be no slower than the uncompressed model in {_TRIES} tries: "
        f"{figures}.{disturbed} It was not deployed; try again on a quiet machine, or another trial with --trial."
    )


def _decisions(outputs: Array) -> Array:
    best: Array = outputs.reshape(len(outputs), -1).argmax(axis=1)
    return best
