"""An engine file of a compressed model, of which torch, ONNX graph and engine are known to compute the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.numpy import save as save_arrays
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from autocompress.compress.quantization import quantization_mode
from autocompress.config import RunConfig
from autocompress.engines.base import EngineFile, EngineOptions
from autocompress.engines.options import engine_options
from autocompress.errors import HUNG, BuildError, VerificationError, WorkerLostError
from autocompress.evaluation.agreement import check_outputs_match, relative_error
from autocompress.evaluation.background import BackgroundTask
from autocompress.files import write_bytes, write_json
from autocompress.graph.builder import GraphBuilder
from autocompress.graph.export import save_onnx
from autocompress.graph.roundings import Roundings, simulated
from autocompress.measurement.client import EngineWorker
from autocompress.policy import CompressionPolicy
from autocompress.runs.time_ledger import TimeLedger

NO_BACKGROUND_TASK = BackgroundTask()
# Dense dtypes whose rounding torch can show.
_TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class VerifiedBuilder:
    """Build engine files for one model on one engine, and check each of them.

    Args:
        worker: The child process that builds and runs.
        config: Engine, threads, batch size, and how ranges are set.
        graphs: Of the model.
        capabilities: Dtypes that the engine computes in.
        calibration: What ranges are taken from ``(N, ...)``.
        reference: Inputs that all forms are compared on ``(N, ...)``.
        device_absent: Whether engines are built for a device that is not here.
    """

    def __init__(
        self, worker: EngineWorker, config: RunConfig, graphs: GraphBuilder, *, capabilities: tuple[str, ...],
        calibration: Tensor, reference: Tensor, device_absent: bool,
    ) -> None:  # fmt: skip
        self._worker, self._config, self._graphs, self._capabilities = worker, config, graphs, capabilities
        self._calibration, self._reference, self._device_absent = calibration, reference, device_absent

    def build(
        self,
        model: nn.Module,
        policy: CompressionPolicy,
        folder: Path,
        ledger: TimeLedger,
        background: BackgroundTask = NO_BACKGROUND_TASK,
    ) -> EngineFile:
        """Export and build `model` into `folder`, and check that torch, ONNX and engine agree.

        `background` is begun when torch has done its part, and has ended before it has another.

        Raises:
            ExportError, BuildError: A station refused the model.
            VerificationError: Two forms of the model disagree beyond `TOLERANCES`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._worker.limits.new_candidate()
        try:
            return self._build(model, policy, folder, ledger, background)
        except (BuildError, VerificationError) as error:
            # What has hung twice has had its time.
            hung = isinstance(error, WorkerLostError) and error.ending == HUNG
            if not self._graphs.edits or hung:
                raise
            background.join()
            # Was it the candidate, or the editing of its graph? An export tells.
            self._graphs.export_from_now_on()
            try:
                return self._build(model, policy, folder, ledger, background)
            except (BuildError, VerificationError):
                self._graphs.edit_again()
                raise

    def _build(
        self, model: nn.Module, policy: CompressionPolicy, folder: Path, ledger: TimeLedger, background: BackgroundTask
    ) -> EngineFile:
        onnx = folder / "model.onnx"
        options = engine_options(policy, self._config, self._capabilities)
        with ledger.charge("proxy"):
            ranges = self._graphs.ranges(model, [self._calibration], self._config.quantization)
        with ledger.charge("export"):
            graph = self._graphs.build(model, ranges, policy.removed_blocks)
            if graph.dense:
                # Why an int8 layer of the policy is not one in this engine.
                write_json(folder / "placement.json", graph.dense)
            save_onnx(graph.model, onnx)
            state = {n: t.detach().contiguous().clone() for n, t in model.state_dict().items()}
            write_bytes(folder / "weights.safetensors", save_tensors(state))
        background.start()
        with ledger.charge("build"):
            file = self._worker.build(self._config.engine, onnx, options, folder / "model")
        with ledger.charge("verify"):
            self._verify(model, policy, onnx, file, graph.roundings)
        return file

    def _verify(
        self, model: nn.Module, policy: CompressionPolicy, onnx: Path, file: EngineFile, roundings: Roundings
    ) -> None:
        reference, threads = self._reference, self._config.threads
        with torch.no_grad(), simulated(model, roundings):
            expected = model(reference.clone()).float().numpy()

        def int8_error() -> float:
            with torch.no_grad(), quantization_mode(model, "off"):
                return relative_error(model(reference).float().numpy(), expected)

        def rounding_error() -> float:
            # Of int8, a code that falls to the other side of a step: what bf16 does shows how far that leads.
            dtype = _TORCH_DTYPES.get(file.options.dtype, torch.bfloat16)
            with torch.no_grad(), simulated(model, roundings), torch.autocast("cpu", dtype):
                return relative_error(expected, model(reference.clone()).float().numpy())

        inputs = reference.numpy()
        graph = self.runnable(replace(file, path=onnx, options=replace(file.options, dtype="fp32")))
        check_outputs_match(
            "the ONNX graph", expected, self._worker.infer(graph, inputs, threads=threads), policy, onnx,
            dense_dtype="fp32", int8_error=int8_error, rounding_error=rounding_error if policy.int8_layers else None,
        )  # fmt: skip
        outputs = self._worker.infer(self.runnable(file), inputs, threads=threads)
        check_outputs_match(
            "the engine", expected, outputs, policy, onnx, int8_error=int8_error,
            rounding_error=rounding_error if policy.int8_layers or file.options.dtype in _TORCH_DTYPES else None,
        )  # fmt: skip
        write_bytes(onnx.parent / "reference.safetensors", save_arrays({"inputs": inputs, "outputs": outputs}))

    def runnable(self, file: EngineFile) -> EngineFile:
        """Return what gives a file's outputs here: itself, or where its device is not here its graph on the CPU."""
        if not self._device_absent:
            return file
        options = EngineOptions("fp32", file.options.threads, file.options.batch_size)
        return EngineFile("onnxruntime", file.path.parent / "model.onnx", options)
