"""A network as the latency predictor sees it: one unit for each layer, with everything that decides what it costs.

A unit is a layer with what the engine fuses into it or runs between it and the next: activations, sums, quantization,
changes of layout. Plain data; nothing is built or measured here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import NamedTuple

from autocompress.compress.factorizations import Factor
from autocompress.compress.shapes import factors, network_shape
from autocompress.graph.tensor_dtypes import Context, TensorDtypes
from autocompress.model.inventory import Inventory
from autocompress.policy import CompressionPolicy


class Unit(NamedTuple):
    """One layer of a compressed network.

    Attributes:
        layer: Its name.
        kind: As `model.channel_groups.Layer.kind`.
        area: Kernel elements; 1 for linear layers.
        groups: Of a grouped layer's channels; 1 for all others, depthwise ones included.
        positions: Output pixels or tokens of one sample.
        in_channels, out_channels, ranks: As `compress.shapes.LayerShape`; no ranks when not factorized.
        int8: Whether it runs in int8.
        context: How the tensors around it are kept.
        sparse: Whether its weights are 2:4 sparse.
        factorization: As `compress.shapes.LayerShape`.
        factors: The layers that it is computed by when it is factorized.
    """

    layer: str
    kind: str
    area: int
    groups: int
    positions: int
    in_channels: int
    out_channels: int
    ranks: tuple[int, ...]
    int8: bool
    context: Context
    sparse: bool = False
    factorization: str = ""
    factors: tuple[Factor, ...] = ()

    @property
    def chain(self) -> tuple[Factor, ...]:
        """The layers that it is computed by: itself, or its factors."""
        ins = 1 if self.kind == "depthwise" else self.in_channels // self.groups
        return self.factors or (Factor(ins, self.out_channels, self.area),)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return self.positions * sum(factor.macs for factor in self.chain)


@dataclass(frozen=True)
class Layout:
    """A model's structure, which all its compressed forms share.

    Attributes:
        inventory: Of the model.
        wiring: Whose result each layer reads, as `graph.template.GraphTemplate.wiring`.
        structure: Digest of the whole graph, as `GraphTemplate.structure`.
        placement: How the engine's int8 networks are made, as `QdqRules.identity`: a table of networks that were
            made in another way says nothing of those that are made now.
    """

    inventory: Inventory
    wiring: TensorDtypes = field(default_factory=TensorDtypes)
    structure: str = ""
    placement: str = ""

    @cached_property
    def hash(self) -> str:
        """Identity of the structure and of its int8 forms, whatever the weights: 16 hex digits."""
        # The graph tells strides. What says nothing is left out, so that tables of before it existed still fit; so are
        # attention heads and the layers that they were rewritten as, since the structure tells networks apart by these.
        layers = [
            {k: v for k, v in asdict(layer).items() if k not in ("rewritten", "stride")}
            for layer in self.inventory.layers.values()
            if not layer.rewritten
        ]
        groups = [
            {k: v for k, v in asdict(group).items() if (k, v) != ("parts", 1) and k != "heads"}
            for group in self.inventory.groups.values()
            if not group.heads
        ]
        blocks = {
            name: [layer for layer in block.layers if not self.inventory.layers[layer].rewritten]
            for name, block in self.inventory.blocks.items()
        }
        text = json.dumps([layers, groups, blocks, self.structure, self.placement], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def _fixed(self) -> dict[str, tuple[str, int, int, int]]:
        """Kind, area, groups and positions of each layer."""
        found = {}
        for name, layer in self.inventory.layers.items():
            area = 1
            for size in layer.kernel:
                area *= size
            positions = max(1, layer.macs // (layer.in_channels // layer.groups * layer.out_channels * area))
            groups = layer.groups if layer.kind == "grouped" else 1
            found[name] = (layer.kind, area, groups, positions)
        return found

    def units(self, policy: CompressionPolicy) -> tuple[Unit, ...]:
        """Return the units of the network that `policy` makes, in the model's order; removed blocks left out."""
        shapes = network_shape(self.inventory, policy).layers
        sparse = set(policy.sparse_layers)
        int8 = {name for name, shape in shapes.items() if shape.dtype == "int8"}
        contexts = self.wiring.contexts(int8, policy.removed_blocks)
        none = Context()
        return tuple(
            Unit(
                name, *self._fixed[name], shape.in_channels, shape.out_channels, shape.ranks, name in int8,
                contexts.get(name, none), name in sparse, shape.factorization,
                factors(self.inventory.layers[name], shape) if shape.factorization else (),
            )
            for name, shape in shapes.items()
        )  # fmt: skip

    def macs(self, policy: CompressionPolicy) -> int:
        """Return the multiply-accumulates of one sample of the network that `policy` makes."""
        return sum(unit.macs for unit in self.units(policy))
