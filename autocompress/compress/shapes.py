"""What a policy makes of every layer's shape, from the inventory alone: no model is touched.

The figures are those that `apply_policy` arrives at, from the same rounding rules. The latency predictor reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from autocompress.compress.factorizations import FACTORIZATIONS, Factor, factorization_of
from autocompress.compress.pruning import kept_channels
from autocompress.model.inventory import Inventory, Layer
from autocompress.policy import CompressionPolicy


class LayerShape(NamedTuple):
    """One layer under a policy.

    Attributes:
        in_channels, out_channels: What pruning leaves.
        ranks: Widths between the factors of its low-rank form; none when it is not factorized.
        dtype: ``"int8"``, or the policy's dense dtype.
        factorization: Of its low-rank form, as `compress.factorizations.FACTORIZATIONS`; empty when not factorized.
    """

    in_channels: int
    out_channels: int
    ranks: tuple[int, ...]
    dtype: str
    factorization: str = ""


@dataclass(frozen=True)
class NetworkShape:
    """A model under a policy.

    Attributes:
        dense_dtype: What every layer that is not int8 runs in.
        groups: Kept channels, or attention heads, of every group.
        layers: Shape of every layer that is still there, in the model's order.
        removed_blocks: Blocks that are gone.
    """

    dense_dtype: str
    groups: Mapping[str, int]
    layers: Mapping[str, LayerShape]
    removed_blocks: tuple[str, ...]


def network_shape(inventory: Inventory, policy: CompressionPolicy) -> NetworkShape:
    """Return the shapes of `policy` on the model of `inventory`; names that the model does not have are passed over."""
    removed = [inventory.blocks[block] for block in policy.removed_blocks if block in inventory.blocks]
    gone = {layer for block in removed for layer in block.layers}
    groups = {
        name: kept_channels(group.channels, policy.pruning.get(name, 0.0), group.parts)
        for name, group in inventory.groups.items()
        # As in `ChannelPruning`: a group whose first layer went with its block is not pruned.
        if name not in gone
    }
    ins = {name: layer.in_channels for name, layer in inventory.layers.items()}
    outs = {name: layer.out_channels for name, layer in inventory.layers.items()}
    for name, kept in groups.items():
        group = inventory.groups[name]
        if kept == group.channels:
            continue
        for producer in group.producers:
            outs[producer] = kept * group.outputs_each(producer)
            if inventory.layers[producer].kind == "depthwise":
                ins[producer] = kept
        for consumer in group.consumers:
            ins[consumer] -= (group.channels - kept) * group.multiples.get(consumer, 1)
    layers = {}
    for name, layer in inventory.layers.items():
        if name in gone:
            continue
        own = policy.layer(name)
        dtype = "int8" if own.dtype == "int8" else policy.dense_dtype
        shape = LayerShape(ins[name], outs[name], (), dtype)
        if own.rank_ratio < 1 and layer.factorizable:
            factorization = factorization_of(own.factorization, layer.kernel)
            ranks = factorization.ranks(ins[name], outs[name], window(layer), own.rank_ratio)
            shape = shape._replace(ranks=ranks, factorization=factorization.name)
        layers[name] = shape
    return NetworkShape(policy.dense_dtype, groups, layers, policy.removed_blocks)


def network_macs(inventory: Inventory, policy: CompressionPolicy) -> int:
    """Return the multiply-accumulates for one sample that channels and blocks of `policy` leave; ranks are not seen."""
    total = 0.0
    for name, shape in network_shape(inventory, policy).layers.items():
        layer = inventory.layers[name]
        # Every output channel of a depthwise layer reads one input channel, however many there are.
        ins = 1.0 if layer.kind == "depthwise" else shape.in_channels / layer.in_channels
        total += layer.macs * ins * shape.out_channels / layer.out_channels
    return round(total)


def factors(layer: Layer, shape: LayerShape) -> tuple[Factor, ...]:
    """Return the layers of a layer's low-rank form; none when it is not factorized."""
    if not shape.factorization:
        return ()
    factorization = FACTORIZATIONS[shape.factorization]
    return factorization.factors(shape.in_channels, shape.out_channels, window(layer), _stride(layer), shape.ranks)


def factorized_macs_ratio(layer: Layer, name: str, ratio: float) -> float:
    """Return MACs of a layer factorized by `name`, of `policy.FACTORIZATIONS`, over its own.

    At or above 1 it does not pay. The layer has its full width; padding is taken to keep the map's size.
    """
    factorization = factorization_of(name, layer.kernel)
    ins, outs, kernel = layer.in_channels, layer.out_channels, window(layer)
    chain = factorization.factors(ins, outs, kernel, _stride(layer), factorization.ranks(ins, outs, kernel, ratio))
    return sum(factor.macs for factor in chain) / (ins * outs * kernel[0] * kernel[1])


def _stride(layer: Layer) -> tuple[int, int]:
    return (layer.stride[0], layer.stride[1]) if layer.stride else (1, 1)


def window(layer: Layer) -> tuple[int, int]:
    """Return the kernel of a factorizable layer; 1 x 1 for linear ones."""
    return (layer.kernel[0], layer.kernel[1]) if layer.kernel else (1, 1)
