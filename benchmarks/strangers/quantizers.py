"""One rival's recipe: an ONNX file and calibration samples to an int8 file, in a process of its own.

    python -m benchmarks.strangers.quantizers RIVAL NETWORK --onnx FILE --samples FILE.npy --to FILE [--images, --cache]

NNCF's calls are those of its documentation with default settings; so are ONNX Runtime's, the static one per channel.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.strangers.networks import MAX_DROP, NETWORKS, Network

# Neither of the runtimes reports to its makers from here.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# Samples on which NNCF's accuracy control ranks and judges.
_VALIDATION = 500


@dataclass(frozen=True)
class Job:
    """What a rival is given.

    Attributes:
        network: What is quantized.
        onnx: The uncompressed network, batch 1.
        samples: Calibration inputs ``(N, ...)``.
        to: The file to write.
        images, cache: As in `prepare`; only accuracy control reads the task.
    """

    network: Network
    onnx: Path
    samples: np.ndarray
    to: Path
    images: str | None
    cache: str | None


def nncf_quantize(job: Job) -> None:
    """NNCF's post-training quantization, one call."""
    import nncf
    import openvino as ov

    model = ov.Core().read_model(job.onnx)
    ov.save_model(nncf.quantize(model, nncf.Dataset(list(job.samples[:, None])), **_model_type(job.network)), job.to)


def nncf_accuracy_control(job: Job) -> None:
    """NNCF's quantization that puts layers back until validation data lose no more than the limit."""
    import nncf
    import openvino as ov

    from autocompress.tasks import load_task
    from benchmarks.strangers.prepare import task_config

    task = load_task(task_config(job.network, job.images, job.cache))
    pairs = (
        (inputs[i : i + 1].numpy(), targets[i : i + 1])
        for inputs, targets in task.validation(50)
        for i in range(len(inputs))
    )
    kept = list(islice(pairs, _VALIDATION))

    def validate(compiled: Any, items: Iterable[tuple[np.ndarray, torch.Tensor]]) -> tuple[float, None]:
        outputs, targets = [], []
        for inputs, target in items:
            outputs.append(torch.from_numpy(np.array(compiled(inputs)[0], np.float32)))
            targets.append(target)
        return task.metric(torch.cat(outputs), torch.cat(targets)), None

    quantized = nncf.quantize_with_accuracy_control(
        ov.Core().read_model(job.onnx),
        nncf.Dataset(list(job.samples[:, None])),
        nncf.Dataset(kept, lambda pair: pair[0]),
        validate,
        max_drop=float(MAX_DROP.removesuffix("pp")) / 100,
        **_model_type(job.network),
    )
    ov.save_model(quantized, job.to)


def _model_type(network: Network) -> dict[str, Any]:
    import nncf

    return {"model_type": nncf.ModelType.TRANSFORMER} if network.transformer else {}


def onnxruntime_static(job: Job) -> None:
    """ONNX Runtime's static quantization: Q/DQ, per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left: Iterator[dict[str, np.ndarray]] = ({"input": sample[None]} for sample in job.samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._left, None)

    quantize_static(_preprocessed(job), job.to, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)


def onnxruntime_dynamic(job: Job) -> None:
    """ONNX Runtime's dynamic quantization; unsigned weights where convolutions have no kernel for signed ones."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = _preprocessed(job)
    quantize_dynamic(source, job.to)
    try:
        onnxruntime.InferenceSession(job.to, providers=["CPUExecutionProvider"])
    except Exception as error:
        if "ConvInteger" not in str(error):
            raise
        quantize_dynamic(source, job.to, weight_type=QuantType.QUInt8)
        onnxruntime.InferenceSession(job.to, providers=["CPUExecutionProvider"])


def _preprocessed(job: Job) -> Path:
    """Return the graph as ONNX Runtime's documentation wants it before quantization."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = job.to.with_name(f"preprocessed-{job.to.name}")
    try:
        quant_pre_process(str(job.onnx), str(path))
    except Exception:  # noqa: BLE001 - symbolic shapes are not inferred for every graph; the rest needs none
        quant_pre_process(str(job.onnx), str(path), skip_symbolic_shape=True)
    return path


RIVALS: dict[str, Callable[[Job], None]] = {
    "nncf": nncf_quantize,
    "nncf-accuracy-control": nncf_accuracy_control,
    "onnxruntime-static": onnxruntime_static,
    "onnxruntime-dynamic": onnxruntime_dynamic,
}


def main() -> None:
    """Run one rival."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rival", choices=RIVALS)
    parser.add_argument("network", choices=NETWORKS)
    for name in ("onnx", "samples", "to"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--images")
    parser.add_argument("--cache")
    options = parser.parse_args()
    job = Job(
        NETWORKS[options.network], options.onnx, np.load(options.samples), options.to, options.images, options.cache
    )
    RIVALS[options.rival](job)


if __name__ == "__main__":
    main()
