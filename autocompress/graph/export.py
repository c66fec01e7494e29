"""A torch model as an ONNX file. The one module of this package that imports torch; never loaded in the worker.

Exported in eval mode with a fixed batch, one opset for every engine, batch-norm folded into convolutions. Each node
that computes a layer can be found by the layer's name afterwards (`layer_nodes`), which is what Q/DQ placement goes by.
"""

from __future__ import annotations

import ast
import copy
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes.common import NameFixPass
from torch import Tensor, nn

from autocompress.errors import ExportError
from autocompress.files import write_bytes
from autocompress.tasks.adapters import Adapter

# The newest opset that OpenVINO, ONNX Runtime and TensorRT of the supported versions all read.
OPSET = 20
INPUT, OUTPUT = "input", "output"
_SCOPES = "pkg.torch.onnx.name_scopes"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which prints its progress and warns of its own internals."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def to_onnx(model: nn.Module, inputs: Tensor) -> ir.Model:
    """Export `model` (eval mode) for inputs of exactly this shape ``(N, ...)``; those of an `Adapter` by their names.

    Raises:
        ExportError: The model cannot be exported; says why, and what usually is the reason.
    """
    model, inputs = _plainly_laid_out(model), inputs.contiguous()
    named = model.unpack(inputs) if isinstance(model, Adapter) and model.inputs is not None else {INPUT: inputs}
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                model, tuple(named.values()), dynamo=True, opset_version=OPSET, input_names=list(named),
                output_names=[OUTPUT], verbose=False,
            )  # fmt: skip
    except Exception as error:  # the exporter raises whatever the model's forward provokes
        raise ExportError(_explain(error)) from error
    assert program is not None
    _store_transposed(program.model)
    _name_ends(program.model)
    return program.model


def _plainly_laid_out(model: nn.Module) -> nn.Module:
    """Return the model, or a copy where its weights lie channels last, as torch computes fastest.

    An adaptive pool behind such weights is exported with a gather of strides, which engines compute one by one; no
    engine takes its order of weights from torch.
    """
    if all(parameter.is_contiguous() for parameter in model.parameters()):
        return model
    return copy.deepcopy(model).to(memory_format=torch.contiguous_format)


def _name_ends(model: ir.Model) -> None:
    """Call a node that makes an output by the output's name, as OpenVINO does: so it is known by it from the start."""
    for value in model.graph.outputs:
        end = value.producer()
        if end is not None:
            end.name = value.name


def _store_transposed(model: ir.Model) -> None:
    """Store weights as their layers read them: the exporter leaves those of a layer that runs twice to be transposed.

    Whatever reads the graph takes a layer's weight for a stored one.
    """
    graph, stored = model.graph, dict[tuple[str, tuple[int, ...]], ir.Value]()
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" and node.inputs else None
        if weight is None or not weight.name or weight.name not in graph.initializers or weight.const_value is None:
            continue
        array, order = weight.const_value.numpy(), node.attributes.get("perm")
        axes = tuple(range(array.ndim))[::-1] if order is None else tuple(order.as_ints())
        if (weight.name, axes) not in stored:
            value = ir.Value(name=node.outputs[0].name, const_value=ir.tensor(array.transpose(axes).copy()))
            value.shape, value.type = ir.Shape([array.shape[axis] for axis in axes]), weight.type
            stored[weight.name, axes] = value
        ir.convenience.replace_all_uses_with(node.outputs[0], stored[weight.name, axes])
        graph.remove(node, safe=True)
        if not weight.uses():
            del graph.initializers[weight.name]
    for value in stored.values():
        graph.register_initializer(value)


def _explain(error: BaseException) -> str:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    words = " ".join(str(e) for e in chain)
    first = str(chain[-1]).strip().splitlines() or [type(error).__name__]
    hint = "Check that its forward uses tensor operations alone."
    if any(sign in words for sign in ("data-dependent", "DataDependent", "GuardOnData", "Dynamic control flow")):
        hint = (
            "Its forward has data-dependent control flow (an if or a loop on a tensor's values), which no engine's "
            "graph can hold: rewrite it with torch.where, or give a model without it."
        )
    return f"The model cannot be exported to ONNX: {type(chain[-1]).__name__}: {first[0][:300]}. {hint}"


def save_onnx(model: ir.Model, path: Path) -> None:
    """Write an ONNX file atomically, every node with a name of its own by which engines tell what they run.

    Raises:
        ExportError: The model is larger than the 2 GB that one ONNX file can hold.
        ConfigError: The file cannot be written.
    """
    # What the exporter knows of the source (file names, lines of code) does not belong in a shipped file.
    for node in model.graph:
        node.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    # Editing may have put another node there.
    _name_ends(model)
    NameFixPass()(model)
    try:
        data = ir.to_proto(model).SerializeToString()
    except ValueError as error:
        raise ExportError(f"The model does not fit one ONNX file (2 GB): {error}") from error
    write_bytes(path, data)


def modules_of(node: ir.Node) -> list[str]:
    """Return the modules that a node lies in, the innermost last.

    The last scope that the exporter notes is the operation's own name, such as ``"lstm"``, which modules have as well.
    """
    text = node.metadata_props.get(_SCOPES)
    return list(ast.literal_eval(text))[:-1] if text else []


def layer_nodes(model: ir.Model, names: Iterable[str]) -> dict[str, ir.Node]:
    """Return the Conv, Gemm or MatMul node of each named layer, the first of those that run more than once.

    Layers without one are absent.
    """
    return {name: nodes[0] for name, nodes in every_layer_node(model, names).items()}


def every_layer_node(model: ir.Model, names: Iterable[str]) -> dict[str, list[ir.Node]]:
    """Return all Conv, Gemm or MatMul nodes of each named layer, in the graph's order.

    A layer that runs several times in one pass (the heads of a detector, a repeated block) has as many.
    """
    wanted = set(names)
    found: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.inputs) < 2:
            continue
        weight = node.inputs[1]
        name = (weight.name or "").removesuffix(".weight") if weight is not None else ""
        if name not in wanted:
            inside = [module for module in modules_of(node) if module in wanted]
            name = inside[-1] if inside else ""
        if name in wanted and weight is not None and weight.const_value is not None:
            found.setdefault(name, []).append(node)
    return found
