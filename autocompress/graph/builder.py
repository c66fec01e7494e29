"""The ONNX graph of any compressed form of one model: by editing one export where that works, else by exporting."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import onnx_ir as ir
import torch
from safetensors.torch import save
from torch import Tensor, nn

from autocompress.compress.quantization import QuantizationRange, activation_ranges, quantization_mode
from autocompress.compress.recurrent import int8_lstms
from autocompress.compress.smoothing import divisors, undivided
from autocompress.config import QuantizationConfig
from autocompress.engines import engine_class
from autocompress.engines.kernel_attribution import KernelTime
from autocompress.errors import ExportError
from autocompress.files import write_bytes, write_json
from autocompress.graph.export import save_onnx, to_onnx
from autocompress.graph.input_division import divide_inputs
from autocompress.graph.int8_lstm import quantize_lstms
from autocompress.graph.layout import Layout
from autocompress.graph.qdq import insert_qdq
from autocompress.graph.qdq_rules import RULES
from autocompress.graph.result_ranges import ResultRange, result_ranges
from autocompress.graph.roundings import Roundings
from autocompress.graph.template import GraphTemplate
from autocompress.model.batch_norm_folding import foldable
from autocompress.model.inventory import Inventory
from autocompress.policy import CompressionPolicy
from autocompress.tasks.reading import first_samples

# Calibration samples that results' ranges are taken from: each has many values, and every candidate is run on them.
_SAMPLES = 128


class Graph(NamedTuple):
    """An ONNX graph for one engine.

    Attributes:
        model: Shapes fixed, with Q/DQ.
        dense: Layers that were to be int8 and are not, with the engine's reason.
        roundings: What else than the inputs of its int8 layers is rounded.
    """

    model: ir.Model
    dense: dict[str, str]
    roundings: Roundings = Roundings()


class Ranges(NamedTuple):
    """Quantization of a compressed model's int8 layers, by name.

    Attributes:
        inputs: Of what they read; these layers are int8.
        results: Of what convolutions among them give.
        norms: Layer to the batch-norm that is folded into it, where results have ranges.
    """

    inputs: Mapping[str, QuantizationRange] = MappingProxyType({})
    results: Mapping[str, ResultRange] = MappingProxyType({})
    norms: Mapping[str, str] = MappingProxyType({})


class GraphBuilder:
    """Graphs for one engine.

    Args:
        base: The uncompressed model, rewritten, in eval mode.
        inputs: Example inputs of exactly the shape to run ``(N, ...)``.
        inventory: Of `base`.
        engine: Whose rules Q/DQ follows.
    """

    def __init__(self, base: nn.Module, inputs: Tensor, inventory: Inventory, engine: str) -> None:
        self._base, self._inputs, self._inventory, self._engine = base, inputs, inventory, engine
        self._edits = True

    @cached_property
    def _template(self) -> GraphTemplate:
        return GraphTemplate(self._base, self._inputs, self._inventory.blocks)

    def export_base(self) -> None:
        """Export the base now, which else the first graph does. What cannot be exported is told by that graph."""
        with suppress(ExportError):
            _ = self._template

    @cached_property
    def layout(self) -> Layout:
        """The model's structure, for the latency predictor.

        Raises:
            ExportError: The model cannot be exported.
        """
        template = self._template
        placement = RULES[self._engine].identity(attention=template.has_attention)
        return Layout(self._inventory, template.wiring, template.structure, placement)

    def layer_of(self, node: str) -> str | None:
        """Return the layer that a node of an edited graph belongs to, or None."""
        return self._template.layer_of(node)

    def shares(self, kernels: Sequence[KernelTime], latency_ms: float) -> dict[str, float]:
        """Return what each layer takes of a network's latency in ms, going by its kernels' times.

        All kernels together are taken to add up to the latency: a profiler counts whole microseconds and slows the
        network down. A kernel of several layers is no layer's. One of none is neither, but where the engine makes its
        tensors ready right before they are read (`Engine.kernels_in_order`) it is the next layer's.
        """
        total = sum(kernel.time_ms for kernel in kernels)
        found: dict[str, float] = {}
        waiting = 0.0
        for kernel in kernels:
            names = {name for node in kernel.nodes if (name := self.layer_of(node)) is not None}
            time_ms = max(0.0, kernel.time_ms) * latency_ms / total
            if not names and engine_class(self._engine).kernels_in_order:
                waiting += time_ms
            elif len(names) == 1 and time_ms > 0:
                name = names.pop()
                found[name] = found.get(name, 0.0) + time_ms + waiting
                waiting = 0.0
        return found

    def module_shares(self, kernels: Sequence[KernelTime], names: Collection[str]) -> dict[str, float]:
        """Return which share of all kernels' time is spent in each of the named modules of the uncompressed model.

        A kernel belongs to the module that all of its nodes lie in that lie in any; one of several is no module's.
        """
        total = sum(max(0.0, kernel.time_ms) for kernel in kernels)
        found: dict[str, float] = {}
        for kernel in kernels:
            owners = {inside[-1] for node in kernel.nodes if (inside := self._inside(node, names))}
            if len(owners) == 1 and total > 0:
                name = owners.pop()
                found[name] = found.get(name, 0.0) + max(0.0, kernel.time_ms) / total
        return found

    def _inside(self, node: str, names: Collection[str]) -> list[str]:
        layer = self.layer_of(node)
        modules = [*self._template.modules_of(node), *([layer] if layer is not None else [])]
        return [name for name in modules if name in names]

    @property
    def edits(self) -> bool:
        """Whether graphs are made by editing."""
        return self._edits

    def export_from_now_on(self) -> None:
        """Stop editing: a graph made so turned out to be wrong."""
        self._edits = False

    def edit_again(self) -> None:
        """Take `export_from_now_on` back: it was not the editing."""
        self._edits = True

    def build(self, model: nn.Module, ranges: Ranges, removed_blocks: Iterable[str] = ()) -> Graph:
        """Return the graph of `model`, a compressed form of the base, with Q/DQ for the layers of `ranges`.

        Raises:
            ExportError: The model cannot be exported, or a layer of `ranges` is not in its graph.
        """
        graph = self._template.bind(model, removed_blocks) if self._edits else None
        if graph is None:
            return exported(model, self._inputs, ranges, self._engine)
        return _quantized(graph, model, ranges, self._engine)

    def ranges(self, model: nn.Module, batches: Iterable[Tensor], quantization: QuantizationConfig) -> Ranges:
        """Return what `ranges_for` does, of a compressed form of the base."""
        return ranges_for(self._engine, model, batches, quantization, self._template.norms)


def ranges_for(
    engine: str,
    model: nn.Module,
    batches: Iterable[Tensor],
    quantization: QuantizationConfig,
    norms: Mapping[str, str] | None = None,
) -> Ranges:
    """Return the ranges of a calibrated model; those of results only where the engine's rules want them.

    Args:
        engine: Whose rules Q/DQ follows.
        model: A compressed model in eval mode, calibrated.
        batches: Calibration inputs ``(N, ...)``, read only where results' ranges are wanted.
        quantization: How ranges are set.
        norms: Layer to the batch-norm that an export folds into it; found out where it is not known.
    """
    inputs = activation_ranges(model)
    if not RULES[engine].quantize_results or not inputs:
        return Ranges(inputs)
    samples = first_samples(batches)[:_SAMPLES]
    if norms is None:
        with quantization_mode(model, "off"):
            norms = foldable(model, samples[:2])
    return Ranges(inputs, result_ranges(model, samples, norms, quantization), norms)


def exported(model: nn.Module, inputs: Tensor, ranges: Ranges, engine: str) -> Graph:
    """Return the graph of any model by exporting it for inputs ``(N, ...)``, with Q/DQ for the layers of `ranges`.

    Raises:
        ExportError: The model cannot be exported, or a layer of `ranges` is not in its graph.
    """
    with quantization_mode(model, "off"), undivided(model):
        graph = to_onnx(model, inputs)
    return _quantized(graph, model, ranges, engine)


def write_model(
    model: nn.Module, policy: CompressionPolicy, inputs: Tensor, engine: str, to: Path, *, ranges: Ranges
) -> dict[str, str]:
    """Write ``policy.json``, ``weights.safetensors`` and ``model.onnx`` into a directory.

    Args:
        model: A compressed model in eval mode, calibrated.
        policy: What was done to it.
        inputs: Example inputs of exactly the shape to run ``(N, ...)``.
        engine: Whose rules Q/DQ follows.
        to: The directory.
        ranges: Of its int8 layers, see `ranges_for`.

    Returns:
        Layers that were to be int8 and are not in this engine, with its reason.

    Raises:
        ConfigError: `to` cannot be written.
        ExportError: The model cannot be exported.
    """
    graph = exported(model, inputs, ranges, engine)
    state = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_json(to / "policy.json", policy.to_dict())
    write_bytes(to / "weights.safetensors", save(state))
    save_onnx(graph.model, to / "model.onnx")
    return graph.dense


def _quantized(graph: ir.Model, model: nn.Module, ranges: Ranges, engine: str) -> Graph:
    divide_inputs(graph, {name: divisor.float().numpy() for name, divisor in divisors(model).items()})
    placed = insert_qdq(graph, ranges.inputs, engine, ranges.results)
    lstms = {name: [(i.numpy(), h.numpy()) for i, h in lstm.stacked()] for name, lstm in int8_lstms(model)}
    dense = {**placed.dense, **quantize_lstms(graph, lstms, engine)}
    roundings = Roundings(
        {name: (found.quantization, found.rectified) for name, found in placed.results.items()},
        placed.shared,
        {name: torch.from_numpy(added) for name, added in placed.biases.items()},
        ranges.norms,
    )
    return Graph(graph, dense, roundings)
