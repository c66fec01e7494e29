"""A graph contracted to its layers and to the junctions where tensors meet: it decides which tensors are kept in int8.

An engine writes a result as int8 when everything that reads it wants int8; one reader that does not (a sum, a layer in
another dtype) makes it write floats, and the int8 readers convert. Which layers those are changes with every policy and
with every removed block, so it is worked out from the wiring and not looked up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import onnx_ir as ir

# What stands for the network's input, as the maker of a tensor, and for its output, as a reader.
INPUT, OUTPUT = "", "(output)"
# Sets of removed blocks whose graph is remembered.
_REMEMBERED = 256


class _Rewired(NamedTuple):
    """A graph without some of its blocks.

    Attributes:
        read: Of every layer: whose result it reads.
        readers: Of every layer, junction and the input: who reads its result.
        makers: Of every junction that a layer reads, and the input: the layers whose results meet there, through other
            junctions too.
        joins: Of every layer: the junctions that read its result.
    """

    read: dict[str, str]
    readers: dict[str, list[str]]
    makers: dict[str, list[str]]
    joins: dict[str, list[str]]


class Context(NamedTuple):
    """How the tensors around a layer are kept under a policy; shares are in [0, 1].

    Attributes:
        inputs_int8: Share of int8 among the layers that made the tensor it reads.
        siblings_int8: Share of int8 layers among all that read that tensor, itself included.
        outputs_int8: Share of int8 layers among all that read its result.
        joins: Junctions that read its result.
        beyond_int8: Share of int8 layers among all that read those junctions' results.
    """

    inputs_int8: float = 0.0
    siblings_int8: float = 0.0
    outputs_int8: float = 0.0
    joins: int = 0
    beyond_int8: float = 0.0


@dataclass(frozen=True)
class TensorDtypes:
    """Who reads whose result. Names are those of layers, and of junctions as ``"Add:3"``.

    Attributes:
        inputs: Of every layer, junction and the output, in the graph's order: whose results it reads.
        blocks: Of every block that may be removed: whose result it gives, whose it reads, and what is in it.
        layers: Which names are layers'.
    """

    inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    blocks: Mapping[str, tuple[str, str, frozenset[str]]] = field(default_factory=dict)
    layers: frozenset[str] = frozenset()
    _known: dict[tuple[str, ...], _Rewired] = field(default_factory=dict, repr=False, compare=False)

    def contexts(self, int8: Collection[str], removed_blocks: Iterable[str] = ()) -> dict[str, Context]:
        """Return the context of every layer that is left."""
        graph = self._rewired(tuple(removed_blocks))
        if not int8:
            return {name: Context(joins=len(joins)) for name, joins in graph.joins.items()}
        wanted = frozenset(int8)

        def share(names: list[str]) -> float:
            # No more digits than a table's row keeps.
            return round(len([name for name in names if name in wanted]) / len(names), 4) if names else 0.0

        kept = {name: share(readers) for name, readers in graph.readers.items()}
        made = {name: share(makers) for name, makers in graph.makers.items()}
        made |= dict.fromkeys(wanted, 1.0)
        return {
            name: Context(
                made.get(source, 0.0), kept.get(source, 0.0), kept.get(name, 0.0), len(graph.joins[name]),
                max([kept.get(join, 0.0) for join in graph.joins[name]], default=0.0),
            )
            for name, source in graph.read.items()
        }  # fmt: skip

    def _makers(self, junction: str, sources: Mapping[str, tuple[str, ...]]) -> list[str]:
        """Return the layers whose results meet at a junction, through other junctions too."""
        found, pending, seen = [], list(sources.get(junction, ())), set()
        while pending:
            name = pending.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in self.layers:
                found.append(name)
            else:
                pending.extend(sources.get(name, ()))
        return found

    def _rewired(self, removed_blocks: tuple[str, ...]) -> _Rewired:
        """Return the graph that is left."""
        if removed_blocks in self._known:
            return self._known[removed_blocks]
        blocks = [self.blocks[block] for block in removed_blocks if block in self.blocks]
        around = {outside: inside for outside, inside, _ in blocks}
        gone = {name for _, _, inside in blocks for name in inside}

        def resolved(name: str) -> str:
            # The block before may be gone as well.
            while name in around:
                name = around[name]
            return name

        sources = {name: tuple(map(resolved, found)) for name, found in self.inputs.items() if name not in gone}
        readers: dict[str, list[str]] = {}
        for name, found in sources.items():
            for source in dict.fromkeys(found):
                readers.setdefault(source, []).append(name)
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        layers = [name for name in sources if name in self.layers]
        read = {name: sources[name][0] for name in layers}
        made = _Rewired(
            read,
            readers,
            {name: self._makers(name, sources) for name in {*read.values()} - self.layers},
            {name: [r for r in readers.get(name, ()) if r not in self.layers and r != OUTPUT] for name in layers},
        )
        self._known[removed_blocks] = made
        return made


def wiring(
    model: ir.Model,
    nodes: Mapping[str, ir.Node],
    blocks: Mapping[str, tuple[ir.Value, ir.Value]],
    inside: Callable[[ir.Node, str], bool],
) -> TensorDtypes:
    """Contract a graph.

    Args:
        model: The graph.
        nodes: Of the layers.
        blocks: The tensor that each block gives and the one that it reads.
        inside: Tells whether a node belongs to a block.
    """
    names = {id(node): name for name, node in nodes.items()}
    for number, node in enumerate(model.graph):
        if id(node) not in names and len(list(_tensors(node))) > 1:
            names[id(node)] = f"{node.op_type}:{number}"

    def source(value: ir.Value) -> str:
        while (producer := value.producer()) is not None:
            if id(producer) in names:
                return names[id(producer)]
            found = next(_tensors(producer), None)
            if found is None:
                break
            value = found
        return INPUT

    inputs = {
        names[id(node)]: tuple(source(value) for value in _tensors(node)) or (INPUT,)
        for node in model.graph
        if id(node) in names
    }
    inputs[OUTPUT] = tuple(source(value) for value in model.graph.outputs)
    members = {
        block: (
            source(given),
            source(read),
            frozenset(names[id(node)] for node in model.graph if id(node) in names and inside(node, block)),
        )
        for block, (given, read) in blocks.items()
    }
    return TensorDtypes(inputs, members, frozenset(nodes))


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


def _tensors(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the inputs of a node that are computed and not constant."""
    return (
        value
        for value in node.inputs
        if value is not None
        and value.const_value is None
        and (value.is_graph_input() or (value.producer() is not None and not _constant(value)))
    )


def _constant(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and (producer.op_type == "Constant" or not any(producer.inputs))
