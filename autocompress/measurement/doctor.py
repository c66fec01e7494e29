"""``autocompress doctor``: does an engine work here, in small steps, each with how to mend it.

The one command that proves the TensorRT path on a GPU: library, driver and GPU, clocks, then a small network built,
run, compared and timed in every dtype offered. Works for every engine. It owns no knowledge of an engine beyond its
interface.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from autocompress.engines import engine_class, get_engine
from autocompress.engines.base import EngineFile, EngineOptions
from autocompress.errors import AutoCompressError, DeviceNotFoundError, MissingDependencyError
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.measure import Protocol
from autocompress.quantities import format_bytes, format_ms
from autocompress.runs.scratch import ScratchFolder

OK, FAILED, SKIPPED, NOTE = "ok", "failed", "skipped", "note"
_SIZE, _CHANNELS, _CLASSES = 32, 32, 16
# Largest |difference| over largest |output| of the small network against fp32 numpy, by what is rounded.
_TOLERANCES = {"fp32": 1e-2, "fp16": 2e-2, "bf16": 5e-2, "int8": 0.1}
_SMI = "clocks.sm,clocks.max.sm,temperature.gpu,persistence_mode,clocks_throttle_reasons.active,driver_version"
_SMI_SECONDS = 10.0
_PROTOCOL = Protocol(warm_up_s=0.1, min_seconds=0.2, max_seconds=1.0, rounds=5)


@dataclass(frozen=True)
class Check:
    """One step.

    Attributes:
        name: What was tried.
        state: ``"ok"``, ``"failed"``, ``"skipped"`` (needs what failed before) or ``"note"`` (works, but know this).
        detail: What was found.
        remedy: How to mend it; empty when there is nothing to mend.
    """

    name: str
    state: str
    detail: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the JSON form."""
        return asdict(self)


def examine(engine: str, settings: Mapping[str, Any] | None = None) -> Iterator[Check]:
    """Try an engine step by step, and yield each step as it is done.

    With `settings` that name a GPU that is not here (``compute_capability``), engines are built and not run.

    Raises:
        ConfigError: No such engine, or a setting that it does not have.
    """
    settings = dict(settings or {})
    found = get_engine(engine)
    try:
        yield Check("library", OK, f"{engine} {found.version()}")
    except MissingDependencyError as error:
        yield Check("library", FAILED, str(error), f"pip install 'autocompress[{found.extra}]'")
        return
    with EngineWorker() as worker:
        ahead = "compute_capability" in settings
        try:
            told = worker.describe(engine, settings)
        except DeviceNotFoundError as error:
            yield Check("device", FAILED, str(error), "See above; then run this command again.")
            yield Check("networks", SKIPPED, "nothing can be run without the device")
            return
        yield Check("device", OK, told["device"])
        yield Check("dtypes", OK, ", ".join(told["capabilities"]))
        if engine_class(engine).uses_gpu and not ahead:
            yield from _clocks()
        with ScratchFolder("doctor") as folder:
            yield from _networks(worker, engine, told["capabilities"], settings, folder, ahead=ahead)


