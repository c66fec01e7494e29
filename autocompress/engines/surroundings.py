"""What stands around each layer in an exported graph: which layers feed it, which read it, what the engine may fuse."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Surroundings:
    """What stands around a layer in the uncompressed graph.

    Attributes:
        before: Layers whose results reach its input with no other layer between.
        after: Layers that its result reaches likewise.
        ops: Types of the nodes right after it, sorted.
        readers: How many nodes read its input tensor: more than one means that quantizing it may cost a copy.
    """

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    readers: int = 1


# Ops that a value passes on its way from one layer to the next without becoming another tensor's concern.
_PASSING = frozenset({"Relu", "Clip", "Gelu", "Sigmoid", "HardSwish", "HardSigmoid", "MaxPool", "Add", "Mul"})


def surroundings(nodes: Mapping[str, ir.Node]) -> dict[str, Surroundings]:
    """Return what stands around each of the layers' nodes, which are of one graph."""
    names = {id(node): name for name, node in nodes.items()}
    before: dict[str, set[str]] = {}
    after: dict[str, set[str]] = {name: set() for name in nodes}
    for name, node in nodes.items():
        found = feeding([node.inputs[0]], names)
        before[name] = found
        for other in found:
            after[other].add(name)
    result = {}
    for name, node in nodes.items():
        source = node.inputs[0]
        result[name] = Surroundings(
            before=tuple(sorted(before[name])),
            after=tuple(sorted(after[name])),
            ops=tuple(sorted(_following(node, names))),
            readers=1 if source is None else len(source.uses()),
        )
    return result


def structure(model: ir.Model) -> str:
    """Return a digest of a graph's nodes, their attributes and what feeds what, whatever the names and weights."""
    numbers = {id(value): number for number, value in enumerate(model.graph.inputs)}
    text = []
    for node in model.graph:
        inputs = []
        for value in node.inputs:
            if value is not None and value.const_value is not None:
                inputs.append(str(tuple(value.const_value.shape)))
            else:
                inputs.append("" if value is None else str(numbers[id(value)]))
        attributes = [f"{name}={node.attributes[name].value}" for name in sorted(node.attributes)]
        text.append(" ".join([node.op_type, *inputs, *attributes]))
        for value in node.outputs:
            numbers[id(value)] = len(numbers)
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def feeding(values: Iterable[ir.Value | None], names: Mapping[int, str]) -> set[str]:
    """Return the layers whose results reach any of these values with no other layer between.

    Args:
        values: Of one graph.
        names: The layers' names by the id of their nodes.
    """
    found: set[str] = set()
    pending, seen = list(values), set()
    while pending:
        value = pending.pop()
        producer = None if value is None else value.producer()
        if producer is None or id(producer) in seen:
            continue
        seen.add(id(producer))
        if id(producer) in names:
            found.add(names[id(producer)])
        else:
            pending.extend(producer.inputs)
    return found


def _following(node: ir.Node, layers: Mapping[int, str], most: int = 4) -> list[str]:
    ops: list[str] = []
    pending, seen = [node], {id(node)}
    while pending and len(ops) < most:
        for value in pending.pop(0).outputs:
            for use in value.uses():
                if id(use.node) in seen or id(use.node) in layers:
                    continue
                seen.add(id(use.node))
                ops.append(use.node.op_type)
                if use.node.op_type in _PASSING:
                    pending.append(use.node)
    return ops[:most]
