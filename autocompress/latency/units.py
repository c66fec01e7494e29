"""A network as the latency predictor sees it: one unit for each layer, with everything that decides what it costs.

A unit is a layer with what the engine fuses into it or runs between it and the next: activations, sums, quantization,
changes of layout. Two layers share what is known of them when they are of one class: same arithmetic, same number of
output positions, same surroundings in the uncompressed graph. Plain data; nothing is built or measured here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

from autocompress.compress.shapes import LayerShape, network_shape
from autocompress.engines.surroundings import Surroundings
from autocompress.inventory import Inventory
from autocompress.policy import CompressionPolicy


class Unit(NamedTuple):
    """One layer of a compressed network.

    Attributes:
        layer: Its name.
        kind: As `inventory.Layer.kind`.
        area: Kernel elements; 1 for linear layers.
        groups: Of a grouped layer's channels; 1 for all others, depthwise ones included.
        positions: Output pixels or tokens of one sample.
        role: Number of its `Surroundings` among those of its network.
        in_channels, out_channels, ranks: As `compress.shapes.LayerShape`; no ranks when not factorized.
        int8: Whether it runs in int8.
        inputs_int8, outputs_int8: Share of the layers before and after it that do.
    """

    layer: str
    kind: str
    area: int
    groups: int
    positions: int
    role: int
    in_channels: int
    out_channels: int
    ranks: tuple[int, ...]
    int8: bool
    inputs_int8: float
    outputs_int8: float

    @property
    def chain(self) -> tuple[tuple[int, int, int], ...]:
        """Input channels, output channels and kernel elements of each layer that it is computed by."""
        ins, outs, area = self.in_channels, self.out_channels, self.area
        if len(self.ranks) == 2:
            return ((ins, self.ranks[0], 1), (*self.ranks, area), (self.ranks[1], outs, 1))
        if self.ranks:
            return ((ins, self.ranks[0], area), (self.ranks[0], outs, 1))
        return ((1, outs, area),) if self.kind == "depthwise" else ((ins // self.groups, outs, area),)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return self.positions * sum(ins * outs * area for ins, outs, area in self.chain)


@dataclass(frozen=True)
class Layout:
    """A model's structure, which all its compressed forms share.

    Attributes:
        inventory: Of the model.
        surroundings: Of each layer, as `engines.template.GraphTemplate.surroundings` reads them off the graph.
        structure: Digest of the whole graph, as `GraphTemplate.structure`.
    """

    inventory: Inventory
    surroundings: Mapping[str, Surroundings]
    structure: str = ""

    @cached_property
    def hash(self) -> str:
        """Identity of the structure, whatever the weights: 16 hex digits."""
        layers = [asdict(layer) for layer in self.inventory.layers.values()]
        groups = [asdict(group) for group in self.inventory.groups.values()]
        blocks = {name: block.layers for name, block in self.inventory.blocks.items()}
        around = {name: asdict(found) for name, found in sorted(self.surroundings.items())}
        text = json.dumps([layers, groups, blocks, around, self.structure], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def _fixed(self) -> dict[str, tuple[str, int, int, int, int]]:
        """Kind, area, groups, positions and role of each layer."""
        roles: dict[tuple[object, ...], int] = {}
        found = {}
        for name, layer in self.inventory.layers.items():
            around = self.surroundings.get(name, Surroundings())
            area = 1
            for size in layer.kernel:
                area *= size
            positions = max(1, layer.macs // (layer.in_channels // layer.groups * layer.out_channels * area))
            groups = layer.groups if layer.kind == "grouped" else 1
            key = (around.ops, len(around.after), around.readers, layer.in_channels, layer.out_channels)
            found[name] = (layer.kind, area, groups, positions, roles.setdefault(key, len(roles)))
        return found

    def unit(
        self,
        layer: str,
        shape: LayerShape,
        *,
        inputs_int8: float,
        outputs_int8: float,
    ) -> Unit | None:
        """Return the unit of one layer under these shapes and dtypes; None when the model has no such layer."""
        if layer not in self._fixed:
            return None
        int8 = shape.dtype == "int8"
        widths = (shape.in_channels, shape.out_channels, shape.ranks)
        return Unit(layer, *self._fixed[layer], *widths, int8, inputs_int8, outputs_int8)

    def units(self, policy: CompressionPolicy) -> tuple[Unit, ...]:
        """Return the units of the network that `policy` makes, in the model's order; removed blocks left out."""
        shapes = network_shape(self.inventory, policy).layers
        quantized = {name for name, shape in shapes.items() if shape.dtype == "int8"}

        def share(names: Sequence[str]) -> float:
            if not quantized or not names:
                return 0.0
            there = [name in quantized for name in names if name in shapes]
            # No more digits than a table's row keeps, so that a unit read back is the same unit.
            return round(sum(there) / len(there), 4) if there else 0.0

        none = Surroundings()
        found = []
        for name, shape in shapes.items():
            around = self.surroundings.get(name, none)
            sides = (share(around.before), share(around.after))
            widths = (shape.in_channels, shape.out_channels, shape.ranks)
            found.append(Unit(name, *self._fixed[name], *widths, name in quantized, *sides))
        return tuple(found)

    def macs(self, policy: CompressionPolicy) -> int:
        """Return the multiply-accumulates of one sample of the network that `policy` makes."""
        return sum(unit.macs for unit in self.units(policy))