def _clocks() -> Iterator[Check]:
    """Tell what may disturb timing on a GPU: clocks that move, heat, throttling."""
    program = shutil.which("nvidia-smi")
    if program is None:
        yield Check(
            "clocks", NOTE, "nvidia-smi is not installed, so clocks and heat are unknown", "Install nvidia-utils."
        )
        return
    command = [program, f"--query-gpu={_SMI}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True).stdout
        clock, top, heat, persistence, throttle, driver = (part.strip() for part in said.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        yield Check(
            "clocks", NOTE, f"nvidia-smi does not answer: {error}", "Run nvidia-smi by hand; restart the driver."
        )
        return
    detail = f"driver {driver}, {clock} of {top} MHz, {heat} °C, throttle reasons {throttle}"
    yield Check("clocks", OK, detail)
    if persistence != "Enabled":
        yield Check("persistence mode", NOTE, "off: the driver unloads between runs", "sudo nvidia-smi -pm 1")
    yield Check(
        "locked clocks", NOTE, "latency follows the clock; lock it for repeatable figures",
        f"sudo nvidia-smi -lgc {top}   (sudo nvidia-smi -rgc undoes it)",
    )  # fmt: skip


def _networks(
    worker: EngineWorker, engine: str, offered: list[str], settings: Mapping[str, Any], folder: Path, *, ahead: bool
) -> Iterator[Check]:
    graphs = {"plain": _write(folder / "plain.onnx", quantized=False)}
    dense = [d for d in offered if d in ("fp32", "bf16", "fp16")]
    tries = [(dtype, "plain") for dtype in dense]
    if "int8" in offered:
        graphs["int8"] = _write(folder / "int8.onnx", quantized=True)
        tries.append(("fp16" if "fp16" in dense and engine_class(engine).uses_gpu else dense[0], "int8"))
    inputs = np.random.default_rng(1).standard_normal((1, 3, _SIZE, _SIZE)).astype(np.float32)
    for dtype, kind in tries:
        name = dtype if kind == "plain" else f"int8 in {dtype}"
        options = EngineOptions(dtype, settings=tuple(settings.items()))
        try:
            file = worker.build(engine, graphs[kind], options, folder / f"{kind}-{dtype}")
            if ahead:
                yield Check(name, OK, f"built, {format_bytes(file.size_bytes)}; not run: it is for another GPU")
                continue
            yield _run(worker, file, inputs, name, _TOLERANCES["int8" if kind == "int8" else dtype])
        except AutoCompressError as error:
            yield Check(name, FAILED, str(error), "The message says what; the graph is a plain convolution network.")


def _run(worker: EngineWorker, file: EngineFile, inputs: NDArray[np.float32], name: str, tolerance: float) -> Check:
    found, expected = worker.infer(file, inputs), _reference(inputs)
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error <= tolerance:
        return Check(
            name, FAILED, f"built and run, but its outputs are {error:.2g} off, more than {tolerance:g}",
            "Report this, with the output of `autocompress env`.",
        )  # fmt: skip
    measured = worker.measure([file], inputs, _PROTOCOL)[0]
    return Check(
        name, OK, f"built, {format_bytes(file.size_bytes)}; runs, outputs {error:.1g} off; "
        f"{format_ms(measured.latency_ms)} median, {format_ms(measured.p99_ms)} p99, n={measured.n}",
    )  # fmt: skip


def _weights() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return {
        "stem": (rng.standard_normal((_CHANNELS, 3, 3, 3)) / 5).astype(np.float32),
        "conv": (rng.standard_normal((_CHANNELS, _CHANNELS, 3, 3)) / 17).astype(np.float32),
        "head": rng.standard_normal((_CHANNELS, _CLASSES)).astype(np.float32),
    }


def _write(path: Path, *, quantized: bool) -> Path:
    """Write conv, ReLU, conv, ReLU, mean, matrix product; with Q/DQ around the second convolution."""
    made: dict[str, NDArray[Any]] = dict(_weights())
    nodes = [
        helper.make_node("Conv", ["input", "stem"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["a0"]),
    ]
    source, weight = "a0", "conv"
    if quantized:
        steps = (np.abs(made["conv"]).max(axis=(1, 2, 3)) / 127).astype(np.float32)
        codes = np.rint(made["conv"] / steps[:, None, None, None]).astype(np.int8)
        made |= {"conv": codes, "w_s": steps, "w_z": np.zeros(_CHANNELS, np.int8)}
        made |= {"x_s": np.array(6 / 127, np.float32), "x_z": np.array(0, np.int8)}
        nodes += [
            helper.make_node("QuantizeLinear", ["a0", "x_s", "x_z"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "x_s", "x_z"], ["xd"]),
            helper.make_node("DequantizeLinear", ["conv", "w_s", "w_z"], ["wd"], axis=0),
        ]
        source, weight = "xd", "wd"
    nodes += [
        helper.make_node("Conv", [source, weight], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["a1"]),
        helper.make_node("GlobalAveragePool", ["a1"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], ["output"]),
    ]
    value, single = helper.make_tensor_value_info, TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "doctor", [value("input", single, (1, 3, _SIZE, _SIZE))], [value("output", single, (1, _CLASSES))],
        [numpy_helper.from_array(array, name) for name, array in made.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def _reference(inputs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return what the network computes, in float64."""
    made, x = _weights(), inputs.astype(np.float64)
    for name in ("stem", "conv"):
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3)
        )
        x = np.maximum(np.einsum("nchwij,ocij->nohw", windows, made[name].astype(np.float64)), 0)
    result: NDArray[np.float64] = x.mean(axis=(2, 3)) @ made["head"].astype(np.float64)
    return result
