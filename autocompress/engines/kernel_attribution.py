"""What an engine's kernels are: which nodes of the ONNX graph each one computes, and how long it takes.

Engines fuse nodes, insert others and drop some, so kernels and nodes do not match one to one. Engines say what they
know (names they kept, tensors they kept, which kernel feeds which); `attribute` gives the other nodes to kernels. Must
not import a runtime, torch or onnx.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True)
class KernelTime:
    """One kernel of a built engine and its time.

    Attributes:
        nodes: Names of the ONNX nodes it computes, the fused ones too, in graph order; empty for what the runtime
            inserted, such as reorders. A node without a name goes by its first output's. A node that the engine
            computes in several kernels is named by each; one that costs nothing (a reshape in place) by none.
        op: The runtime's type of node, as ``"Convolution"`` or ``"Reorder"``.
        kernel: Which implementation ran, as ``"brgconv_avx512_amx_bf16"``.
        dtype: What it ran in: ``"fp32"``, ``"bf16"``, ``"fp16"``, ``"int8"``, or the runtime's word for any other.
        time_ms: Typical time in one inference.
        n: Inferences that the time was taken from.
    """

    nodes: tuple[str, ...]
    op: str
    kernel: str
    dtype: str
    time_ms: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**asdict(self), "nodes": list(self.nodes)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form."""
        return cls(**{**data, "nodes": tuple(data["nodes"])})


@dataclass(frozen=True)
class Node:
    """One node of the ONNX graph.

    Attributes:
        op: Its type, the runtime's or ONNX's.
        inputs: Indices of the nodes that it reads from.
        is_output: Whether it makes an output of the graph.
    """

    op: str
    inputs: tuple[int, ...]
    is_output: bool = False


@dataclass(frozen=True)
class Kernel:
    """One kernel of an engine, in the order of execution.

    Attributes:
        op: The runtime's type of node.
        nodes: Indices of the ONNX nodes that the engine says it computes; none for what the runtime inserted.
        inputs: Indices of the kernels that it reads from.
    """

    op: str
    nodes: frozenset[int]
    inputs: tuple[int, ...]


def attribute(nodes: Sequence[Node], kernels: Sequence[Kernel]) -> list[tuple[int, ...]]:
    """Return for each kernel the indices of its nodes: those the engine told, and those it fused without a word.

    Both sequences are in topological order. A silent node goes to the kernel of a neighbour, if no data then flows
    between kernels that the engine does not connect: a convolution or matrix product to a kernel of its kind, what
    follows one to the kernel before (engines fuse activations and sums into what makes their input), a
    DequantizeLinear and all else to the kernel after, if there is only one. Nodes that fit nowhere are in no kernel.
    """
    return _Attribution(nodes, kernels).run()


def _kind(op: str) -> str | None:
    """Return what a heavy op is, whatever the runtime calls it; None for all others."""
    if "Conv" in op and op != "Convert":
        return "convolution"
    return "product" if any(part in op for part in ("MatMul", "Gemm", "FullyConnected")) else None


class _Attribution:
    """The state of `attribute`."""

    def __init__(self, nodes: Sequence[Node], kernels: Sequence[Kernel]) -> None:
        self._nodes, self._kernels = nodes, kernels
        self._readers: list[list[int]] = [[] for _ in nodes]
        for index, node in enumerate(nodes):
            for source in node.inputs:
                self._readers[source].append(index)
        self._owner: dict[int, int] = {}
        for number, kernel in enumerate(kernels):
            for index in kernel.nodes:
                # A node computed by several kernels leaves the last one.
                self._owner[index] = number
        self._told = [kernel.nodes for kernel in kernels]
        self._edges = self._connections()

    def run(self) -> list[tuple[int, ...]]:
        """Give away the silent nodes, the surest first."""
        backward, forward = range(len(self._nodes) - 1, -1, -1), range(len(self._nodes))
        # A node that finds its kernel is a neighbour for the next, so passes repeat until nothing moves.
        for rule, order in (
            (self._heavy, backward),
            (self._dequantize, backward),
            (self._after_heavy, forward),
            (self._before, backward),
            (self._after, forward),
        ):
            moved = True
            while moved:
                moved = False
                for index in order:
                    if index in self._owner:
                        continue
                    kernel = rule(index)
                    if kernel is not None:
                        self._owner[index] = kernel
                        moved = True
        found: list[set[int]] = [set(told) for told in self._told]
        for index, number in self._owner.items():
            found[number].add(index)
        return [tuple(sorted(own)) for own in found]

    # -- rules: the kernel of a silent node, or None --------------------------------------------------------------

    def _heavy(self, index: int) -> int | None:
        kind = _kind(self._nodes[index].op)
        number = self._leads_to(index)
        if kind is None or number is None or _kind(self._kernels[number].op) != kind:
            return None
        taken = any(owner == number and _kind(self._nodes[i].op) == kind for i, owner in self._owner.items())
        return number if not taken and self._fits(index, number) else None

    def _dequantize(self, index: int) -> int | None:
        return self._before(index) if self._nodes[index].op == "DequantizeLinear" else None

    def _after_heavy(self, index: int) -> int | None:
        if _kind(self._nodes[index].op) is not None:
            return None
        number = self._after(index)
        return number if number is not None and _kind(self._kernels[number].op) is not None else None

    def _before(self, index: int) -> int | None:
        number = self._one_reader(index)
        return number if number is not None and self._fits(index, number) else None

    def _after(self, index: int) -> int | None:
        sources = sorted({self._owner[i] for i in self._nodes[index].inputs if i in self._owner}, reverse=True)
        return next((number for number in sources if self._fits(index, number)), None)

    # -- what they ask --------------------------------------------------------------------------------------------

    def _one_reader(self, index: int) -> int | None:
        """Return the kernel that alone reads a node's result."""
        owners = {self._owner.get(reader) for reader in self._readers[index]}
        return owners.pop() if len(owners) == 1 and not self._nodes[index].is_output else None

    def _leads_to(self, index: int) -> int | None:
        """Return the kernel that alone reads a node's result, through silent nodes that do little."""
        while True:
            number, readers = self._one_reader(index), self._readers[index]
            if number is not None or len(readers) != 1 or self._nodes[index].is_output:
                return number
            index = readers[0]
            if _kind(self._nodes[index].op) is not None:
                return None

    def _fits(self, index: int, number: int) -> bool:
        """Return whether data would flow only where the engine's does."""
        sources = (self._owner.get(i, number) for i in self._nodes[index].inputs)
        readers = (self._owner.get(i, number) for i in self._readers[index])
        return all(k == number or (k, number) in self._edges for k in sources) and all(
            k == number or (number, k) in self._edges for k in readers
        )

    def _connections(self) -> set[tuple[int, int]]:
        """Return the pairs of kernels with data flowing between, through what the runtime inserted."""
        reached: list[frozenset[int]] = []
        edges: set[tuple[int, int]] = set()
        for number, kernel in enumerate(self._kernels):
            sources = frozenset[int]().union(*(reached[i] for i in kernel.inputs))
            edges.update((source, number) for source in sources)
            reached.append(frozenset([number]) if kernel.nodes else sources)
        return edges
